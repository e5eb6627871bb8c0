"""From small to large: how the best learning rate moves with size and batch, and what bits per byte to expect.

    python -m benchmarks.experiments.scaling --seeds 1 --max_bytes 1000000

    learning_rates  each model at three sizes, the learning rate in steps of two from a start, until the lowest point
                    has a worse one on both sides; a size's best learning rate is where the parabola through these
                    three, in log learning rate, has its minimum.
                    Rule: best learning rate = a · width ** b · (batch / 8) ** c · text ** d, by least squares, text in
                    units of --max_bytes; c and d from the next two parts.
    batches         the smallest size with half and with twice the batch, searched in the same way.
    lengths         the smallest size on four times the text, searched in the same way.
    test            a fourth size, larger than the others, at half of the rule's learning rate, at it, and at twice it.
    amounts         small sizes on more text: bits per byte = floor + A · parameters ** -α + B · bytes ** -β, by least
                    squares over these and the best of learning_rates. The fourth size was not used: it tests the law.

Shapes and text are those of the h200 preset, scaled down: heads of 64, feed-forward four times the width, output tied,
every text read once a pass. Scores are of the validation books of the primary translation.
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
from benchmarks.experiments.runner import SETTINGS, Line, Run
from mvlm_core.console import log
from mvlm_core.errors import run_main

HEAD = 64
FULL_WIDTH = 768  # of the h200 preset
CONTEXT, BATCH = 256, 8  # of these runs
# name → (width, layers): about 2, 7, 19 and 27 million parameters with 4,096 tokens.
SHAPES = {"small": (192, 3), "medium": (320, 5), "large": (448, 7), "test": (512, 8)}
STARTS = {"mvlm_gpt2": 2e-3, "simone_enhanced": 0.02}
MOST_RATES = 6  # of one search
# Part → (size, batch, text in units of --max_bytes) of its searches or, for the last two, of its runs.
POINTS = {
    "learning_rates": [("small", BATCH, 1), ("medium", BATCH, 1), ("large", BATCH, 1)],
    "batches": [("small", BATCH // 2, 1), ("small", BATCH * 2, 1)],
    "lengths": [("small", BATCH, 4)],
    "test": [("test", BATCH, 1)],
    "amounts": [*(("small", BATCH, amount) for amount in (2, 4, 8)), *(("medium", BATCH, amount) for amount in (2, 4))],
}
SEARCHES = ("learning_rates", "batches", "lengths")
PARTS = tuple(POINTS)


# --- the arithmetic ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """``learning rate = a · width ** b · (batch / 8) ** c · amount ** d``.

    Batches in sequences of ``CONTEXT`` tokens, amounts of text in units of ``--max_bytes``.
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


def wanted(points: dict[float, float], start: float) -> list[float]:
    """The learning rates that a search needs next; none once the lowest point lies between two others, or after many.

    Args:
        points: learning rate → bits per byte.
    """
    if len(points) < 3:
        return [start / 2, start, start * 2]
    rates = sorted(points)
    lowest = min(rates, key=points.__getitem__)
    if len(rates) >= MOST_RATES or rates[0] < lowest < rates[-1]:
        return []
    return [lowest / 2 if lowest == rates[0] else lowest * 2]


