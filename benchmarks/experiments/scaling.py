"""Scaling: how the best learning rate depends on width, batch size and amount of text, and what loss to expect.

    python -m benchmarks.experiments.scaling --seeds 1 --max_bytes 1000000

    learning_rates  search for the best learning rate of each model at three sizes, in factors of two, until the best
                    one has a worse neighbor on both sides; then take the minimum of the parabola through these three
                    points (in log learning rate). Fits the rule, with text in units of --max_bytes:
                    best learning rate = a · width ** b · (batch / 8) ** c · text ** d
    batches         the same search at the smallest size with half and twice the batch size (for c)
    lengths         the same search at the smallest size with four times the text (for d)
    test            a held-out fourth size, larger than the others, at 0.5, 1 and 2 times the rule's learning rate
    amounts         small sizes on more text. Fits bits per byte = floor + A · parameters ** -α + B · bytes ** -β to
                    these runs and the best ones of learning_rates; the fourth size tests the prediction

Shapes and text are the h200 preset's, scaled down: head dimension 64, feed-forward width four times the hidden size,
tied output matrix, each text once per epoch. Scores are on the validation books of the primary translation.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import command
from benchmarks.experiments import runner
from benchmarks.experiments.runner import SETTINGS, Run, Variant
from mvlm_core.console import log
from mvlm_core.errors import run_main

HEAD_DIM = 64
FULL_WIDTH = 768  # hidden size of the h200 preset
CONTEXT, BATCH = 256, 8
# name → (width, layers): about 2, 7, 19 and 27 million parameters with 4,096 tokens.
SHAPES = {"small": (192, 3), "medium": (320, 5), "large": (448, 7), "test": (512, 8)}
STARTS = {"mvlm_gpt2": 2e-3, "simone_enhanced": 0.02}
MAX_RATES = 6  # learning rates tried by one search
# Part → (size, batch, text in units of --max_bytes) of each search or, for the last two parts, of each run.
POINTS = {
    "learning_rates": [("small", BATCH, 1), ("medium", BATCH, 1), ("large", BATCH, 1)],
    "batches": [("small", BATCH // 2, 1), ("small", BATCH * 2, 1)],
    "lengths": [("small", BATCH, 4)],
    "test": [("test", BATCH, 1)],
    "amounts": [*(("small", BATCH, amount) for amount in (2, 4, 8)), *(("medium", BATCH, amount) for amount in (2, 4))],
}
SEARCHES = ("learning_rates", "batches", "lengths")
PARTS = tuple(POINTS)


# --- fitting ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """``learning rate = a · width ** b · (batch / 8) ** c · amount ** d``.

    Batch sizes are in sequences of ``CONTEXT`` tokens, amounts of text in units of ``--max_bytes``.
    """

    a: float
    b: float
    c: float = 0.0
    d: float = 0.0

    def __call__(self, width: int, batch: float = BATCH, amount: float = 1) -> float:
        return self.a * width**self.b * (batch / BATCH) ** self.c * amount**self.d


@dataclass(frozen=True)
class Law:
    """``bits per byte = floor + a · parameters ** -alpha + b · bytes ** -beta``."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float

    def __call__(self, parameters: float, size: float) -> float:
        return self.floor + self.a * parameters**-self.alpha + self.b * size**-self.beta


def next_rates(points: dict[float, float], start: float) -> list[float]:
    """Return the learning rates to try next; none once the best one lies between two others, or after ``MAX_RATES``.

    Args:
        points: learning rate → bits per byte.
    """
    if len(points) < 3:
        return [start / 2, start, start * 2]
    rates = sorted(points)
    lowest = min(rates, key=points.__getitem__)
    if len(rates) >= MAX_RATES or rates[0] < lowest < rates[-1]:
        return []
    return [lowest / 2 if lowest == rates[0] else lowest * 2]


def best_rate(points: dict[float, float]) -> float:
    """Return the minimum of the parabola through the best point and its neighbors, in log learning rate.

    If the best point is at an end of the grid, return that point.

    Args:
        points: learning rate → bits per byte.
    """
    import numpy as np

    rates = sorted(points)
    lowest = min(rates, key=points.__getitem__)
    if lowest in (rates[0], rates[-1]):
        return lowest
    three = rates[rates.index(lowest) - 1 :][:3]
    curvature, slope, _ = np.polyfit(np.log(three), [points[rate] for rate in three], 2)
    return math.exp(-slope / (2 * curvature))


def power_law(points: dict[int, float]) -> tuple[float, float]:
    """Fit ``y = a · x ** b`` by least squares in log space; ``points`` maps x to y. Return ``a`` and ``b``."""
    x, y = [math.log(value) for value in points], [math.log(value) for value in points.values()]
    b, log_a = statistics.linear_regression(x, y)
    return math.exp(log_a), b


