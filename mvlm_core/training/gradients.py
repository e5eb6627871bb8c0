"""Gradients of a global batch, accumulated over micro-batches, which are halved if memory runs out, and over ranks."""

# No `from __future__ import annotations`: DDP reads a hook's annotations as types.
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mvlm_core.errors import TrainingError
from mvlm_core.signals import StopRequest
from mvlm_core.training.distillation import draw_teacher
from mvlm_core.training.distributed import Ranks, lost_connection
from mvlm_core.training.state import LoopState
from mvlm_core.training.task import Run, TrainingTask

BUCKET_MB = 25  # of gradients that are all-reduced together
_LIBRARY_OUT_OF_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
log = logging.getLogger("mvlm")


class GradientAccumulator:
    """Accumulates the gradients of global batches, in micro-batches of ``LoopState.micro_batch`` sequences."""

    def __init__(self, run: Run, task: TrainingTask) -> None:
        self.task, self.hardware, self.ranks, self.seed = task, run.hardware, run.ranks, run.settings.seed
        self._unused_parameters: frozenset[Tensor] = frozenset()  # they get no gradient
        self._sync: GradientSync | None = None  # None with a single rank

    def find_micro_batch(self, state: LoopState, progress: float) -> None:
        """Halve the micro-batch until a trial pass before the first step fits in memory; nothing else is changed.

        Memory is reserved for optimizer state that does not exist yet and, with several ranks, for the all-reduce
        buckets. The trial also reveals which parameters get no gradient.

        Raises:
            TrainingError: one sequence does not fit, or the model cannot be compiled.
        """
        optimizers = self.task.optimizers
        empty = not optimizers.state_tensors()
        while True:
            reserved: list[Tensor] = []
            try:
                copies = 2 * empty + (self.ranks.world_size > 1)
                reserved = [torch.empty_like(p) for p in optimizers.parameters() for _ in range(copies)]
                self.micro_batch(state.step, 0, self.sequences(state), progress)
                without = {p for p in optimizers.parameters() if p.grad is None}
                # Not those that are unused for now only: a rollback may return to steps that use them.
                self._unused_parameters = frozenset(without.difference(self.task.unused_parameters(progress)))
                return
            except RuntimeError as error:
                if not _out_of_memory(error):
                    _explain_failed_compilation(error)
                    raise
                reserved.clear()
            finally:
                optimizers.zero_grad()
            self._halve(state)

    def sequences(self, state: LoopState) -> int:
        """Number of sequences in this rank's first micro-batch of a step."""
        return min(state.micro_batch, len(self.ranks.shard(self.task.batches.sequences)))

    def accumulate(self, state: LoopState, progress: float, stop: StopRequest) -> tuple[dict[str, Tensor], float, bool]:
        """Accumulate gradients over a step's global batch; return its metrics, text bytes, and whether to stop.

        A rank that runs out of memory halves its micro-batch and repeats the step. If it has already all-reduced some
        of its gradients, the other ranks must repeat the step as well.

        Raises:
            TrainingError: one sequence does not fit.
        """
        while True:
            self._prepare_sync(progress)
            try:
                metrics, text_bytes = self._own_shard(state, progress)
                failed = False
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                metrics, text_bytes, failed = {}, 0, True
            if failed:  # outside the except block, where the failed step's tensors have been freed
                self._halve(state)
                if self._sync is None or not self._sync.all_reducing:
                    continue
                self._sync.finish_all_reduce()
            all_bytes, stopping, failures = self.ranks.sum_numbers(text_bytes, stop.is_set(), failed)
            if not failures:
                self.ranks.sum_on_device(metrics.values())
                return metrics, all_bytes, bool(stopping)
            self.task.optimizers.zero_grad()
            self._close_sync()

    def extra_step_seconds(self, state: LoopState, clock: Callable[[], float]) -> float:
        """Average extra seconds of later steps over current ones, as loss terms switch on or off; changes no state."""
        count = self.sequences(state)

        def seconds(at_progress: float) -> float:
            started = clock()
            self.micro_batch(state.step, 0, count, at_progress)
            self.hardware.synchronize()
            return clock() - started

        points = (0.0, 0.125, 0.375, 0.625, 0.875)
        rounds = [[seconds(point) for point in points] for _ in range(3)]
        self.task.optimizers.zero_grad()
        first, *later = (min(times) for times in zip(*rounds, strict=True))
        return (sum(later) / len(later) - first) * -(-len(self.ranks.shard(self.task.batches.sequences)) // count)

    def micro_batch(
        self, step: int, first: int, count: int, progress: float, last: bool = False
    ) -> tuple[dict[str, Tensor], int]:
        """Run forward and backward on one micro-batch; metrics are weighted by its share of the global batch.

        Args:
            first, count: range of sequences in the global batch.
            last: whether this is the rank's last micro-batch of the step, whose backward pass all-reduces gradients.
        """
        batches, device = self.task.batches, self.hardware.device
        batch = batches.batch(step, first, count)
        inputs, targets, weights = (_to_device(array, device) for array in (batch.inputs, batch.targets, batch.weights))
        torch.manual_seed(_micro_batch_seed(self.seed, step, first))
        share = count / batches.sequences
        score = self.task.loss if self._sync is None else self._sync.loss
        with nullcontext() if self._sync is None else self._sync.micro_batch(last):
            with self.hardware.autocast():
                loss = score(inputs, targets, weights, progress, draw_teacher(self.task.teachers))
            (loss.total * share).backward()
        metrics = {"train_loss": loss.train_loss, **loss.parts}
        return {name: value.detach() * share for name, value in metrics.items()}, batch.text_bytes

    def _own_shard(self, state: LoopState, progress: float) -> tuple[dict[str, Tensor], int]:
        """Accumulate gradients over this rank's micro-batches; return summed metrics and text bytes."""
        sums: dict[str, Tensor] = {}
        text_bytes = 0
        shard = self.ranks.shard(self.task.batches.sequences)
        for first in range(shard.start, shard.stop, state.micro_batch):
            count = min(state.micro_batch, shard.stop - first)
            metrics, size = self.micro_batch(state.step, first, count, progress, last=first + count == shard.stop)
            for name, value in metrics.items():
                sums[name] = sums[name] + value if name in sums else value
            text_bytes += size
        return sums, text_bytes

    def _prepare_sync(self, progress: float) -> None:
        """With several ranks, set up the gradient all-reduce for the parameters that currently get a gradient."""
        if self.ranks.world_size == 1:
            return
        unused = self._unused_parameters.union(self.task.unused_parameters(progress))
        if self._sync is not None and self._sync.unused_parameters != unused:
            self._close_sync()
        if self._sync is None:
            self._sync = GradientSync(self.task.modules, self.task.loss, self.ranks, unused)

    def _close_sync(self) -> None:
        if self._sync is not None:
            self._sync.close()
            self._sync = None

    def _halve(self, state: LoopState) -> None:
        self.task.optimizers.zero_grad()
        tried = self.sequences(state)
        if tried == 1:
            raise TrainingError(
                "out of memory with a micro-batch of one sequence: reduce --max_length, --hidden_dim or --num_layers"
            )
        state.micro_batch = -(-tried // 2)
        self.hardware.release()
        log.warning(
            f"out of memory: micro-batch halved to {state.micro_batch} sequences; "
            f"the global batch is still {self.task.batches.sequences}"
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
            f"torch.compile failed ({reason}): to train without it, more slowly, add --no_compile"
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


class _WholeLoss(nn.Module):
    """Wraps a loss and all modules it uses in one module, as DistributedDataParallel requires."""

    def __init__(self, modules: dict[str, nn.Module], loss: Callable[..., Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(modules)
        self.loss = loss

    def forward(self, *inputs: Any) -> Any:
        return self.loss(*inputs)


class _Buckets:
    """All-reduces the buckets of one backward pass and counts them."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.done = ranks, 0

    def sum(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.done += 1
        return self.ranks.start_sum(bucket.buffer())


class GradientSync:
    """Wraps a loss in ``DistributedDataParallel``; the last backward pass of a step sums the gradients over the ranks.

    Gradients are summed, not averaged, because each micro-batch's loss is already weighted by its share of the global
    batch, so ranks may have shards of unequal size.

    Args:
        modules: every module with trainable weights.
        unused_parameters: those that get no gradient, for which DDP would wait forever.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        loss: Callable[..., Any],
        ranks: Ranks,
        unused_parameters: frozenset[Tensor],
    ) -> None:
        self.unused_parameters, self.buckets = unused_parameters, _Buckets(ranks)
        self.all_reducing = False  # whether the micro-batch that sums the gradients is in progress
        whole = _WholeLoss(modules, loss)
        ignored = [name for name, parameter in whole.named_parameters() if parameter in unused_parameters]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(whole, ignored)
        # All ranks hold the same weights already (`TrainingLoop._resume`), and no module has buffers that change.
        self._ddp = DistributedDataParallel(
            whole, init_sync=False, forward_sync_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MB
        )
        self._ddp.register_comm_hook(self.buckets, _Buckets.sum)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Wrap a micro-batch's ``loss`` and backward pass; only the ``last`` one sums the gradients."""
        self.buckets.done, self.all_reducing = 0, last
        try:
            with nullcontext() if last else self._ddp.no_sync():
                yield
        except dist.DistBackendError as error:
            raise lost_connection(error) from None
        self.all_reducing = False

    def loss(self, *inputs: Any) -> Any:
        return self._ddp(*inputs)

    def finish_all_reduce(self) -> None:
        """After a micro-batch failed midway, all-reduce zeros for the remaining buckets, so that no other rank hangs.

        The gradients and this object are then unusable: all ranks repeat the step with a new ``GradientSync``.
        """
        for bucket in self._ddp.reducer._get_zeros_like_grad_buckets()[self.buckets.done :]:
            self.buckets.sum(bucket).wait()

    def close(self) -> None:
        """Remove the autograd hooks."""
        self._ddp.reducer._remove_autograd_hooks()
