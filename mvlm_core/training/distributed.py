"""Data-parallel training: the collectives of a run, with ``torch.distributed``.

Each process (rank) works on its part of every global batch; gradients are summed, so all ranks take the same step and
hold the same weights. ``supervisor`` starts the ranks on one machine, ``torchrun`` on several; a single rank has no
overhead.
Only the main rank reads and writes checkpoints; it broadcasts what it reads, so no shared disk is needed.
"""

from __future__ import annotations

import itertools
import mmap
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from mvlm_core.errors import Stopped, TrainingError, UserError, printable
from mvlm_core.signals import parent_is_gone
from mvlm_core.training.supervisor import FOLDER_VARIABLE, MEMORY_VARIABLE

_TIMEOUT = timedelta(hours=2)  # one rank may read and check a checkpoint, or compile, while the others wait
_STEP_TIMEOUT = timedelta(seconds=90)  # less than two minutes including the supervisor's grace period
_COMPILED_STEP_TIMEOUT = timedelta(minutes=10)  # a rank that halves its micro-batch compiles again, the others wait
_POLL_SECONDS = 0.1
_groups = itertools.count()


@dataclass(frozen=True)
class Ranks:
    """This process's rank and the process groups of the run.

    Attributes:
        rank, world_size: as in ``torch.distributed``.
        cpu_group: gloo process group for tensors in host memory; None with a single rank.
        local_rank, local_world_size: rank and world size on this machine.
        store: key-value store of all ranks; None with a single rank.
        shared_memory: memory shared by the supervisor's CPU ranks: each writes its own part and reads the others'.
        threads: the process's thread count before ``init_ranks``.
    """

    rank: int = 0
    world_size: int = 1
    cpu_group: Any = None
    local_rank: int = 0
    local_world_size: int = 1
    store: dist.Store | None = None
    shared_memory: mmap.mmap | None = None
    threads: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, count: int) -> range:
        """This rank's contiguous range of ``count`` items; the ranks' ranges partition them."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def balanced_shard(self, sizes: Sequence[int]) -> list[int]:
        """Sorted indices of this rank's items, balanced by size: the largest item goes to the least loaded rank."""
        loads, indices = [0] * self.world_size, []
        for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
            least_loaded = loads.index(min(loads))
            loads[least_loaded] += sizes[index]
            if least_loaded == self.rank:
                indices.append(index)
        return sorted(indices)

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor over all ranks, in place, with one all-reduce."""
        if self.world_size == 1:
            return
        summed = list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in summed])
        self._sum(flat)
        for tensor, part in zip(summed, flat.split([tensor.numel() for tensor in summed]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def all_gather(self, part: Tensor) -> Tensor:
        """Concatenate the equally shaped parts ``[count, …]`` of all ranks into ``[world_size · count, …]``."""
        gathered = part.new_empty(self.world_size, part.numel())
        if self.shared_memory is None:
            _collective(dist.all_gather_into_tensor, gathered.view(-1), part.reshape(-1))
        else:
            shared = torch.frombuffer(self.shared_memory, dtype=part.dtype).view(self.world_size, -1)
            for chunk, target in zip(
                part.reshape(-1).split(shared.shape[1]), gathered.split(shared.shape[1], dim=1), strict=True
            ):
                shared[self.rank, : len(chunk)].copy_(chunk)
                self.barrier()
                target.copy_(shared[:, : len(chunk)])
                self.barrier()
        return gathered.view(-1, *part.shape[1:])

    def all_reduce_scalars(self, *values: float) -> list[float]:
        """Sum numbers over all ranks, in float64 on the host."""
        if self.world_size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        _collective(dist.all_reduce, numbers, group=self.cpu_group)
        return numbers.tolist()

    def all_reduce_max(self, value: float) -> float:
        """Return the largest ``value`` of all ranks, in float64 on the host."""
        if self.world_size == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64)
        _collective(dist.all_reduce, number, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return number.item()

    def all_reduce_async(self, flat: Tensor) -> Callable[[], Any]:
        """Start an in-place all-reduce of a vector; return a function that waits for it."""
        if self.shared_memory is None:
            return partial(_collective, _collective(dist.all_reduce, flat, async_op=True).wait)
        self._sum(flat)
        return lambda: None

    def _sum(self, flat: Tensor) -> None:
        if self.shared_memory is None:
            _collective(dist.all_reduce, flat)
            return
        shared = torch.frombuffer(self.shared_memory, dtype=flat.dtype).view(self.world_size, -1)
        for chunk in flat.split(shared.shape[1]):
            parts = shared[:, : len(chunk)]
            parts[self.rank].copy_(chunk)
            self.barrier()
            torch.sum(parts, dim=0, out=chunk)  # same order on all ranks, so results are bitwise equal
            self.barrier()

    def broadcast(self, value: Any) -> Any:
        """Return the main rank's ``value`` (plain data) on every rank."""
        if self.world_size == 1:
            return value
        holder = [value]
        _collective(dist.broadcast_object_list, holder, src=0, group=self.cpu_group)
        return holder[0]

    def broadcast_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the main rank's named tensors on every rank, in host memory; other ranks may pass {}."""
        if self.world_size == 1:
            return tensors
        shapes = self.broadcast({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
        received = {}
        for name, (shape, dtype) in shapes.items():
            tensor = tensors[name].detach().cpu().contiguous() if self.is_main else torch.empty(shape, dtype=dtype)
            _collective(dist.broadcast, tensor, src=0, group=self.cpu_group)
            received[name] = tensor
        return received

    def barrier(self) -> None:
        """Wait until every rank reaches this point."""
        if self.world_size > 1:
            _collective(dist.barrier, group=self.cpu_group)

    def wait_for_first(self, key: str) -> None:
        """Wait until the first rank of each machine reaches this point; polls, so there is no timeout.

        Raises:
            Stopped: the supervisor has ended.
        """
        self._poll_store(key, self.local_rank == 0, self.world_size // self.local_world_size)

    def wait_for_main(self, key: str) -> None:
        """Like ``wait_for_first``, but for the main rank only; each call needs a new ``key``."""
        self._poll_store(key, self.is_main, 1)

    def _poll_store(self, key: str, done: bool, count: int) -> None:
        if self.store is None:
            return
        if done:
            self.store.add(key, 1)
        while self.store.add(key, 0) < count:
            if parent_is_gone():
                raise Stopped(signal.SIGTERM)
            time.sleep(_POLL_SECONDS)

    def shorten_timeout(self, compiles: bool) -> None:
        """Lower the timeout of collectives to that of a step; call it once everything is compiled."""
        if self.world_size > 1:
            timeout = _COMPILED_STEP_TIMEOUT if compiles else _STEP_TIMEOUT
            for group in (dist.group.WORLD, self.cpu_group):
                dist.distributed_c10d._set_pg_timeout(timeout, group)

    def destroy(self) -> None:
        """Destroy the process group and restore the thread count, for the main rank's work after training."""
        if self.world_size > 1:
            dist.destroy_process_group()
            torch.set_num_threads(self.threads)


SINGLE_RANK = Ranks()


def init_ranks(device: str) -> Ranks:
    """Join the process group of the ranks that ``supervisor`` or ``torchrun`` started, if any.

    Raises:
        UserError: more processes than GPUs on this machine.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return SINGLE_RANK
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun --nproc_per_node started more processes than this machine has GPUs "
                f"({torch.cuda.device_count()}); start one per GPU"
            )
        torch.cuda.set_device(local_rank)
    folder, threads, shared_memory = os.environ.get(FOLDER_VARIABLE), torch.get_num_threads(), None
    # With teachers, each model has its own process group, and each group needs its own keys.
    store = dist.PrefixStore(f"model{next(_groups)}", _store(folder, world_size))
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT
    )
    cpu_group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if device == "cuda" else dist.group.WORLD
    if folder and device == "cpu":
        torch.set_num_threads(1)
        if MEMORY_VARIABLE in os.environ:
            shared_memory = mmap.mmap(int(os.environ[MEMORY_VARIABLE]), 0)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return Ranks(rank, world_size, cpu_group, local_rank, local_world_size, store, shared_memory, threads)


@cache
def _store(folder: str | None, world_size: int) -> dist.Store:
    """The key-value store of all process groups: a file for ranks started by the supervisor, else torchrun's."""
    store = dist.FileStore(str(Path(folder, "store")), world_size) if folder else next(rendezvous("env://"))[0]
    store.set_timeout(_TIMEOUT)
    return store


def _collective(operation: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return operation(*arguments, **options)
    except RuntimeError as error:
        raise _lost_connection(error) from None


def _lost_connection(error: Exception) -> TrainingError:
    """Build the error for a failed collective; a marker file tells the supervisor that another rank is the cause."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        Path(folder, f"lost.{os.environ['RANK']}").touch()
    said = printable(" ".join(str(error).split()))  # NCCL names the cause in its last lines
    return TrainingError(
        f"the processes of this run lost their connection ({said}); look for the error of the process that failed "
        "first, then restart all: they resume from the newest checkpoint"
    )
