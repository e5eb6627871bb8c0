"""Start of a training run: with several ranks, a trainer started without ``torchrun`` becomes their supervisor.

Use ``torchrun`` for several machines.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mvlm_core.errors import EXIT_DONE
from mvlm_core.machine import gpu_count
from mvlm_core.settings import TrainingSettings
from mvlm_core.training.supervisor import Supervisor, rank_count

if TYPE_CHECKING:  # the supervisor must not import torch
    from mvlm_core.training.recipe import Recipe

log = logging.getLogger("mvlm")


def train(recipe: Callable[[], Recipe], settings: TrainingSettings, arguments: Sequence[str]) -> int:
    """Train in this process, or in several if the settings ask for it, the default with several GPUs.

    Args:
        recipe: called only in a process that trains itself, because it imports torch.
        arguments: passed to the Python interpreter to start this trainer with these settings.
    Returns:
        The exit code of the run.
    Raises:
        UserError: see ``rank_count`` and ``run_training``.
        TrainingError: the run cannot continue, or a rank died or does not respond.
    """
    world_size = 1 if settings.dry_run else rank_count(settings)
    if world_size == 1:
        from mvlm_core.training.run import run_training

        run_training(recipe(), settings)
        return EXIT_DONE
    if settings.processes > 1:
        log.info("each batch is split across %s processes", world_size)
    else:
        log.info("each batch is split across %s of the %s GPUs on this machine (--gpus N)", world_size, gpu_count())
    command = [sys.executable, *arguments]
    return Supervisor(command, world_size, settings.log_file, shares_memory=settings.processes > 1).run()
