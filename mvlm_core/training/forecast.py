"""Forecast of a run's validation score from smaller models trained on a similar amount of text per parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

TEXT_PER_PARAMETER = (0.4, 0.8)  # bytes; 0.5 where the laws were measured, 0.6 in the h200 preset
UNIT_EPOCHS = 3.0  # the unit of compute: training one model, without teachers, for this long
HOURS = (0.1, 1, 6)  # of training one of the two models


@dataclass(frozen=True)
class Forecast:
    """Validation bits per byte, plus or minus ``error``."""

    bits_per_byte: float
    error: float

    def __str__(self) -> str:
        return f"{self.bits_per_byte:.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class ScalingLaw:
    """Validation scores of small versions of a model, measured by ``benchmarks/experiments/data_constrained.py``.

    Attributes:
        scores: (parameters, bits per byte) of three sizes, ascending, trained without teachers on a text of
            proportional size for as long as they improve.
        score_ratios: (compute, score relative to a model without teachers) of students, ascending. Compute includes the
            teachers, in units of training one model for ``UNIT_EPOCHS``: the first is (1, 1).
        ratio_error: how much the relative scores differ between sizes.
        reached: (size, bits per byte): what a much smaller model reaches on as much text as a model of this size has,
            by ``TEXT_PER_PARAMETER``. Models from this size on should score no worse.
    """

    scores: tuple[tuple[int, float], tuple[int, float], tuple[int, float]]
    score_ratios: tuple[tuple[float, float], ...]
    ratio_error: float
    reached: tuple[int, float]

    def forecast(self, parameters: int, compute: float) -> Forecast:
        """Extrapolate to a size; compute beyond the largest measured value is assumed to bring no further gain.

        The score is midway between a power law without a floor through the two larger sizes and one with a floor
        through all, or what has been ``reached`` if that is lower; the error is half their difference.
        """
        ratio, (middle, largest) = self._ratio(compute), self.scores[1:]
        low, high = (ratio * power_law(middle, largest, parameters, floor) for floor in (0.0, self.floor()))
        size, reached = self.reached
        if parameters >= size:
            high = max(low, min(high, reached))
        score = (low + high) / 2
        return Forecast(score, math.hypot((high - low) / 2, self.ratio_error * score))

    def floor(self) -> float:
        """Irreducible loss, in bits per byte, of the power law through all sizes; 0 if the scores show no floor."""
        smallest, middle, (size, score) = self.scores
        low, high = 0.0, score
        for _ in range(60):  # bisection: the predicted score at the largest size increases with the floor
            floor = (low + high) / 2
            too_low = power_law(smallest, middle, size, floor) < score
            low, high = (floor, high) if too_low else (low, floor)
        return low if low > 1e-9 else 0.0

    def relative_error(self) -> float:
        """Relative error at the largest size of the power law through the two smaller ones."""
        smallest, middle, (size, score) = self.scores
        return power_law(smallest, middle, size) / score - 1

    def describe(self, parameters: int, seconds: float, unit_seconds: float) -> list[str]:
        """Format the expected scores of a run, and of runs of other lengths, as lines of text.

        Args:
            seconds: duration of the run, including its teachers.
            unit_seconds: seconds to train one model, without teachers, for ``UNIT_EPOCHS``.
        """
        lengths = {"this run": seconds} | {f"{hours:g} h": hours * 3600 for hours in HOURS}
        said = [
            f"{self.forecast(parameters, length / unit_seconds)} ({name})"
            for name, length in lengths.items()
            if length >= unit_seconds
        ]
        measured = f"extrapolated from models of up to {self.scores[-1][0] / 1e6:.1f} M parameters"
        check = f"the smaller sizes predict the largest with an error of {self.relative_error():+.1%}"
        expected = f"expected bits per byte on the validation books: {', '.join(said)}"
        return [expected, f"  {measured}; {check}"] if said else []

    def _ratio(self, compute: float) -> float:
        """Interpolate the score ratio linearly in the logarithm of compute."""
        measured, ratios = zip(*self.score_ratios, strict=True)
        return float(np.interp(math.log(compute), np.log(measured), ratios))


def power_law(first: tuple[int, float], second: tuple[int, float], size: int, floor: float = 0.0) -> float:
    """Score at ``size`` of the power law with this floor through two (size, score) points."""
    start, ratio = first[1] - floor, (second[1] - floor) / (first[1] - floor)
    return floor + start * ratio ** _steps(first, second, size)


def _steps(first: tuple[int, float], second: tuple[int, float], size: int) -> float:
    """Distance of ``size`` from ``first`` in log size, in units of the distance of ``second`` from ``first``."""
    return math.log(size / first[0]) / math.log(second[0] / first[0])
