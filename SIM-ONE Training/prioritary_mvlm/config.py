"""Settings of model 2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from bible_corpus.settings import BibleSettings
from mvlm_core.settings import FINE_TUNING, option
from mvlm_core.training.init_from import inherit

NAME = "simone_enhanced"  # name of the export folder and the archive
# The modeling files that ship in each export, and the only code an export may contain.
MODELING_FILES = Path(__file__).resolve().parent.parent / "simone_transformer"

# Settings chosen for short CPU runs (measured: benchmarks/LOG.md).
SMALL = {
    "optimizer": "muon",
    "learning_rate": 0.03,
    "adamw_learning_rate": 0.015,
    "lr_schedule": "linear",
    "output_head": "own",
}


_own = partial(option, identity=True)


@dataclass
class PrioritaryConfig(BibleSettings):
    """Settings of an Enhanced SIM-ONE run.

    ``PrioritaryConfig()`` uses the preset for this machine; ``PrioritaryConfig(preset="smoke", max_steps=10)``
    overrides one value. ``TrainingSettings`` has the settings that both models share.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "h200": {
            "optimizer": "muon",
            "learning_rate": 0.013,
            "adamw_learning_rate": 0.0065,
            "lr_schedule": "linear",
            "weight_decay": 0.4,
            "dropout": 0.1,
            "teacher_epochs": 1.0,  # model 2 overfits sooner than model 1
        },
        "cpu": SMALL,
        "smoke": SMALL,
        FINE_TUNING: {"coherence_weight": 0.0},  # the export does not contain the coherence adapter
    }

    MODELS_BY_HOURS: ClassVar[dict[str, tuple[tuple[float, int], ...]]] = {
        # A teacher of one epoch and a student of two already beat any model alone.
        "h200": ((0.05, 1), (0.2, 2), (0.83, 4), (math.inf, 8))
    }

    adamw_learning_rate: float = _own(
        3e-3,
        "peak AdamW learning rate for parameters not trained by Muon: embeddings, heads, 1-D tensors",
        "optimization",
        above=0,
    )
    output_head: str = _own(
        "tied", "output matrix: tied to the input embedding, or its own (untied)", "model", choices=("tied", "own")
    )
    policy_head: bool = _own(True, "gates on each attention head's output and on the pointer", "governance")
    memory_head: bool = _own(
        True, "shifted keys, the previous token's value, a value residual and a copying pointer", "governance"
    )
    trace_head: bool = _own(True, "per-token traces of the other heads and of attention", "governance")
    accuracy_weight: float = _own(0.5, "weight of the next-token cross-entropy", "loss", minimum=0)
    alignment_weight: float = _own(
        0.5, "weight of the next-token cross-entropy weighted by document quality", "loss", minimum=0
    )
    coherence_weight: float = _own(
        0.3, "initial weight of the auxiliary loss for the token after the next", "loss", minimum=0
    )
    coherence_until: float = _own(
        0.5, "fraction of the run at which --coherence_weight reaches 0", "loss", above=0, maximum=1
    )

    def inherit(self) -> list[str]:
        return inherit(self, NAME)

    def problems(self) -> list[str]:
        problems = super().problems()
        if isinstance(self.hidden_dim, int) and self.num_heads > 0 and self.hidden_dim % self.num_heads == 0:
            if (self.hidden_dim // self.num_heads) % 4:
                problems.append(
                    f"--hidden_dim {self.hidden_dim} over --num_heads {self.num_heads} gives a head dimension of "
                    f"{self.hidden_dim // self.num_heads}; rotary embeddings and the memory head need a multiple of 4"
                )
        if self.accuracy_weight == 0 and self.alignment_weight == 0:
            problems.append("--accuracy_weight and --alignment_weight are both 0: no next-token loss would be left")
        return problems
