"""Gradients of a global batch, accumulated over micro-batches, which are halved if memory runs out, and over ranks."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mvlm_core.errors import TrainingFailed
from mvlm_core.signals import StopRequest
from mvlm_core.training.distillation import teacher_of_step
from mvlm_core.training.gradient_sync import GradientSync
from mvlm_core.training.state import LoopState
from mvlm_core.training.task import Run, TrainingTask

log = logging.getLogger("mvlm")


class GradientAccumulator:
    """Accumulates the gradients of global batches, in micro-batches of ``LoopState.micro_batch`` sequences."""

    def __init__(self, run: Run, task: TrainingTask) -> None:
        self.task, self.hardware, self.ranks, self.seed = task, run.hardware, run.ranks, run.settings.seed
        self._unused: frozenset[Tensor] = frozenset()  # parameters that get no gradient
        self._sync: GradientSync | None = None  # None with a single rank

    def find_micro_batch(self, state: LoopState, share_done: float) -> None:
        """Halve the micro-batch until a trial pass before the first step fits in memory; nothing else is changed.

        Memory is reserved for optimizer state that does not exist yet and, with several ranks, for the all-reduce
        buckets. The trial also reveals which parameters get no gradient.

        Raises:
            TrainingFailed: one sequence does not fit.
        """
        optimizers = self.task.optimizers
        empty = not optimizers.state_tensors()
        while True:
            reserved: list[Tensor] = []
            try:
                copies = 2 * empty + (self.ranks.world > 1)
                reserved = [torch.empty_like(p) for p in optimizers.parameters() for _ in range(copies)]
                self.micro_batch(state.step, 0, self.sequences(state), share_done)
                self._unused = frozenset(p for p in optimizers.parameters() if p.grad is None)
                return
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                reserved.clear()
            finally:
                optimizers.zero_grad()
            self._halve(state)

    def sequences(self, state: LoopState) -> int:
        """Number of sequences in this rank's first micro-batch of a step."""
        return min(state.micro_batch, len(self.ranks.part(self.task.batches.sequences)))

    def accumulate(
        self, state: LoopState, share_done: float, stop: StopRequest
    ) -> tuple[dict[str, Tensor], float, bool]:
        """Accumulate gradients over a step's global batch; return its metrics, text bytes, and whether to stop.

        A rank that runs out of memory halves its micro-batch and repeats the step. If it has already all-reduced some
        of its gradients, the other ranks must repeat the step as well.

        Raises:
            TrainingFailed: one sequence does not fit.
        """
        while True:
            self._prepare_sync(share_done)
            try:
                metrics, text_bytes = self._own_part(state, share_done)
                failed = False
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                metrics, text_bytes, failed = {}, 0, True
            if failed:  # outside the except block, where the failed step's tensors have been freed
                self._halve(state)
                if self._sync is None or not self._sync.exchanging:
                    continue
                self._sync.finish_exchange()
            all_bytes, stopping, failures = self.ranks.sum_numbers(text_bytes, stop.is_set(), failed)
            if not failures:
                self.ranks.sum_on_device(metrics.values())
                return metrics, all_bytes, bool(stopping)
            self.task.optimizers.zero_grad()
            self._close_sync()

    def micro_batch(
        self, step: int, first: int, count: int, share_done: float, last: bool = False
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
                loss = score(inputs, targets, weights, share_done, teacher_of_step(self.task.teachers))
            (loss.total * share).backward()
        metrics = {"train_loss": loss.train_loss, **loss.parts}
        return {name: value.detach() * share for name, value in metrics.items()}, batch.text_bytes

    def _own_part(self, state: LoopState, share_done: float) -> tuple[dict[str, Tensor], int]:
        """Accumulate gradients over this rank's micro-batches; return summed metrics and text bytes."""
        sums: dict[str, Tensor] = {}
        text_bytes = 0
        part = self.ranks.part(self.task.batches.sequences)
        for first in range(part.start, part.stop, state.micro_batch):
            count = min(state.micro_batch, part.stop - first)
            metrics, size = self.micro_batch(state.step, first, count, share_done, last=first + count == part.stop)
            for name, value in metrics.items():
                sums[name] = sums[name] + value if name in sums else value
            text_bytes += size
        return sums, text_bytes

    def _prepare_sync(self, share_done: float) -> None:
        """With several ranks, set up the gradient all-reduce for the parameters that currently get a gradient."""
        if self.ranks.world == 1:
            return
        idle = self._unused.union(self.task.idle(share_done))
        if self._sync is not None and self._sync.idle != idle:
            self._close_sync()
        if self._sync is None:
            self._sync = GradientSync(self.task.modules, self.task.loss, self.ranks, idle)

    def _close_sync(self) -> None:
        if self._sync is not None:
            self._sync.close()
            self._sync = None

    def _halve(self, state: LoopState) -> None:
        self.task.optimizers.zero_grad()
        if state.micro_batch == 1:
            raise TrainingFailed(
                "out of memory with a micro-batch of one sequence: reduce --max_length, --hidden_dim or --num_layers"
            )
        state.micro_batch = -(-state.micro_batch // 2)
        self.hardware.release()
        log.warning(
            f"out of memory: micro-batch halved to {state.micro_batch} sequences; "
            f"the global batch is still {self.task.batches.sequences}"
        )


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, also while compiling: the compiler wraps its backend's error."""
    return isinstance(getattr(error, "inner_exception", error), torch.OutOfMemoryError)


def _to_device(array: Any, device: str) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor


def _micro_batch_seed(seed: int, step: int, first_sequence: int) -> int:
    """Distinct seed for each micro-batch (splitmix64's mixing, so that neighbouring seeds are unrelated)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + first_sequence * 0x94D049BB133111EB) % 2**64
    mixed = (mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93 % 2**64
    return (mixed ^ (mixed >> 32)) % 2**63
