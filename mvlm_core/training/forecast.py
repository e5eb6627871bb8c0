"""Forecast of a run's validation score from runs at smaller sizes with as much text per parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

TEXT_PER_PARAMETER = (0.4, 0.8)  # bytes; 0.5 where the laws were measured, 0.6 in the h200 preset
HOURS = (0.1, 1, 6)  # of training one of the two models


@dataclass(frozen=True)
class Forecast:
    """Validation bits per byte, more or less ``error``."""

    bits_per_byte: float
    error: float

    def __str__(self) -> str:
        return f"{self.bits_per_byte:.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class Law:
    """Scores of small versions of a model, measured by ``benchmarks/experiments/data_constrained.py``.

    Attributes:
        scores: (parameters, bits per byte) of three sizes, in order, trained alone for ``ALONE_EPOCHS`` on a text of
            proportional size.
        gains: (compute, score in relation to a model trained alone) of students, in order. Compute includes their
            teachers' and is in multiples of that of a model trained alone: the first is (1, 1).
        gain_error: how much the latter differs between sizes.
    """

    scores: tuple[tuple[int, float], tuple[int, float], tuple[int, float]]
    gains: tuple[tuple[float, float], ...]
    gain_error: float

    def forecast(self, parameters: int, compute: float) -> Forecast:
        """Extrapolate to a size; more compute than the largest measured one is taken to gain nothing.

        The result is midway between a power law through the two largest sizes and a parabola through all three in the
        logarithms of size and score; the error is the distance between these.
        """
        (x1, y1), (x2, y2), (x3, y3) = ((math.log(size), math.log(score)) for size, score in self.scores)
        x, slope = math.log(parameters), (y3 - y2) / (x3 - x2)
        bend = (slope - (y2 - y1) / (x2 - x1)) / (x3 - x1) * (x - x3) * (x - x2)
        gain = self._gain(compute)
        score = math.exp(y3 + slope * (x - x3) + bend / 2) * gain
        return Forecast(score, score * math.hypot(bend, self.gain_error / gain))

    def relative_error(self) -> float:
        """Relative error at the largest size of the power law through the two smaller ones."""
        (size1, score1), (size2, score2), (size3, score3) = self.scores
        return score2 * (score2 / score1) ** (math.log(size3 / size2) / math.log(size2 / size1)) / score3 - 1

    def describe(self, parameters: int, seconds: float, alone: float) -> list[str]:
        """Describe in lines of text what to expect of a run and of others by their length.

        Args:
            seconds: of the run, with its teachers.
            alone: seconds of a model alone, trained for ``ALONE_EPOCHS``.
        """
        lengths = {"this run": seconds} | {f"{hours:g} h": hours * 3600 for hours in HOURS}
        said = [
            f"{self.forecast(parameters, length / alone)} ({name})"
            for name, length in lengths.items()
            if length >= alone
        ]
        measured = f"extrapolated from {self.scores[-1][0] / 1e6:.1f} M parameters and less"
        check = f"the smaller sizes predict the largest with an error of {self.relative_error():+.1%}"
        expected = f"expected bits per byte on the validation books: {', '.join(said)}"
        return [expected, f"  {measured}; {check}"] if said else []

    def _gain(self, compute: float) -> float:
        """Interpolate linearly in the logarithm of compute."""
        for (low, first), (high, second) in pairwise(self.gains):
            if compute <= high:
                return first + (second - first) * max(0.0, math.log(compute / low)) / math.log(high / low)
        return self.gains[-1][1]
