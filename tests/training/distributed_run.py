"""A tiny run in float64 for ``torchrun``: ``-m tests.training.distributed_run CORPUS WORK MODEL STEPS``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from mvlm_core.errors import Stopped
from mvlm_core.training.distributed import SINGLE_RANK, Ranks, init_ranks
from mvlm_core.training.loop import TrainingLoop
from tests.helpers import StopAfter, everything_on, make_loop, tiny_settings


def run(corpus: Path, work: Path, model: str, steps: int, ranks: Ranks = SINGLE_RANK, **more: Any) -> TrainingLoop:
    """Train for up to ``steps`` steps from the newest checkpoint, alone or as one of several ranks.

    Args:
        more: settings.
    """
    torch.set_num_threads(1)
    changes = {**everything_on(model), "dropout": 0.0, "max_steps": 50, "checkpoint_interval": 10, "eval_interval": 10}
    changes |= more
    loop = make_loop(model, tiny_settings(model, corpus, work, **changes), ranks)
    for module in loop.task.modules.values():
        module.double()
    try:
        loop.run(StopAfter(steps))
    except Stopped:
        pass
    loop.ranks.destroy()
    return loop


def main() -> None:
    run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), init_ranks("cpu"))


if __name__ == "__main__":
    main()
