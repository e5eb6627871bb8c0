"""A mean with its standard error: what the evaluations report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mean:
    """A mean of ``count`` values and its standard error (NaN for fewer than two), as if they were independent."""

    value: float
    error: float
    count: int

    def __sub__(self, other: Mean) -> Mean:
        """The difference of two means of independent samples; ``count`` is the smaller one."""
        return Mean(self.value - other.value, math.hypot(self.error, other.error), min(self.count, other.count))


def mean(values: Sequence[float]) -> Mean:
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return Mean(float(array.mean()) if len(array) else math.nan, error, len(array))
