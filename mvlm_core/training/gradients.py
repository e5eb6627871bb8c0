"""Gradients of a global batch, accumulated over micro-batches, which are halved if memory runs out, and over ranks."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mvlm_core.errors import COMPILATION_FAILED, TrainingError
from mvlm_core.signals import StopRequest
from mvlm_core.training.distillation import draw_teacher
from mvlm_core.training.distributed import Ranks
from mvlm_core.training.state import LoopState
from mvlm_core.training.task import Run, TrainingTask

BUCKET_BYTES = 25 * 1024**2  # of gradients that are all-reduced together
_LIBRARY_OUT_OF_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
log = logging.getLogger("mvlm")


class GradientAccumulator:
    """Accumulates the gradients of global batches, in micro-batches of ``LoopState.micro_batch`` sequences."""

    def __init__(self, run: Run, task: TrainingTask) -> None:
        self.task, self.hardware, self.ranks, self.seed = task, run.hardware, run.ranks, run.settings.seed
        self._reducer = GradientReducer(task.modules.values(), run.ranks) if run.ranks.world_size > 1 else None

    def find_micro_batch(self, state: LoopState, progress: float) -> None:
        """Halve the micro-batch until a trial pass before the first step fits in memory; nothing else is changed.

        Memory is reserved for optimizer state that does not exist yet and, with several ranks, for the all-reduce
        buckets.

        Raises:
            TrainingError: one sequence does not fit, or the model cannot be compiled.
        """
        optimizers = self.task.optimizers
        empty = not optimizers.state_tensors()
        if self._reducer is not None:  # NCCL allocates its own memory at the first all-reduce
            self.ranks.all_reduce([torch.zeros(1, device=self.hardware.device)])
        while True:
            reserved: list[Tensor] = []
            try:
                copies = 2 * empty + (self._reducer is not None)
                reserved = [torch.empty_like(p) for p in optimizers.parameters() for _ in range(copies)]
                self.run_micro_batch(state.step, 0, self.micro_batch_size(state), progress)
                return
            except RuntimeError as error:
                if not _out_of_memory(error):
                    _explain_failed_compilation(error)
                    raise
                reserved.clear()
            finally:
                optimizers.zero_grad()
            self._halve(state)

    def micro_batch_size(self, state: LoopState) -> int:
        """Number of sequences in this rank's first micro-batch of a step."""
        return min(state.micro_batch, len(self.ranks.shard(self.task.batches.batch_size)))

    def accumulate(self, state: LoopState, progress: float, stop: StopRequest) -> tuple[dict[str, Tensor], float, bool]:
        """Accumulate gradients over a step's global batch; return its metrics, text bytes, and whether to stop.

        A rank that runs out of memory halves its micro-batch and repeats the step. If it has already all-reduced some
        of its gradients, the other ranks must repeat the step as well.

        Raises:
            TrainingError: one sequence does not fit.
        """
        while True:
            try:
                metrics, text_bytes = self._own_shard(state, progress)
                failed = False
            except RuntimeError as error:
                if not _out_of_memory(error):
                    _explain_failed_compilation(error)
                    raise
                metrics, text_bytes, failed = {}, 0, True
            if failed:  # outside the except block, where the failed step's tensors have been freed
                self._halve(state)
                if self._reducer is None or not self._reducer.started:
                    continue
            if self._reducer is not None:
                self._reducer.finish()
            all_bytes, stopping, failures = self.ranks.all_reduce_scalars(text_bytes, stop.is_set(), failed)
            if not failures:
                self.ranks.all_reduce(metrics.values())
                return metrics, all_bytes, bool(stopping)
            self.task.optimizers.zero_grad()

    def extra_step_seconds(self, state: LoopState, clock: Callable[[], float]) -> float:
        """Average extra seconds of later steps over current ones, as loss terms switch on or off; changes no state."""
        count = self.micro_batch_size(state)

        def seconds(at_progress: float) -> float:
            started = clock()
            self.run_micro_batch(state.step, 0, count, at_progress)
            self.hardware.synchronize()
            return clock() - started

        points = (0.0, 0.125, 0.375, 0.625, 0.875)
        rounds = [[seconds(point) for point in points] for _ in range(3)]
        self.task.optimizers.zero_grad()
        first, *later = (min(times) for times in zip(*rounds, strict=True))
        return (sum(later) / len(later) - first) * -(-len(self.ranks.shard(self.task.batches.batch_size)) // count)

    def run_micro_batch(
        self, step: int, first: int, count: int, progress: float, last: bool = False
    ) -> tuple[dict[str, Tensor], int]:
        """Run forward and backward on one micro-batch; return its metrics and the UTF-8 bytes of its targets.

        Metrics are weighted by the micro-batch's share of the global batch.

        Args:
            first, count: range of sequences in the global batch.
            last: whether this is the rank's last micro-batch of the step, whose backward pass all-reduces gradients.
        """
        batches, device = self.task.batches, self.hardware.device
        batch = batches.batch(step, first, count)
        inputs, targets, weights = (_to_device(array, device) for array in (batch.inputs, batch.targets, batch.weights))
        torch.manual_seed(_micro_batch_seed(self.seed, step, first))
        share = count / batches.batch_size
        with self.hardware.autocast():
            loss = self.task.loss(inputs, targets, weights, progress, draw_teacher(self.task.teachers))
        if self._reducer is not None:
            self._reducer.prepare(last)
        (loss.total * share).backward()
        metrics = {"train_loss": loss.train_loss, **loss.parts}
        return {name: value.detach() * share for name, value in metrics.items()}, batch.text_bytes

    def _own_shard(self, state: LoopState, progress: float) -> tuple[dict[str, Tensor], int]:
        """Accumulate gradients over this rank's micro-batches; return summed metrics and text bytes."""
        sums: dict[str, Tensor] = {}
        text_bytes = 0
        shard = self.ranks.shard(self.task.batches.batch_size)
        for first in range(shard.start, shard.stop, state.micro_batch):
            count = min(state.micro_batch, shard.stop - first)
            metrics, size = self.run_micro_batch(state.step, first, count, progress, last=first + count == shard.stop)
            for name, value in metrics.items():
                sums[name] = sums[name] + value if name in sums else value
            text_bytes += size
        return sums, text_bytes

    def _halve(self, state: LoopState) -> None:
        self.task.optimizers.zero_grad()
        tried = self.micro_batch_size(state)
        if tried == 1:
            raise TrainingError(
                "out of memory with a micro-batch of one sequence: reduce --max_length, --hidden_dim or --num_layers"
            )
        state.micro_batch = -(-tried // 2)
        self.hardware.release()
        log.warning(
            f"out of memory: micro-batch halved to {state.micro_batch} sequences; "
            f"the global batch is still {self.task.batches.batch_size}"
        )


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, also while compiling (the compiler wraps its backend's error) or in a CUDA library."""
    error = getattr(error, "inner_exception", error)
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _LIBRARY_OUT_OF_MEMORY)


def _explain_failed_compilation(error: RuntimeError) -> None:
    """Raise TrainingError, with a way out, if ``error`` comes from the compiler."""
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    if isinstance(error, TorchDynamoException):
        inner = getattr(error, "inner_exception", error)
        reason = f"{type(inner).__name__}: {str(inner).strip()}".splitlines()[0]
        raise TrainingError(
            f"{COMPILATION_FAILED} ({reason}): to train without it, more slowly, add --no_compile"
        ) from error


def _to_device(array: Any, device: str) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor


def _micro_batch_seed(seed: int, step: int, first_sequence: int) -> int:
    """Distinct seed for each micro-batch (splitmix64's mixing, so that neighboring seeds are unrelated)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + first_sequence * 0x94D049BB133111EB) % 2**64
    mixed = (mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93 % 2**64
    return (mixed ^ (mixed >> 32)) % 2**63


# --- all-reduce over ranks, in buckets, overlapped with the backward pass -----------------------------------


class GradientReducer:
    """Sums the gradients over the ranks, bucket by bucket, while the last backward pass of a step is still running.

    Every rank all-reduces every bucket, in the same order, so none waits forever: if a parameter gets no gradient, or
    the backward pass runs out of memory, its bucket and those after it are left to ``finish``. Within a module, buckets
    follow the backward pass, which computes the gradients of the last parameters first.

    Gradients are summed, not averaged, because each micro-batch's loss is already weighted by its share of the global
    batch, so ranks may have shards of unequal size.

    Args:
        modules: every module with trainable weights; those that may get no gradient, last.
    """

    def __init__(self, modules: Iterable[nn.Module], ranks: Ranks) -> None:
        self._ranks = ranks
        self._buckets: list[list[nn.Parameter]] = []
        self._bucket_of: dict[Tensor, int] = {}
        self._missing: list[int] | None = None  # gradients that each bucket lacks; None unless summing
        self._sums: list[tuple[Tensor, Callable[[], Any]]] = []  # of the first buckets, with what waits for them
        this, size = weakref.ref(self), BUCKET_BYTES

        def count(parameter: Tensor) -> None:  # with a strong reference, it would keep the model alive after training
            if (reducer := this()) is not None:
                reducer._count(parameter)

        for parameter in dict.fromkeys(p for module in modules for p in reversed(list(module.parameters()))):
            if size >= BUCKET_BYTES:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(parameter)
            self._bucket_of[parameter] = len(self._buckets) - 1
            size += parameter.nbytes
            parameter.register_post_accumulate_grad_hook(count)

    @property
    def started(self) -> bool:
        """Whether gradients of the current step have been all-reduced, so that other ranks count on this one."""
        return bool(self._sums)

    def prepare(self, last: bool) -> None:
        """Call this before each backward pass; only the step's ``last`` one all-reduces gradients."""
        self._missing, self._sums = [len(bucket) for bucket in self._buckets] if last else None, []

    def finish(self) -> None:
        """All-reduce the remaining buckets and wait for all: the gradients are then the sums."""
        while len(self._sums) < len(self._buckets):
            self._start()
        for _, wait in self._sums:
            wait()
        self.prepare(last=False)

    def _count(self, parameter: Tensor) -> None:
        if self._missing is None:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        while len(self._sums) < len(self._buckets) and not self._missing[len(self._sums)]:
            self._start()

    def _start(self) -> None:
        bucket = self._buckets[len(self._sums)]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            if parameter.grad is not None:
                parameter.grad = part.view_as(parameter)  # instead of a second copy
        self._sums.append((flat, self._ranks.all_reduce_async(flat)))