def fit_rule(best: dict[int, float], by_batch: dict[int, float], by_amount: dict[int, float]) -> Rule:
    """Fit the rule's three power laws.

    Args:
        best: width → learning rate, all at ``BATCH`` and one amount of text.
        by_batch: batch → learning rate, all at one width; with fewer than two points, ``c`` is 0.
        by_amount: amount of text → learning rate, likewise for ``d``.
    """
    c, d = (power_law(points)[1] if len(points) > 1 else 0.0 for points in (by_batch, by_amount))
    return Rule(*power_law(best), c, d)


def fit_law(points: list[tuple[int, int, float]]) -> Law:
    """Fit the law by non-negative least squares, with exponents from a grid.

    If larger models are no better at these amounts of text, ``a`` is 0: the points then have no information about size.

    Args:
        points: parameters, bytes of text, bits per byte.
    """
    import numpy as np

    parameters, size, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    exponents, fits = [step / 20 for step in range(2, 21)], []
    for alpha, beta in itertools.product(exponents, exponents):
        columns = np.stack((np.ones_like(y), parameters**-alpha, size**-beta), axis=1)
        scale = columns.max(axis=0)
        # Non-negative least squares: the solution uses one of these subsets of the terms.
        for terms in ([0, 1, 2], [1, 2], [0, 2], [0, 1], [0]):
            solved = np.zeros(3)
            solved[terms] = np.linalg.lstsq((columns / scale)[:, terms], y, rcond=None)[0]
            if (solved >= 0).all():
                floor, a, b = (solved / scale).tolist()
                error = float(((columns / scale @ solved - y) ** 2).sum())
                fits.append((error, Law(floor, a, alpha, b, beta)))
    return min(fits, key=lambda fit: fit[0])[1]


