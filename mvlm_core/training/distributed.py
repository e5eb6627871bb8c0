"""Data-parallel training: what the processes of a run exchange, through ``torch.distributed``.

Each process (rank) works on its part of every global batch; gradients are summed, so all ranks take the same step and
hold the same weights. Ranks are started by ``launch`` on one machine and by ``torchrun`` on several; otherwise there is
one rank, at no cost. Only the main rank reads and writes checkpoints and sends what it read to the others, so machines
need no shared disk for them.
"""

from __future__ import annotations

import itertools
import mmap
import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mvlm_core.errors import Stopped, TrainingFailed, UserError
from mvlm_core.signals import parent_is_gone
from mvlm_core.training.launch import FOLDER_VARIABLE, MEMORY_VARIABLE

_TIMEOUT = timedelta(hours=2)  # one rank may read and check a checkpoint, or compile, while the others wait for it
_ANSWER_WITHIN = timedelta(seconds=90)  # with the supervisor's grace: within two minutes
_POLL_SECONDS = 0.1
_groups = itertools.count()


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run.

    Attributes:
        rank, world: its number, and how many there are.
        host: the process group for what stays in host memory (gloo); None when alone.
        local: its number among those of its machine; local_world: how many these are.
        memory: shared by the CPU ranks of ``launch``: each has its own part to write, which the others read.
        threads: how many the process had before.
    """

    rank: int = 0
    world: int = 1
    host: Any = None
    local: int = 0
    local_world: int = 1
    memory: mmap.mmap | None = None
    threads: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def part(self, count: int) -> range:
        """This rank's part of ``count`` items: a contiguous range; each item is in exactly one rank's part."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def part_by_size(self, sizes: Sequence[int]) -> list[int]:
        """The indices of this rank's items, in order, where each costs its size: largest first to the least loaded."""
        loads, mine = [0] * self.world, []
        for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
            least = loads.index(min(loads))
            loads[least] += sizes[index]
            if least == self.rank:
                mine.append(index)
        return sorted(mine)

    def sum_on_device(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor over all ranks, in place, with one all-reduce."""
        if self.world == 1:
            return
        together = list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in together])
        self._sum(flat)
        for tensor, part in zip(together, flat.split([tensor.numel() for tensor in together]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def all_gather(self, part: Tensor) -> Tensor:
        """The parts ``[count, …]`` of all ranks, of one shape, one after the other: ``[world · count, …]``."""
        found = part.new_empty(self.world, part.numel())
        if self.memory is None:
            _exchange(dist.all_gather_into_tensor, found.view(-1), part.reshape(-1))
        else:
            shared = torch.frombuffer(self.memory, dtype=part.dtype).view(self.world, -1)
            for chunk, into in zip(
                part.reshape(-1).split(shared.shape[1]), found.split(shared.shape[1], dim=1), strict=True
            ):
                shared[self.rank, : len(chunk)].copy_(chunk)
                self.barrier()
                into.copy_(shared[:, : len(chunk)])
                self.barrier()
        return found.view(-1, *part.shape[1:])

    def sum_numbers(self, *values: float) -> list[float]:
        """Sum numbers over all ranks, in double precision and in host memory."""
        if self.world == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        _exchange(dist.all_reduce, numbers, group=self.host)
        return numbers.tolist()

    def start_sum(self, flat: Tensor) -> torch.futures.Future[Tensor]:
        """Sum a vector over all ranks, in place; the result may be waited for later."""
        if self.memory is None:
            work = _exchange(dist.all_reduce, flat, async_op=True)
            return work.get_future().then(lambda future: future.value()[0])
        self._sum(flat)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(flat)
        return done

    def _sum(self, flat: Tensor) -> None:
        if self.memory is None:
            _exchange(dist.all_reduce, flat)
            return
        shared = torch.frombuffer(self.memory, dtype=flat.dtype).view(self.world, -1)
        for chunk in flat.split(shared.shape[1]):
            parts = shared[:, : len(chunk)]
            parts[self.rank].copy_(chunk)
            self.barrier()
            torch.sum(parts, dim=0, out=chunk)  # the same numbers in the same order: the same bits in all ranks
            self.barrier()

    def broadcast(self, value: Any) -> Any:
        """The main rank's ``value`` (plain data) on every rank."""
        if self.world == 1:
            return value
        holder = [value]
        _exchange(dist.broadcast_object_list, holder, src=0, group=self.host)
        return holder[0]

    def broadcast_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The main rank's named tensors on every rank, in host memory; the others may pass none."""
        if self.world == 1:
            return tensors
        shapes = self.broadcast({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
        received = {}
        for name, (shape, dtype) in shapes.items():
            tensor = tensors[name].detach().cpu().contiguous() if self.is_main else torch.empty(shape, dtype=dtype)
            _exchange(dist.broadcast, tensor, src=0, group=self.host)
            received[name] = tensor
        return received

    def barrier(self) -> None:
        """Wait until every rank gets here."""
        if self.world > 1:
            _exchange(dist.barrier, group=self.host)

    def wait_for_first(self, what: str) -> None:
        """Wait, however long, until the first rank of each machine gets here: in no operation that could time out.

        Raises:
            Stopped: the supervisor is gone.
        """
        self._wait_outside(what, self.local == 0, self.world // self.local_world)

    def wait_for_main(self, what: str) -> None:
        """As ``wait_for_first``, for the main rank alone; ``what`` is new each time."""
        self._wait_outside(what, self.is_main, 1)

    def _wait_outside(self, what: str, done: bool, count: int) -> None:
        if self.world == 1:
            return
        store = dist.distributed_c10d._get_default_store()  # torch.distributed has no public name for it
        if done:
            store.add(what, 1)
        while store.add(what, 0) < count:
            if parent_is_gone():
                raise Stopped(signal.SIGTERM)
            time.sleep(_POLL_SECONDS)

    def limit_waiting(self) -> None:
        """From now on, when everything is compiled, a rank that keeps the others waiting for long ends the run."""
        if self.world > 1:
            for group in (dist.group.WORLD, self.host):
                dist.distributed_c10d._set_pg_timeout(_ANSWER_WITHIN, group)

    def leave(self) -> None:
        """Leave the process group; no more exchange after this: what remains is the main rank's, with all threads."""
        if self.world > 1:
            dist.destroy_process_group()
            torch.set_num_threads(self.threads)


ALONE = Ranks()


def join(device: str) -> Ranks:
    """Join the other processes that ``launch`` or ``torchrun`` started, if one did.

    Raises:
        UserError: more processes on this machine than it has GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return ALONE
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun --nproc_per_node started more processes than this machine has GPUs "
                f"({torch.cuda.device_count()}); start one per GPU"
            )
        torch.cuda.set_device(local)
    folder, threads, memory = os.environ.get(FOLDER_VARIABLE), torch.get_num_threads(), None
    # A chain of models has a process group for each, and each group its own file.
    store = dist.FileStore(str(Path(folder, f"store{next(_groups)}")), world) if folder else None
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=world, timeout=_TIMEOUT
    )
    host = dist.new_group(backend="gloo", timeout=_TIMEOUT) if device == "cuda" else dist.group.WORLD
    if folder and device == "cpu":
        torch.set_num_threads(1)
        if MEMORY_VARIABLE in os.environ:
            memory = mmap.mmap(int(os.environ[MEMORY_VARIABLE]), 0)
    return Ranks(rank, world, host, local, int(os.environ.get("LOCAL_WORLD_SIZE", world)), memory, threads)


def _exchange(operation: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return operation(*arguments, **options)
    except RuntimeError as error:
        raise lost_connection(error) from None


def lost_connection(error: Exception) -> TrainingFailed:
    """What to raise where an exchange failed; it tells the supervisor that another rank is the cause."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        Path(folder, f"lost.{os.environ['RANK']}").touch()
    return TrainingFailed(
        f"the processes of this run lost their connection ({str(error).splitlines()[0]}); look for the first one that "
        "failed, then start all of them again: they resume from the newest checkpoint"
    )