def best_rate(points: dict[float, float]) -> float:
    """Where the parabola through the lowest point and its neighbours, in log learning rate, has its minimum.

    At an end of the grid, the end itself.

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
    """``a`` and ``b`` of ``y = a · x ** b``, by least squares in logarithms; ``points``: x → y."""
    x, y = [math.log(value) for value in points], [math.log(value) for value in points.values()]
    b, log_a = statistics.linear_regression(x, y)
    return math.exp(log_a), b


def fit_rule(best: dict[int, float], by_batch: dict[int, float], by_amount: dict[int, float]) -> Rule:
    """The power laws of least squares in logarithms.

    Args:
        best: width → learning rate, all at ``BATCH`` and one amount of text.
        by_batch: batch → learning rate, all at one width; fewer than two: no change with the batch.
        by_amount: amount of text → learning rate, likewise.
    """
    c, d = (power_law(points)[1] if len(points) > 1 else 0.0 for points in (by_batch, by_amount))
    return Rule(*power_law(best), c, d)


def fit_law(points: list[tuple[int, int, float]]) -> Law:
    """The law of least squares; exponents from a grid, the rest solved, nothing below 0.

    Where larger models are no better at these amounts of text, ``a`` is 0: the points then say nothing about size.

    Args:
        points: parameters, bytes of text, bits per byte.
    """
    import numpy as np

    parameters, size, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    exponents, found = [step / 20 for step in range(2, 21)], []
    for alpha, beta in itertools.product(exponents, exponents):
        columns = np.stack((np.ones_like(y), parameters**-alpha, size**-beta), axis=1)
        scale = columns.max(axis=0)
        # The least squares with no negative term are those of one of these choices of terms.
        for terms in ([0, 1, 2], [1, 2], [0, 2], [0, 1], [0]):
            solved = np.zeros(3)
            solved[terms] = np.linalg.lstsq((columns / scale)[:, terms], y, rcond=None)[0]
            if (solved >= 0).all():
                floor, a, b = (solved / scale).tolist()
                found.append((float(((columns / scale @ solved - y) ** 2).sum()), Law(floor, a, alpha, b, beta)))
    return min(found, key=lambda pair: pair[0])[1]


# --- the runs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """The best learning rate of one model at one size, batch and amount of text; ``options``: the command line's."""

    options: argparse.Namespace
    model: str
    size: str
    batch: int = BATCH
    amount: int = 1

    def values(self, rate: float) -> dict[str, Any]:
        """The settings of its runs."""
        width, layers = SHAPES[self.size]
        values = {"hidden_dim": width, "num_layers": layers, "num_heads": width // HEAD, "ff_dim": 4 * width}
        values |= {"max_length": CONTEXT, "train_mix": "", "eval_interval": 10**6, "learning_rate": rate}
        values |= {"batch_size": self.batch, "max_bytes": self.amount * self.options.max_bytes}
        if self.model == "simone_enhanced":
            # AdamW's learning rate moves with Muon's: one to find, as in the small presets.
            values |= {"output_head": "tied", "adamw_learning_rate": rate / 2, "coherence_weight": 0.0}
        return values

    def runs(self, rate: float) -> list[Run]:
        """The runs at one learning rate, one per seed."""
        batch = f"-batch{self.batch}" if self.batch != BATCH else ""
        amount = f"-amount{self.amount}" if self.amount > 1 else ""
        line = {f"{self.model} {self.size}{batch}{amount} {rate:.2e}": Line(self.model, changes=self.values(rate))}
        return runner.plan(line, self.options, runner.shared_values(self.options))

    def points(self) -> dict[float, float]:
        """Learning rate → mean bits per byte of what is finished, as far as the search has come."""
        found: dict[float, float] = {}
        while new := wanted(found, STARTS[self.model]):
            values = {rate: [bits for _, _, bits in figures(self.runs(rate))] for rate in new}
            found |= {rate: statistics.mean(bits) for rate, bits in values.items() if bits}
            if not all(values.values()):
                break
        return found

    def make(self) -> list[Run]:
        """Run what is wanted until nothing is; returns what failed."""
        while new := wanted(self.points(), STARTS[self.model]):
            runs = [run for rate in new for run in self.runs(rate)]
            if failed := runner.make(runs, self.options.root / self.model):
                return failed
        return []

    def best(self) -> float | None:
        """The best learning rate, or None while the search is not finished."""
        points = self.points()
        return None if wanted(points, STARTS[self.model]) else best_rate(points)


def searches(part: str, model: str, options: argparse.Namespace) -> list[Search]:
    return [Search(options, model, *point) for point in POINTS[part]]


def ruled_runs(part: str, model: str, rule: Rule, options: argparse.Namespace) -> list[Run]:
    """The runs of "test" and "amounts", whose learning rates are the rule's."""
    factors = (0.5, 1.0, 2.0) if part == "test" else (1.0,)
    pairs = itertools.product(searches(part, model, options), factors)
    return [run for search, factor in pairs for run in search.runs(factor * rule(SHAPES[search.size][0]))]


# --- the tables ----------------------------------------------------------------------------------------------


def figures(runs: Iterable[Run]) -> list[tuple[int, int, float]]:
    """Parameters, bytes of text and bits per byte of each finished run."""
    results = [result for run in runs if (result := run.result())]
    return [(result["parameters"], result["bytes"], result["validation_bpb"]) for result in results]


def rule_of(model: str, options: argparse.Namespace) -> Rule | None:
    """From what is finished; None while a size is not."""
    rates = {SHAPES[search.size][0]: search.best() for search in searches("learning_rates", model, options)}
    if None in rates.values():
        return None
    small = rates[SHAPES["small"][0]]
    by_batch = {search.batch: rate for search in searches("batches", model, options) if (rate := search.best())}
    by_amount = {search.amount: rate for search in searches("lengths", model, options) if (rate := search.best())}
    return fit_rule(rates, {BATCH: small} | by_batch, {1: small} | by_amount)


def law_of(model: str, rule: Rule, options: argparse.Namespace) -> Law | None:
    """From the lowest points of the three sizes and the runs on more text; None while one is missing."""
    more = ruled_runs("amounts", model, rule, options)
    if any(run.result() is None for run in more):
        return None
    for search in searches("learning_rates", model, options):
        found = search.points()
        more += search.runs(min(found, key=found.__getitem__))
    return fit_law(figures(more))


def search_table(options: argparse.Namespace) -> str:
    """A row for each search that has begun."""
    rows = []
    for model, part in itertools.product(SETTINGS, SEARCHES):
        for search in searches(part, model, options):
            if points := search.points():
                size = f"{search.size}, {figures(search.runs(min(points)))[0][0]:,} parameters"
                cells = ", ".join(f"{rate:g}: {value:.4f}" for rate, value in sorted(points.items()))
                best = f"{found:.2g}" if (found := search.best()) else "not finished"
                rows.append((model, size, cells, search.batch, search.amount, best))
    columns = ("model", "size", "bits per byte by learning rate", "batch", "text", "best learning rate")
    return command.table(columns, rows, left=3)


def rule_lines(model: str, rule: Rule, law: Law | None, options: argparse.Namespace) -> list[str]:
    """What a model's rule and law say, beside what was measured."""
    lines = [
        f"\n{model}: best learning rate = {rule.a:.3g} · width ** {rule.b:.2f} · (batch / {BATCH}) ** {rule.c:.2f} "
        f"· text ** {rule.d:.2f}; {rule(FULL_WIDTH):.2g} at {FULL_WIDTH} wide, the rest alike"
    ]
    for run in (run for part in ("test", "amounts") for run in ruled_runs(part, model, rule, options)):
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
    """Show the tables of what is finished."""
    text, found = [search_table(options)], {}
    for model in SETTINGS:
        if rule := rule_of(model, options):
            law = law_of(model, rule, options)
            found[model] = {"rule": asdict(rule)} | ({"law": asdict(law)} if law else {})
            text += rule_lines(model, rule, law, options)
    command.show("\n".join(text), found, options)


def run_part(part: str, model: str, options: argparse.Namespace) -> list[Run]:
    """Run what is missing of one part for one model; returns what failed."""
    if part in SEARCHES:
        return [run for search in searches(part, model, options) for run in search.make()]
    if rule := rule_of(model, options):
        runs = ruled_runs(part, model, rule, options)
    else:
        log.warning("%s: the rule of %s is unknown: --only learning_rates comes first", part, model)
        return []
    return runner.make(runs, options.root / model)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = runner.command_line(__doc__, "scaling", PARTS)
    parser.set_defaults(seeds=1, max_bytes=1_000_000)
    parser.add_argument("--model", choices=tuple(SETTINGS), help="this model alone, for example one on each core")
    return runner.settled(parser.parse_args(arguments), "max_bytes")


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    models = (options.model,) if options.model else tuple(SETTINGS)
    parts = () if options.table else command.chosen(options.only, PARTS)
    failed = [run for part in parts for model in models for run in run_part(part, model, options)]
    report(options)
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
