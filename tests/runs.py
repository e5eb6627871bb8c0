"""Tiny real runs of both models, for the tests of the loop, the export and the golden losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mvlm_trainer
from mvlm_core.distributed import ALONE, Ranks
from mvlm_core.hardware import choose_hardware
from mvlm_core.stop_request import StopRequest
from mvlm_core.training_loop import TrainingLoop
from mvlm_core.training_run import batch_source, build_task, prepare_text, run_identity
from mvlm_core.training_task import total_steps
from prioritary_mvlm import PrioritaryConfig
from prioritary_mvlm.enhanced_trainer import RECIPE

TINY = {
    "preset": "smoke",
    "data_subset": "bible/kjv",
    "hidden_dim": 32,
    "num_heads": 2,
    "ff_dim": 64,
    "num_layers": 2,
    "max_length": 32,
    "vocab_size": 400,
    "batch_size": 4,
    "max_steps": 12,
    "eval_interval": 4,
    "checkpoint_interval": 5,
    "log_interval": 2,
    "device": "cpu",
    "precision": "fp32",  # golden numbers and tolerances must hold on processors with bf16 as well
    "quiet": True,
}
EVERYTHING_ON = {"dropout": 0.1, "gradient_accumulation_steps": 2, "ema_decay": 0.9}
MODELS = ("mvlm_gpt2", "simone_enhanced")


def tiny_settings(model: str, data_dir: Path, work: Path, **changes: Any) -> Any:
    """Settings of a run of a second or two; its output folder is ``work/<model>``."""
    values = {
        **TINY,
        "data_dir": str(data_dir),
        "output_dir": str(work / model),
        "cache_dir": str(work / "cache"),
        **changes,
    }
    if model == "mvlm_gpt2":
        return mvlm_trainer.GPT2Settings(**values)
    return PrioritaryConfig(**values)


def recipe_of(model: str) -> Any:
    return mvlm_trainer.recipe() if model == "mvlm_gpt2" else RECIPE


def make_loop(model: str, settings: Any, ranks: Ranks = ALONE) -> TrainingLoop:
    """The loop of a run as the trainers put it together, not yet started."""
    recipe, hardware = recipe_of(model), choose_hardware(device=settings.device, precision=settings.precision)
    text = prepare_text(settings, recipe.tokenizer_class)
    batches = batch_source(settings, text)
    _, task = build_task(recipe, settings, hardware, text, batches, run_identity(settings, text), ranks)
    output_dir = Path(settings.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    return TrainingLoop(task, settings, hardware, output_dir, total_steps(settings, batches), ranks)


class StopAfter(StopRequest):
    """A signal that comes in the ``steps``-th step of this process."""

    def __init__(self, steps: int | None = None) -> None:
        super().__init__()
        self.steps, self.asked = steps, 0

    def defer(self) -> None:
        pass

    def wanted(self) -> bool:
        self.asked += 1  # the loop asks once a step
        if self.steps is not None and self.asked >= self.steps:
            self.signal_number = 15
        return self.signal_number is not None
