"""Evaluation results: a mean with its standard error, conversion to JSON, and the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import reduce
from operator import getitem
from typing import Any

import numpy as np

from mvlm_core.settings import Sampling

SAMPLING = Sampling(temperature=1.0, top_p=0.95)  # of the suite's sampled continuations; exports use DEFAULT_SAMPLING
MISSING = "–"
# What the rows of the table mean, by the first words of their labels.
DEFINITIONS = {
    "±": "standard error over samples",
    "calibration error (ECE)": "how far the model's confidence, the probability of its most likely next token, is from "
    "its accuracy on average; 0 is ideal",
    "last word": "share of verses whose last word is predicted exactly, from all the text before it (full context) or "
    "the rest of the verse alone (verse only)",
    "training verses, expected share seen": "share of the training verses compared here that the model has seen",
    "second half exact": "share of verses whose second half is reproduced word for word, given the first half",
    "common prefix, longest match": "share of the second half's words reproduced, from its start or in the longest run",
    "memorized (difference)": "train minus held out: what is reproduced because it was seen in training",
    "rep-4": "share of a continuation's four-word sequences that repeat earlier ones; ideal: as in the reference text",
    "distinct-2": "share of distinct two-word sequences in all continuations; ideal: as in the reference text",
    "greedy, sampled": "the continuation takes the most likely token each time, or draws one at random",
    "pairs": "share of verses that are more likely than the same verse with one wrong word form",
}


@dataclass(frozen=True)
class Mean:
    """Mean of ``count`` values with its standard error (NaN for fewer than two), treating them as independent."""

    value: float
    error: float
    count: int

    def __sub__(self, other: Mean) -> Mean:
        """Difference between the means of two independent samples; ``count`` is the smaller of the two."""
        return Mean(self.value - other.value, math.hypot(self.error, other.error), min(self.count, other.count))


def mean(values: Sequence[float]) -> Mean:
    """Mean of a sample. If all values are 0 or 1, the error is that of Agresti and Coull (1998), with two successes and
    two failures added: the usual one is 0 if all outcomes agree."""
    array = np.asarray(values, dtype=np.float64)
    count, error = len(array), math.nan
    if count > 1 and ((array == 0) | (array == 1)).all():
        adjusted = (float(array.sum()) + 2) / (count + 4)
        error = math.sqrt(adjusted * (1 - adjusted) / (count + 4))
    elif count > 1:
        error = float(array.std(ddof=1)) / math.sqrt(count)
    return Mean(float(array.mean()) if count else math.nan, error, count)


def choice_point(scores: Sequence[float], answer: int) -> float:
    """Credit for a choice: 1 if ``answer`` has the highest score, divided among ties (relative difference up to
    1e-6), otherwise 0."""
    best = max(scores)
    winners = [number for number, score in enumerate(scores) if math.isclose(score, best, rel_tol=1e-6)]
    return (answer in winners) / len(winners)


def as_json(value: Any) -> Any:
    """Convert dataclasses to dictionaries and non-finite numbers to None; a ``Mean`` has "value", "error", "count"."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: as_json(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def share(mean: dict[str, Any], sign: str = "") -> str:
    """Format a mean as a percentage with its standard error."""
    if mean["value"] is None:
        return MISSING
    error = "" if mean["error"] is None else f" ± {mean['error']:.1%}"
    return f"{mean['value']:{sign}.1%}{error}"


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """Table rows for the results of ``suite.evaluate``: metric, value of the held-out text, one value per model.

    Rows without any value are left out.
    """
    table: list[list[str]] = []
    if not results:
        return table
    first = results[0]

    def cell(value: Any, form: str) -> str:
        if isinstance(value, dict):
            return share(value, form)
        return MISSING if value is None else format(value, form)

    def row(label: str, *keys: str, form: str = "", text: str = "") -> None:
        table.append([label, text, *(cell(reduce(getitem, keys, result), form) for result in results)])

    if all("bits_per_byte" in result for result in results):
        row("bits per byte", "bits_per_byte", "all", form=".4f")
        for part in ("books", "translations"):
            for name in first["bits_per_byte"][part]:
                row(f"· {name}", "bits_per_byte", part, name, form=".4f")
    row("calibration error (ECE)", "calibration", "error", form=".2%")
    row("· mean confidence", "calibration", "confidence", form=".2%")
    row("· accuracy, next token", "calibration", "accuracy", form=".2%")
    row("last word, full context", "cloze", "full")
    row("last word, verse only", "cloze", "alone")
    row("training verses, expected share seen", "memorization", "read", form=".1%")
    for key, label in (("exact", "second half exact"), ("prefix", "common prefix"), ("longest", "longest match")):
        row(f"{label}, train", "memorization", "train", key)
        row(f"{label}, held out", "memorization", "held_out", key)
        row("· memorized (difference)", "memorization", "difference", key, form="+")
    text = first["repetition"]["reference"]
    sampled = f"sampled (temperature {SAMPLING.temperature:g}, top-p {SAMPLING.top_p:g})"
    for decoding, name in (("greedy", "greedy"), ("sampled", sampled)):
        for label, key, form in (("rep-4", "rep_4", ""), ("distinct-2", "distinct_2", ".1%")):
            row(f"{label}, {name}", "repetition", decoding, key, form=form, text=cell(text[key], form))
    for rule, accuracy in first["pairs"].items():
        row(f"{rule} ({accuracy['count']} pairs)", "pairs", rule)
    return [cells for cells in table if {*cells[1:]} - {"", MISSING}]
