"""Start ranks with ``fork`` from a process that has already imported everything, for benchmarks and tests."""

from __future__ import annotations

import os
from pathlib import Path

from mvlm_core.signals import PARENT_VARIABLE
from mvlm_core.training.supervisor import MEMORY_VARIABLE, rank_environment, shared_memory


def fork_ranks(world: int, folder: Path) -> int:
    """Fork into ``world`` processes and return the rank of the current one, ready to ``join`` the process group.

    Args:
        folder: an empty folder used only by these ranks.
    """
    import torch

    torch.set_num_threads(1)  # a forked child cannot use its parent's threads
    shared = {MEMORY_VARIABLE: str(shared_memory(world))}
    environments = [rank_environment(rank, world, folder) | shared for rank in range(world)]
    rank = next((rank for rank in range(1, world) if os.fork() == 0), 0)
    os.environ |= environments[rank]
    if rank == 0:
        del os.environ[PARENT_VARIABLE]
    else:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    return rank
