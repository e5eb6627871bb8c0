"""A running average of the weights: what is evaluated and exported where a run asks for it.

While the learning rate is high the weights circle around where they would settle; their average is closer to it
(Polyak & Juditsky 1992). Once the rate has fallen to zero there is nothing left to average.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of a module's parameters, in their own precision.

    Args:
        decay: of the average a step, in (0, 1); smaller in the first steps, so that the start is forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        named = dict(module.named_parameters())
        self.decay, self._names = decay, list(named)
        self._parameters = list(named.values())
        self._average = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step ``step`` (from 1)."""
        decay = min(self.decay, step / (10 + step))
        torch._foreach_lerp_(self._average, self._parameters, 1 - decay)

    @contextmanager
    def in_module(self) -> Iterator[None]:
        """The module has the averaged weights inside, its own again afterwards."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        self.put_in_module()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, own)

    @torch.no_grad()
    def put_in_module(self) -> None:
        torch._foreach_copy_(self._parameters, self._average)

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights by the parameters' names."""
        return dict(zip(self._names, self._average, strict=True))

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take back what ``tensors`` gave.

        Raises:
            ValueError: other names or shapes.
        """
        if tensors.keys() != set(self._names):
            raise ValueError("the averaged weights are missing or of another model")
        for name, mine in zip(self._names, self._average, strict=True):
            if tensors[name].shape != mine.shape:
                raise ValueError(f"averaged weight {name} has shape {list(tensors[name].shape)}")
            mine.copy_(tensors[name])
