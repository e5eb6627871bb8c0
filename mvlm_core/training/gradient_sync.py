"""Gradient all-reduce in buckets, overlapped with the backward pass."""

# No `from __future__ import annotations`: DDP reads a hook's annotations as types.
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mvlm_core.training.distributed import Ranks, lost_connection

BUCKET_MB = 25


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
    batch, so ranks may have parts of unequal size.

    Args:
        modules: every module with trainable weights.
        idle: parameters that get no gradient, for which DDP would wait forever.
    """

    def __init__(
        self, modules: dict[str, nn.Module], loss: Callable[..., Any], ranks: Ranks, idle: frozenset[Tensor]
    ) -> None:
        self.idle, self.buckets = idle, _Buckets(ranks)
        self.exchanging = False  # whether the micro-batch that sums the gradients is in progress
        whole = _WholeLoss(modules, loss)
        ignored = [name for name, parameter in whole.named_parameters() if parameter in idle]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(whole, ignored)
        # All ranks hold the same weights already (`TrainingLoop._resume`), and no module has buffers that change.
        self._ddp = DistributedDataParallel(
            whole, init_sync=False, forward_sync_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MB
        )
        self._ddp.register_comm_hook(self.buckets, _Buckets.sum)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Wrap a micro-batch's ``loss`` and backward pass; only the ``last`` one sums the gradients."""
        self.buckets.done, self.exchanging = 0, last
        try:
            with nullcontext() if last else self._ddp.no_sync():
                yield
        except dist.DistBackendError as error:
            raise lost_connection(error) from None
        self.exchanging = False

    def loss(self, *inputs: Any) -> Any:
        return self._ddp(*inputs)

    def finish_exchange(self) -> None:
        """After a micro-batch failed midway, all-reduce zeros for the remaining buckets, so that no other rank hangs.

        The gradients and this object are then unusable: all ranks repeat the step with a new ``GradientSync``.
        """
        for bucket in self._ddp.reducer._get_zeros_like_grad_buckets()[self.buckets.done :]:
            self.buckets.sum(bucket).wait()

    def close(self) -> None:
        """Remove the autograd hooks."""
        self._ddp.reducer._remove_autograd_hooks()
