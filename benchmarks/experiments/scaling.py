#!/usr/bin/env python3
"""From small to large: how the best rate moves with size and batch, decay and dropout with repeats, and what to expect.

    rates    each model at three sizes, the rate in steps of two from a start, on until the lowest point has a worse one
             on both sides; a size's best rate is where the parabola through these three, in log rate, has its
             minimum. Rule: best rate = a · width ** b · (batch / 8) ** c · text ** d, by least squares, text in times
             --max_bytes; c and d from the next parts.
    batches  the smallest size with half and with twice the batch, its rate found in the same way.
    lengths  the smallest size on four times the text, its rate found in the same way.
    test     a fourth size, larger than the others, at half of what the rule says, at it, and at twice it.
    amounts  small sizes on more text: bits per byte = floor + A · parameters ** -α + B · bytes ** -β, by least squares
             over these and the best of rates. The fourth size was not used: it tests the law.
    repeats  a tiny size, with as little text for each parameter as the h200 preset has (a few books, all translations),
             read 1, 3 and 8 times with several decays and dropouts.

Shapes and text are the h200 preset's in small: heads of 64, feed-forward four times the width, output tied, every text
read once a pass. Each run is a process of its own; run the command again and it goes on where it stopped. Validation
books only.

Exit codes: 0 done, 1 a run failed (the others still ran), 2 bad arguments, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import shutil
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.experiments.runner import SETTINGS, Run, command_line, make, settled, values_of
from mvlm_core.console import log
from mvlm_core.data.corpus import Document, load_corpus
from mvlm_core.errors import UserError, run_main
from mvlm_core.files import write_json_atomic

HEAD = 64
FULL_WIDTH = 768  # of the h200 preset
CONTEXT, BATCH = 256, 8  # of these runs
# name → (width, layers): about 2, 7 and 19 million parameters with 4,096 tokens, and 27 for the test.
SIZES = {"small": (192, 3), "medium": (320, 5), "large": (448, 7)}
TEST_SIZE = ("test", (512, 8))
REPEATS_SIZE = ("tiny", (128, 3))  # 1.1 million parameters
STARTS = {"mvlm_gpt2": 2e-3, "simone_enhanced": 0.02}
MOST_RATES = 6  # of one search
BATCHES = (BATCH // 2, BATCH * 2)
LENGTH = 4  # times --max_bytes
AMOUNTS = {"small": (2, 4, 8), "medium": (2, 4)}  # times --max_bytes
EPOCHS, DECAYS, DROPOUTS = (1, 3, 8), (0.1, 0.4, 1.6), (0.0, 0.1, 0.3)
PARTS = ("rates", "batches", "lengths", "test", "amounts", "repeats")


@dataclass(frozen=True)
class Rule:
    """``rate = a · width ** b · (batch / 8) ** c · amount ** d``.

    Batches in sequences of ``CONTEXT`` tokens, amounts of text in times ``--max_bytes``.
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


@dataclass(frozen=True)
class Search:
    """The best rate of one model at one size, batch and amount of text; ``options`` are the command line's."""

    model: str
    size_name: str
    options: argparse.Namespace
    batch: int = BATCH
    amount: int = 1

    def runs(self, rate: float) -> list[Run]:
        """The runs of one rate, a seed each."""
        return rate_runs(self.model, self.size_name, rate, self.options, batch=self.batch, amount=self.amount)

    def points(self) -> dict[float, float]:
        """Rate → bits per byte of what is finished, as far as the search has come."""
        found: dict[float, float] = {}
        while new := wanted(found, STARTS[self.model]):
            values = {rate: value for rate in new if (value := bits(self.runs(rate))) is not None}
            found |= values
            if len(values) < len(new):
                break
        return found

    def make(self) -> list[Run]:
        """Run what is wanted until nothing is; returns what failed."""
        while new := wanted(self.points(), STARTS[self.model]):
            if failed := make([run for rate in new for run in self.runs(rate)], self.options.root / self.model):
                return failed
        return []

    def best(self) -> float | None:
        """The best rate, or None while the search is not finished."""
        points = self.points()
        return None if wanted(points, STARTS[self.model]) else best_rate(points)


