"""Gradients summed over the ranks, bucket by bucket while the backward pass still runs."""

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
    """A loss and every module that it uses, as the one module whose forward pass gives what is minimised."""

    def __init__(self, modules: dict[str, nn.Module], loss: Callable[..., Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(modules)
        self.loss = loss

    def forward(self, *inputs: Any) -> Any:
        return self.loss(*inputs)


class _Buckets:
    """Sums the buckets of one backward pass and counts them."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.done = ranks, 0

    def sum(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.done += 1
        return self.ranks.start_sum(bucket.buffer())


class GradientSync:
    """A loss, in ``DistributedDataParallel``, whose last backward pass in a step sums the gradients over the ranks.

    They are sums and not means, because each micro-batch's loss is weighted by its share of the whole batch already: so
    ranks may have parts of different lengths.

    Args:
        modules: every module with weights to train.
        idle: parameters that get no gradient; DDP would wait for it for ever.
    """

    def __init__(
        self, modules: dict[str, nn.Module], loss: Callable[..., Any], ranks: Ranks, idle: frozenset[Tensor]
    ) -> None:
        self.idle, self.buckets = idle, _Buckets(ranks)
        self.exchanging = False  # the micro-batch whose backward pass sums the gradients has begun and not ended
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
        """Around a micro-batch's ``loss`` and backward pass: after the ``last`` one the gradients are sums."""
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
        """After a micro-batch that failed half-way: exchange zeros for the rest, so that no other rank hangs.

        The sums are useless then, and this object as well: all ranks start the step again with a new one.
        """
        for bucket in self._ddp.reducer._get_zeros_like_grad_buckets()[self.buckets.done :]:
            self.buckets.sum(bucket).wait()

    def close(self) -> None:
        """The parameters' gradients are no longer watched."""
        self._ddp.reducer._remove_autograd_hooks()
