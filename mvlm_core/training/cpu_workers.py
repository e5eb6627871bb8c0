"""Processes of one thread each on the cores of one processor: at small sizes faster than one process of many threads.

Much of a small model's step is too little work to be split among threads, but a batch always splits. The trainer forks;
parent and children train as the ranks of ``distributed`` do. Sums go through memory that they share, the rest through
pipes: nothing listens on a network, and whoever is gone is noticed by the end of its pipe.
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
from mvlm_core.training.distributed import Ranks

_SHARED_BYTES = 16 << 20  # of each rank: longer sums go through it in pieces, which stay in the cache
_EXPECTED = (UserError, Stopped, TrainingFailed, KeyboardInterrupt)  # the parent says what there is to say


@dataclass(frozen=True)
class ForkedRanks(Ranks):
    """One of the processes.

    Attributes:
        memory: what each rank writes for the others to read.
        lines: of the parent, to each child; of a child, to the parent.
        children: process numbers, of the parent only.
        threads: that the process had before.
    """

    memory: mmap.mmap | None = None
    lines: tuple[Connection, ...] = ()
    children: tuple[int, ...] = ()
    threads: int = 1

    def _sum(self, flat: Tensor, **_where: Any) -> None:
        shared = torch.frombuffer(self.memory, dtype=flat.dtype).view(self.world, -1)
        for piece in flat.split(shared.shape[1]):
            theirs = shared[:, : len(piece)]
            theirs[self.rank].copy_(piece)
            self.wait()
            torch.sum(theirs, dim=0, out=piece)  # the same numbers in the same order: all ranks get the same bits
            self.wait()

    def share(self, value: Any) -> Any:
        """The parent's ``value`` on every rank."""
        try:
            if not self.is_main:
                return self.lines[0].recv()
            for line in self.lines:
                line.send(value)
            return value
        except (EOFError, OSError):
            raise self._somebody_is_gone() from None

    def share_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        arrays = self.share({name: tensor.detach().numpy() for name, tensor in tensors.items()})
        return tensors if self.is_main else {name: torch.from_numpy(array) for name, array in arrays.items()}

    def wait(self) -> None:
        """Wait until every rank is here."""
        try:
            if not self.is_main:
                self.lines[0].send_bytes(b"here")
                self.lines[0].recv_bytes()
                return
            for line in self.lines:
                line.recv_bytes()
            for line in self.lines:
                line.send_bytes(b"go on")
        except (EOFError, OSError):
            raise self._somebody_is_gone() from None

    def leave(self) -> None:
        """No more exchange after this: what is left to do is the parent's alone, with all its threads."""
        torch.set_num_threads(self.threads)

    def end(self) -> None:
        """A child's process ends here, and never returns into the program that was forked; the parent sees them off."""
        for line in self.lines:
            line.close()
        if not self.is_main:
            error = sys.exc_info()[1]
            if error is not None and not isinstance(error, _EXPECTED):
                traceback.print_exc()
            os._exit(0 if error is None else 1)
        for child in self.children:
            os.waitpid(child, 0)
        torch.set_num_threads(self.threads)

    def _somebody_is_gone(self) -> TrainingFailed:
        return TrainingFailed(
            "a process of this run is gone (out of memory? see dmesg): run the same command again, it goes on from the "
            "newest checkpoint; or choose fewer --processes"
        )


def fork(world: int) -> ForkedRanks:
    """Fork into ``world`` processes of one thread; each gets its own ranks, and ``end`` must be called on them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # which is also what lets a child of a process that had threads go on
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
        return ForkedRanks(rank, world, memory=memory, lines=(pipes[rank - 1][1],))
    for _, theirs in pipes:
        theirs.close()
    lines = tuple(ours for ours, _ in pipes)
    return ForkedRanks(0, world, memory=memory, lines=lines, children=tuple(children), threads=threads)