def wanted(points: dict[float, float], start: float) -> list[float]:
    """The rates that a search needs next; none where the lowest point lies between two others, or after many."""
    if len(points) < 3:
        return [start / 2, start, start * 2]
    rates = sorted(points)
    lowest = min(rates, key=points.__getitem__)
    if len(rates) >= MOST_RATES or rates[0] < lowest < rates[-1]:
        return []
    return [lowest / 2 if lowest == rates[0] else lowest * 2]


def best_rate(points: dict[float, float]) -> float:
    """Where the parabola through the lowest point and its neighbours, in log rate, has its minimum.

    At an end of the grid the end itself.

    Args:
        points: rate → bits per byte.
    """
    rates = sorted(points)
    lowest = rates.index(min(rates, key=points.get))
    if lowest in (0, len(rates) - 1):
        return rates[lowest]
    x = [math.log(rate) for rate in rates[lowest - 1 : lowest + 2]]
    y = [points[rate] for rate in rates[lowest - 1 : lowest + 2]]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    curvature = (right - left) / (x[2] - x[0])
    slope = left + curvature * (x[1] - x[0])  # of the parabola at the middle point
    return math.exp(x[1] - slope / (2 * curvature)) if curvature > 0 else rates[lowest]


def fit_rule(best: dict[int, float], by_batch: dict[int, float], by_amount: dict[int, float]) -> Rule:
    """The power laws of least squares in logarithms.

    Args:
        best: width → rate, all at ``BATCH`` and one amount of text.
        by_batch: batch → rate, all at one width; fewer than two: no change with the batch.
        by_amount: amount of text → rate, likewise.
    """
    c, d = (power_law(points)[1] if len(points) > 1 else 0.0 for points in (by_batch, by_amount))
    return Rule(*power_law(best), c, d)


def power_law(points: dict[int, float]) -> tuple[float, float]:
    """``a`` and ``b`` of ``y = a · x ** b``; ``points``: x → y."""
    x, y = [math.log(value) for value in points], [math.log(value) for value in points.values()]
    b = statistics.linear_regression(x, y).slope
    return math.exp(statistics.mean(y) - b * statistics.mean(x)), b


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
        # The least squares with none below 0 are those of one of these choices of terms.
        for terms in ([0, 1, 2], [1, 2], [0, 2], [0, 1], [0]):
            solved = np.zeros(3)
            solved[terms] = np.linalg.lstsq((columns / scale)[:, terms], y, rcond=None)[0]
            if (solved >= 0).all():
                floor, a, b = (solved / scale).tolist()
                found.append((float(((columns / scale @ solved - y) ** 2).sum()), Law(floor, a, alpha, b, beta)))
    return min(found, key=lambda pair: pair[0])[1]


# --- the runs ------------------------------------------------------------------------------------------------


