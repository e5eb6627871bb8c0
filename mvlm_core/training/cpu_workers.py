"""CPU workers: single-threaded processes that share each batch, at small sizes faster than one multi-threaded process.

Much of a small model's step is too little work to split among threads, but a batch always splits. The trainer forks;
parent and children train as the ranks of ``distributed`` do. Sums go through shared memory and everything else through
pipes: nothing listens on a network, and a dead process is noticed by the end of its pipe.
"""

from __future__ import annotations

import mmap
import os
import sys
import traceback
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from mvlm_core.errors import Stopped, TrainingFailed, UserError
from mvlm_core.signals import PARENT_VARIABLE
from mvlm_core.training.distributed import Ranks, join

_SHARED_BYTES = 16 << 20  # per worker: longer sums go through it in chunks, which stay in the cache
_EXPECTED = (UserError, Stopped, TrainingFailed, KeyboardInterrupt)  # the parent reports these


@dataclass(frozen=True)
class CpuWorkers(Ranks):
    """One of the workers; the main one is the parent of the others.

    Attributes:
        memory: shared; each worker has its own part to write, which the others read.
        pipes: of the parent, to each child; of a child, to the parent.
        children: process ids, in the parent only.
        threads: how many the process had before.
    """

    memory: mmap.mmap | None = None
    pipes: tuple[Connection, ...] = ()
    children: tuple[int, ...] = ()
    threads: int = 1

    def _sum(self, flat: Tensor, **_where: Any) -> None:
        shared = torch.frombuffer(self.memory, dtype=flat.dtype).view(self.world, -1)
        for chunk in flat.split(shared.shape[1]):
            parts = shared[:, : len(chunk)]
            parts[self.rank].copy_(chunk)
            self.wait()
            torch.sum(parts, dim=0, out=chunk)  # the same numbers in the same order: the same bits in all workers
            self.wait()

    def share(self, value: Any) -> Any:
        """The parent's ``value`` in every worker."""
        try:
            if not self.is_main:
                return self.pipes[0].recv()
            for pipe in self.pipes:
                pipe.send(value)
            return value
        except (EOFError, OSError):
            raise _worker_died() from None

    def share_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        arrays = self.share({name: tensor.detach().numpy() for name, tensor in tensors.items()})
        return tensors if self.is_main else {name: torch.from_numpy(array) for name, array in arrays.items()}

    def wait(self) -> None:
        """Wait until every worker gets here."""
        try:
            if not self.is_main:
                self.pipes[0].send_bytes(b"here")
                self.pipes[0].recv_bytes()
                return
            for pipe in self.pipes:
                pipe.recv_bytes()
            for pipe in self.pipes:
                pipe.send_bytes(b"go on")
        except (EOFError, OSError):
            raise _worker_died() from None

    def leave(self) -> None:
        """No more exchange after this: the remaining work is the parent's alone, with all its threads."""
        torch.set_num_threads(self.threads)

    def end(self) -> None:
        """A child exits here and never returns into the forked program; the parent waits for the children."""
        for pipe in self.pipes:
            pipe.close()
        if not self.is_main:
            error = sys.exc_info()[1]
            if error is not None and not isinstance(error, _EXPECTED):
                traceback.print_exc()
            os._exit(0 if error is None else 1)
        for child in self.children:
            os.waitpid(child, 0)
        torch.set_num_threads(self.threads)


def _worker_died() -> TrainingFailed:
    return TrainingFailed(
        "a process of this run died (out of memory? see dmesg): run the same command again to resume from the newest "
        "checkpoint, or choose fewer --processes"
    )


def start_ranks(processes: int, device: str) -> Ranks:
    """The processes of a run: CPU workers where ``processes`` asks for them, otherwise what ``torchrun`` started.

    Raises:
        UserError: workers on a GPU or under torchrun.
    """
    if processes == 1:
        return join(device)
    if device != "cpu" or "WORLD_SIZE" in os.environ:
        raise UserError(
            f"--processes {processes} is for the cores of a CPU, without torchrun; for several GPUs: torchrun "
            "--nproc_per_node, without --processes"
        )
    return fork(processes)


def fork(world: int) -> CpuWorkers:
    """Fork into ``world`` single-threaded processes; ``end`` must be called on the result in each of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # also what allows a child of a multi-threaded process to run torch at all
    memory, parent = mmap.mmap(-1, world * _SHARED_BYTES), os.getpid()
    pipes = [Pipe() for _ in range(1, world)]
    children = []
    for rank in range(1, world):
        if child := os.fork():
            children.append(child)
            continue
        for number, (ours, theirs) in enumerate(pipes, 1):
            ours.close()
            if number != rank:
                theirs.close()
        # As with torchrun; a child whose parent is gone stops, and tokenizers start no threads of their own.
        os.environ |= {"LOCAL_RANK": str(rank), PARENT_VARIABLE: str(parent), "TOKENIZERS_PARALLELISM": "false"}
        return CpuWorkers(rank, world, memory=memory, pipes=(pipes[rank - 1][1],))
    for _, theirs in pipes:
        theirs.close()
    ends = tuple(ours for ours, _ in pipes)
    return CpuWorkers(0, world, memory=memory, pipes=ends, children=tuple(children), threads=threads)
