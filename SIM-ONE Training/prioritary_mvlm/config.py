"""Settings of model 2."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from bible_corpus.settings import BibleSettings
from mvlm_core.settings import CONTINUED, option
from mvlm_core.training.init_from import inherit

NAME = "simone_enhanced"  # of the export folder and the archive
# The modelling files that ship in each export: the only code that an export may hold.
MODELLING_FILES = Path(__file__).resolve().parent.parent / "simone_transformer"

# Best for short runs on a CPU (measured: benchmarks/LOG.md).
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
    """Every setting of an Enhanced SIM-ONE run.

    ``PrioritaryConfig()`` is the preset that fits this machine; ``PrioritaryConfig(preset="smoke", max_steps=10)``
    changes one value. See ``TrainingSettings`` for what both models share.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "h200": {
            "optimizer": "muon",
            "learning_rate": 0.013,
            "adamw_learning_rate": 0.0065,
            "lr_schedule": "linear",
            "weight_decay": 0.4,
            "dropout": 0.3,
        },
        "cpu": SMALL,
        "smoke": SMALL,
        CONTINUED: {"coherence_weight": 0.0},  # its adapter is not in the export
    }

    adamw_learning_rate: float = _own(
        3e-3, "peak learning rate of what muon leaves to adamw: embeddings, heads, vectors", "optimisation", above=0
    )
    output_head: str = _own(
        "tied", "the output matrix: tied to the input embedding, or its own", "model", choices=("tied", "own")
    )
    policy_head: bool = _own(True, "gates on what each attention head and the memory's pointer say", "governance")
    memory_head: bool = _own(True, "shifted keys, a value residual, and a pointer that copies", "governance")
    trace_head: bool = _own(True, "traces of the other heads and the attention", "governance")
    accuracy_weight: float = _own(0.5, "weight of next-token cross-entropy", "loss", minimum=0)
    alignment_weight: float = _own(0.5, "weight of the same, weighted by document quality", "loss", minimum=0)
    coherence_weight: float = _own(0.3, "starting weight of predicting the token after the next", "loss", minimum=0)
    coherence_until: float = _own(
        0.5, "share of the run after which the coherence weight is 0", "loss", above=0, maximum=1
    )

    def inherit(self) -> list[str]:
        return inherit(self, NAME)

    def problems(self) -> list[str]:
        found = super().problems()
        if isinstance(self.hidden_dim, int) and self.num_heads > 0 and self.hidden_dim % self.num_heads == 0:
            if (self.hidden_dim // self.num_heads) % 4:
                found.append(
                    f"--hidden_dim {self.hidden_dim} over --num_heads {self.num_heads} gives heads of a width of "
                    f"{self.hidden_dim // self.num_heads}; rotary positions and the memory head need a multiple of 4"
                )
        if self.accuracy_weight == 0 and self.alignment_weight == 0:
            found.append("--accuracy_weight and --alignment_weight are both 0: nothing would predict the next token")
        return found