def shape(size_name: str) -> dict[str, Any]:
    width, layers = dict([*SIZES.items(), TEST_SIZE, REPEATS_SIZE])[size_name]
    return {"hidden_dim": width, "num_layers": layers, "num_heads": width // HEAD, "ff_dim": 4 * width}


def settings_of(model: str, size_name: str, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    values = values_of(options) | shape(size_name) | {"learning_rate": rate, "batch_size": BATCH, "max_length": CONTEXT}
    values |= {"train_mix": "", "eval_interval": 10**6}
    if model == "simone_enhanced":
        # AdamW's part moves with Muon's: one rate to find, as the small presets have it.
        values |= {"output_head": "tied", "adamw_learning_rate": rate / 2, "coherence_weight": 0.0}
    return values


def rate_runs(
    model: str, size_name: str, rate: float, options: argparse.Namespace, *, batch: int = BATCH, amount: int = 1
) -> list[Run]:
    """A seed each, of ``amount`` times ``--max_bytes``."""
    kind = size_name + (f"-batch{batch}" if batch != BATCH else "") + (f"-amount{amount}" if amount > 1 else "")
    values = settings_of(model, size_name, rate, options)
    values |= {"batch_size": batch, "max_bytes": amount * options.max_bytes}
    folder = options.root / model / kind / f"{rate:.2e}"
    return [
        Run(f"{model} {kind} {rate:.2e}", model, values | {"seed": seed, "output_dir": str(folder / f"seed{seed}")})
        for seed in range(options.seeds)
    ]


def bits(runs: list[Run]) -> float | None:
    """Mean validation of those that are finished; None while none is."""
    found = [result["validation_bpb"] for run in runs if (result := run.result())]
    return statistics.mean(found) if found else None


def amount_runs(model: str, rule: Rule, options: argparse.Namespace) -> list[Run]:
    pairs = [(name, amount) for name, amounts in AMOUNTS.items() for amount in amounts]
    return [
        run
        for name, amount in pairs
        for run in rate_runs(model, name, rule(shape(name)["hidden_dim"]), options, amount=amount)
    ]


def runs_at_fourth_size(model: str, rule: Rule, options: argparse.Namespace) -> list[Run]:
    name, (width, _) = TEST_SIZE
    return [run for factor in (0.5, 1.0, 2.0) for run in rate_runs(model, name, rule(width) * factor, options)]


def little_text(options: argparse.Namespace) -> Path:
    """A data folder of train books up to ``--little_bytes``, in all translations, and of the validation books.

    Raises:
        UserError: every train book is larger than that.
    """
    folder = options.work_dir / f"text-{options.little_bytes}"
    if folder.is_dir():
        return folder
    corpus = load_corpus(options.data_dir)
    books: dict[str | None, list[Document]] = {}
    for document in corpus.split("train"):
        books.setdefault(document.book, []).append(document)
    chosen, left = [], options.little_bytes
    for book in random.Random(0).sample(list(books), len(books)):
        if (size := sum(document.size for document in books[book])) <= left:
            chosen += books[book]
            left -= size
    if not chosen:
        raise UserError(f"--little_bytes {options.little_bytes}: no train book is so small in all its translations")
    staging = folder.with_name(f".{folder.name}-{os.getpid()}")  # one for each of two commands at a time
    shutil.rmtree(staging, ignore_errors=True)
    for document in (*chosen, *corpus.split("validation")):
        for name in (document.path, str(Path(document.path).with_suffix(".json"))):
            target = staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(corpus.root / name, target)
    try:
        staging.rename(folder)
    except OSError:  # the other was first
        shutil.rmtree(staging)
    return folder


def repeat_runs(options: argparse.Namespace) -> list[Run]:
    """Decays at a dropout of 0.1 and dropouts at a decay of 0.4, at each number of epochs; both models, one seed."""
    data_dir, runs = little_text(options), []
    for epochs in reversed(EPOCHS):  # what tells most comes first
        for model, rate in STARTS.items():
            pairs = {(decay, 0.1) for decay in DECAYS} | {(0.4, dropout) for dropout in DROPOUTS}
            for decay, dropout in sorted(pairs):
                folder = options.work_dir / f"repeats-{options.little_bytes}" / model / f"{epochs}-{decay}-{dropout}"
                values = settings_of(model, REPEATS_SIZE[0], rate, options)
                del values["max_bytes"]
                values |= {"num_epochs": float(epochs), "weight_decay": decay, "dropout": dropout}
                values |= {"data_dir": str(data_dir), "seed": 0, "output_dir": str(folder)}
                runs.append(Run(f"{model} epochs {epochs} decay {decay} dropout {dropout}", model, values))
    return runs


# --- the tables ----------------------------------------------------------------------------------------------


def searches(model: str, options: argparse.Namespace) -> list[Search]:
    return [Search(model, name, options) for name in SIZES]


def batch_searches(model: str, options: argparse.Namespace) -> list[Search]:
    return [Search(model, "small", options, batch) for batch in BATCHES]


def length_searches(model: str, options: argparse.Namespace) -> list[Search]:
    return [Search(model, "small", options, amount=LENGTH)]


def rule_of(model: str, options: argparse.Namespace) -> Rule | None:
    """From what is finished; None while a size is not."""
    best = {SIZES[search.size_name][0]: search.best() for search in searches(model, options)}
    if None in best.values():
        return None
    small = best[SIZES["small"][0]]
    by_batch = {search.batch: rate for search in batch_searches(model, options) if (rate := search.best())}
    by_amount = {search.amount: rate for search in length_searches(model, options) if (rate := search.best())}
    return fit_rule(best, {BATCH: small} | by_batch, {1: small} | by_amount)


def law_of(model: str, rule: Rule, options: argparse.Namespace) -> Law | None:
    """From the lowest points of the three sizes and the runs on more text; None while one is missing."""
    points = []
    for search in searches(model, options):
        found = search.points()
        points += figures(search.runs(min(found, key=found.__getitem__)))
    more = amount_runs(model, rule, options)
    if any(run.result() is None for run in more):
        return None
    return fit_law(points + figures(more))


def figures(runs: list[Run]) -> list[tuple[int, int, float]]:
    """Parameters, bytes of text and bits per byte of each finished run."""
    results = [result for run in runs if (result := run.result())]
    return [(result["parameters"], result["bytes"], result["validation_bpb"]) for result in results]


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Print the tables of what is finished; returns their figures."""
    print("| model | size | batch | text | bits per byte by rate | best rate |")
    print("| --- | --- | ---: | ---: | --- | ---: |")
    for model in SETTINGS:
        for search in (
            *searches(model, options), *batch_searches(model, options), *length_searches(model, options)
        ):  # fmt: skip
            if points := search.points():
                cells = ", ".join(f"{rate:g}: {value:.4f}" for rate, value in sorted(points.items()))
                best = search.best()
                print(
                    f"| {model} | {search.size_name}, {figures(search.runs(min(points)))[0][0]:,} parameters "
                    f"| {search.batch} | {search.amount} | {cells} | {f'{best:.2g}' if best else 'not finished'} |"
                )
    found: dict[str, Any] = {}
    for model in SETTINGS:
        if (rule := rule_of(model, options)) is None:
            continue
        found[model] = {"rule": asdict(rule)}
        print(
            f"\n{model}: best rate = {rule.a:.3g} · width ** {rule.b:.2f} · (batch / {BATCH}) ** {rule.c:.2f} "
            f"· text ** {rule.d:.2f}; {rule(FULL_WIDTH):.2g} at {FULL_WIDTH} wide, the rest alike"
        )
        law = law_of(model, rule, options)
        for run in (*runs_at_fourth_size(model, rule, options), *amount_runs(model, rule, options)):
            for parameters, size, value in figures([run]):
                expected = f", {law(parameters, size):.4f} by the law" if law else ""
                print(f"  {run.name}: {parameters:,} parameters, {size:,} bytes: {value:.4f}{expected}")
        if law:
            found[model] |= {"law": asdict(law)}
            print(
                f"  bits per byte = {law.floor:.3f} + {law.a:.3g} · parameters ** -{law.alpha:.2f} "
                f"+ {law.b:.3g} · bytes ** -{law.beta:.2f}"
            )
    if (options.work_dir / f"text-{options.little_bytes}").is_dir():
        print("\n| model | epochs | decay | dropout | bits per byte |\n| --- | ---: | ---: | ---: | ---: |")
        for run in repeat_runs(options):
            if result := run.result():
                row = [run.values[key] for key in ("num_epochs", "weight_decay", "dropout")]
                print(f"| {run.model} | {row[0]:g} | {row[1]} | {row[2]} | {result['validation_bpb']:.4f} |")
    return found


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: every problem with it.
    """
    parser = command_line(__doc__, "scaling")
    parser.set_defaults(seeds=1, max_bytes=1_000_000)
    parser.add_argument("--only", choices=PARTS, help="this part [default: all, in order]")
    parser.add_argument("--model", choices=tuple(SETTINGS), help="this model alone, such as on each of two cores")
    parser.add_argument("--little_bytes", type=int, default=500_000, help="text of repeats [default 500000]")
    parser.add_argument("--table", action="store_true", help="only print what is finished")
    parser.add_argument("--json", type=Path, help="also write the rules and laws here")
    options = settled(parser.parse_args(arguments))
    if options.little_bytes < 1:
        raise UserError(f"--little_bytes {options.little_bytes}: at least 1")
    return options


def run_part(part: str, model: str, options: argparse.Namespace) -> list[Run]:
    """Run what is missing of one part for one model; returns what failed."""
    if kind := {"rates": searches, "batches": batch_searches, "lengths": length_searches}.get(part):
        return [run for search in kind(model, options) for run in search.make()]
    if part == "repeats":
        return make([run for run in repeat_runs(options) if run.model == model], options.root / model)
    if (rule := rule_of(model, options)) is None:
        log.warning("%s: the rule of %s is not known: --only rates comes first", part, model)
        return []
    return make({"test": runs_at_fourth_size, "amounts": amount_runs}[part](model, rule, options), options.root / model)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    models = (options.model,) if options.model else tuple(SETTINGS)
    parts = () if options.table else (options.only,) if options.only else PARTS
    failed = [run for part in parts for model in models for run in run_part(part, model, options)]
    found = report(options)
    if options.json:
        write_json_atomic(options.json, found)
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