# --- runs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """Search for the best learning rate of one model at one size, batch size and amount of text."""

    options: argparse.Namespace
    model: str
    size: str
    batch: int = BATCH
    amount: int = 1

    def overrides(self, rate: float) -> dict[str, Any]:
        """Return the settings of a run at this learning rate that differ from the preset's."""
        width, layers = SHAPES[self.size]
        values = {"hidden_dim": width, "num_layers": layers, "num_heads": width // HEAD_DIM, "ff_dim": 4 * width}
        values |= {"max_length": CONTEXT, "train_mix": "", "eval_interval": 10**6, "learning_rate": rate}
        values |= {"batch_size": self.batch, "max_bytes": self.amount * self.options.max_bytes}
        if self.model == "simone_enhanced":
            # AdamW's learning rate is tied to Muon's, as in the small presets, so that only one is searched.
            values |= {"output_head": "tied", "adamw_learning_rate": rate / 2, "coherence_weight": 0.0}
        return values

    def runs_at(self, rate: float) -> list[Run]:
        """Return the runs at one learning rate, one per seed."""
        batch = f"-batch{self.batch}" if self.batch != BATCH else ""
        amount = f"-amount{self.amount}" if self.amount > 1 else ""
        label = f"{self.model} {self.size}{batch}{amount} {rate:.2e}"
        variant = Variant(self.model, overrides=self.overrides(rate))
        return runner.make_runs({label: variant}, self.options, runner.shared_values(self.options))

    def points(self) -> dict[float, float]:
        """Return learning rate → mean bits per byte over the finished runs."""
        scores: dict[float, float] = {}
        while new := next_rates(scores, STARTS[self.model]):
            by_rate = {rate: [bits for _, _, bits in figures(self.runs_at(rate))] for rate in new}
            scores |= {rate: statistics.mean(bits) for rate, bits in by_rate.items() if bits}
            if not all(by_rate.values()):
                break
        return scores

    def run_all(self) -> list[Run]:
        """Run the search to completion; return the failed runs."""
        while new := next_rates(self.points(), STARTS[self.model]):
            runs = [run for rate in new for run in self.runs_at(rate)]
            if failed := runner.run_all(runs, self.options.root / self.model, self.options):
                return failed
        return []

    def best(self) -> float | None:
        """Return the best learning rate, or None if the search is unfinished."""
        points = self.points()
        return None if next_rates(points, STARTS[self.model]) else best_rate(points)


def searches(part: str, model: str, options: argparse.Namespace) -> list[Search]:
    return [Search(options, model, *point) for point in POINTS[part]]


def runs_at_rule_rates(part: str, model: str, rule: Rule, options: argparse.Namespace) -> list[Run]:
    """Return the runs of "test" and "amounts", with learning rates from the rule."""
    factors = (0.5, 1.0, 2.0) if part == "test" else (1.0,)
    runs = []
    for search, factor in itertools.product(searches(part, model, options), factors):
        width, *_ = SHAPES[search.size]
        runs += search.runs_at(factor * rule(width, search.batch, search.amount))
    return runs


# --- tables ----------------------------------------------------------------------------------------------


def figures(runs: Iterable[Run]) -> list[tuple[int, int, float]]:
    """Return parameters, bytes of text and bits per byte of each finished run."""
    results = [result for run in runs if (result := run.result())]
    return [(result["parameters"], result["bytes"], result["validation_bpb"]) for result in results]


def rule_of(model: str, options: argparse.Namespace) -> Rule | None:
    """Fit the rule to the finished searches; None if a size is unfinished."""
    rates = {SHAPES[search.size][0]: search.best() for search in searches("learning_rates", model, options)}
    if None in rates.values():
        return None
    small = rates[SHAPES["small"][0]]
    by_batch = {search.batch: rate for search in searches("batches", model, options) if (rate := search.best())}
    by_amount = {search.amount: rate for search in searches("lengths", model, options) if (rate := search.best())}
    return fit_rule(rates, {BATCH: small} | by_batch, {1: small} | by_amount)


def law_of(model: str, rule: Rule, options: argparse.Namespace) -> Law | None:
    """Fit the law to the best runs of the three sizes and the runs on more text; None if one is missing."""
    runs = runs_at_rule_rates("amounts", model, rule, options)
    if any(run.result() is None for run in runs):
        return None
    for search in searches("learning_rates", model, options):
        points = search.points()
        runs += search.runs_at(min(points, key=points.__getitem__))
    return fit_law(figures(runs))


def search_table(options: argparse.Namespace) -> str:
    """Format a table with a row for each started search."""
    rows = []
    for model, part in itertools.product(SETTINGS, SEARCHES):
        for search in searches(part, model, options):
            if points := search.points():
                size = f"{search.size}, {figures(search.runs_at(min(points)))[0][0]:,} parameters"
                cells = ", ".join(f"{rate:g}: {value:.4f}" for rate, value in sorted(points.items()))
                best = f"{rate:.2g}" if (rate := search.best()) else "unfinished"
                rows.append((model, size, cells, search.batch, search.amount, best))
    columns = ("model", "size", "bits per byte by learning rate", "batch", "text", "best learning rate")
    return command.table(columns, rows, left=3)


def rule_lines(model: str, rule: Rule, law: Law | None, options: argparse.Namespace) -> list[str]:
    """Format a model's rule and law, and their predictions next to the measurements."""
    lines = [
        f"\n{model}: best learning rate = {rule.a:.3g} · width ** {rule.b:.2f} · (batch / {BATCH}) ** {rule.c:.2f} "
        f"· text ** {rule.d:.2f}; {rule(FULL_WIDTH):.2g} at width {FULL_WIDTH}, other factors equal"
    ]
    for run in (run for part in ("test", "amounts") for run in runs_at_rule_rates(part, model, rule, options)):
        for parameters, size, value in figures([run]):
            expected = f", {law(parameters, size):.4f} by the law" if law else ""
            lines.append(f"  {run.name}: {parameters:,} parameters, {size:,} bytes: {value:.4f}{expected}")
    if law:
        lines.append(
            f"  bits per byte = {law.floor:.3f} + {law.a:.3g} · parameters ** -{law.alpha:.2f} "
            f"+ {law.b:.3g} · bytes ** -{law.beta:.2f}"
        )
    return lines


def report(options: argparse.Namespace) -> None:
    """Show the tables of all finished runs."""
    text, fitted = [search_table(options)], {}
    for model in SETTINGS:
        if rule := rule_of(model, options):
            law = law_of(model, rule, options)
            fitted[model] = {"rule": asdict(rule)} | ({"law": asdict(law)} if law else {})
            text += rule_lines(model, rule, law, options)
    command.show("\n".join(text), fitted, options)


def run_part(part: str, model: str, options: argparse.Namespace) -> list[Run]:
    """Execute the unfinished runs of one part for one model; return the failed ones."""
    if part in SEARCHES:
        return [run for search in searches(part, model, options) for run in search.run_all()]
    if not (rule := rule_of(model, options)):
        log.warning("%s: skipped for %s: run --only learning_rates first", part, model)
        return []
    return runner.run_all(runs_at_rule_rates(part, model, rule, options), options.root / model, options)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = runner.command_line(__doc__, "scaling", PARTS, kind="parts")
    parser.set_defaults(seeds=1, max_bytes=1_000_000)
    parser.add_argument("--model", choices=tuple(SETTINGS), help="only this model, for example to run one on each core")
    return runner.checked(parser.parse_args(arguments))


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    models = (options.model,) if options.model else tuple(SETTINGS)
    parts = () if options.table else command.parse_only(options.only, PARTS)
    failed = [run for part in parts for model in models for run in run_part(part, model, options)]
    report(options)
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
