#!/usr/bin/env python3
"""From small to large: how the best learning rate moves with size, and decay and dropout with repeats.

    rates    each model at three sizes, the rate in steps of two; the best one of a size is where a parabola through
             the lowest three points in log rate has its minimum. Rule: best rate = a · width ** b, by least squares.
    test     a fourth size, larger than the others, at half of what the rule says, at it, and at twice it.
    repeats  the smallest size on little text read 1, 4 and 12 times, with several decays and dropouts.

Shapes are the h200 preset's in small: heads of 64, feed-forward four times the width, output tied. Each run is a
process of its own; run the command again and it goes on where it stopped. Validation books only.

Exit codes: 0 done, 1 a run failed (the others still ran), 2 bad arguments, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trials import SETTINGS, Run, command_line, make, settled, values_of

from mvlm_core.console import log
from mvlm_core.corpus import load_corpus
from mvlm_core.errors import UserError, run_main
from mvlm_core.files import write_json_atomic

HEAD = 64
FULL_WIDTH = 768  # of the h200 preset
# name → (width, layers): about 2, 7 and 19 million parameters with 4,096 tokens, and 27 for the test.
SIZES = {"small": (192, 3), "medium": (320, 5), "large": (448, 7)}
TEST_SIZE = ("test", (512, 8))
RATES = {"mvlm_gpt2": (1e-3, 2e-3, 4e-3, 8e-3), "simone_enhanced": (0.01, 0.02, 0.04, 0.08)}
EPOCHS, DECAYS, DROPOUTS = (1, 4, 12), (0.1, 0.4, 1.6), (0.0, 0.1, 0.3)


@dataclass(frozen=True)
class Rule:
    """``rate = a · width ** b``, from the best rate of each size."""

    a: float
    b: float

    def __call__(self, width: int) -> float:
        return self.a * width**self.b


def shape(width: int, layers: int) -> dict[str, Any]:
    return {"hidden_dim": width, "num_layers": layers, "num_heads": width // HEAD, "ff_dim": 4 * width}


def settings_of(model: str, options: argparse.Namespace, size: tuple[int, int], rate: float) -> dict[str, Any]:
    values = values_of(options) | shape(*size)
    values |= {"learning_rate": rate, "batch_size": 8, "eval_interval": 10**6}
    if model == "simone_enhanced":
        # AdamW's part moves with Muon's: one rate to find, as the presets have it.
        values |= {"output_head": "tied", "adamw_learning_rate": rate / 2}
    return values


def rate_runs(model: str, size_name: str, size: tuple[int, int], rate: float, options: argparse.Namespace) -> list[Run]:
    """The runs of one rate at one size, a seed each."""
    label = f"{model} {size_name} {rate:.2e}"
    folder = options.root / model / size_name / f"{rate:.2e}"
    values = settings_of(model, options, size, rate)
    return [
        Run(label, model, values | {"seed": seed, "output_dir": str(folder / f"seed{seed}")})
        for seed in range(options.seeds)
    ]


def bits(runs: list[Run]) -> float | None:
    """Mean validation of those that are finished; None while none is."""
    found = [result["validation_bpb"] for run in runs if (result := run.result())]
    return statistics.mean(found) if found else None


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


def fit(best: dict[int, float]) -> Rule:
    """The power law of least squares in logarithms; ``best``: width → rate."""
    x, y = [math.log(width) for width in best], [math.log(rate) for rate in best.values()]
    b = statistics.linear_regression(x, y).slope
    return Rule(math.exp(statistics.mean(y) - b * statistics.mean(x)), b)


def little_text(options: argparse.Namespace) -> Path:
    """A data folder of the first King James train books up to about ``--little_bytes``, and its validation books."""
    folder = options.work_dir / f"text-{options.little_bytes}"
    if folder.is_dir():
        return folder
    corpus, size = load_corpus(options.data_dir, only="bible/kjv"), 0
    staging = folder.with_name(f".{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    for document in (*corpus.split("train"), *corpus.split("validation")):
        if document.metadata["split"] == "train":
            if size >= options.little_bytes:
                continue
            size += document.size
        for name in (document.path, str(Path(document.path).with_suffix(".json"))):
            target = staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(corpus.root / name, target)
    staging.rename(folder)
    return folder


def repeat_runs(options: argparse.Namespace) -> list[Run]:
    """Decays at a dropout of 0.1 and dropouts at a decay of 0.4, at each number of epochs; both models, one seed."""
    data_dir, runs = little_text(options), []
    for epochs in reversed(EPOCHS):  # what tells most comes first
        for model, rates in RATES.items():
            pairs = {(decay, 0.1) for decay in DECAYS} | {(0.4, dropout) for dropout in DROPOUTS}
            for decay, dropout in sorted(pairs):
                folder = options.work_dir / f"repeats-{options.little_bytes}" / model / f"{epochs}-{decay}-{dropout}"
                values = settings_of(model, options, SIZES["small"], rates[1])
                del values["max_bytes"]
                values |= {"num_epochs": float(epochs), "weight_decay": decay, "dropout": dropout, "train_mix": ""}
                values |= {"data_dir": str(data_dir), "seed": 0, "output_dir": str(folder)}
                runs.append(Run(f"{model} epochs {epochs} decay {decay} dropout {dropout}", model, values))
    return runs


def rates_table(options: argparse.Namespace) -> tuple[list[str], dict[str, Rule]]:
    """What is finished of ``rates``, and the rule of each model whose sizes are all there."""
    lines = ["| model | size, parameters | bits per byte by rate | best rate |", "| --- | --- | --- | ---: |"]
    rules = {}
    for model, rates in RATES.items():
        best: dict[int, float] = {}
        for name, size in SIZES.items():
            runs = {rate: rate_runs(model, name, size, rate, options) for rate in rates}
            points = {rate: value for rate in rates if (value := bits(runs[rate])) is not None}
            if len(points) < 3:
                continue
            best[size[0]] = best_rate(points)
            parameters = next(result["parameters"] for run in sum(runs.values(), []) if (result := run.result()))
            cells = ", ".join(f"{rate:g}: {bits:.4f}" for rate, bits in points.items())
            lines.append(f"| {model} | {size[0]} × {size[1]}, {parameters:,} | {cells} | {best[size[0]]:.2g} |")
        if len(best) == len(SIZES):
            rules[model] = fit(best)
    return lines, rules


def runs_at_fourth_size(rules: dict[str, Rule], options: argparse.Namespace) -> list[Run]:
    name, size = TEST_SIZE
    return [
        run
        for model, rule in rules.items()
        for factor in (0.5, 1.0, 2.0)
        for run in rate_runs(model, name, size, rule(size[0]) * factor, options)
    ]


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Print the tables of what is finished; returns their figures."""
    lines, rules = rates_table(options)
    print("\n".join(lines))
    found: dict[str, Any] = {"rules": {}}
    for model, rule in rules.items():
        full = rule(FULL_WIDTH)
        found["rules"][model] = {"a": rule.a, "b": rule.b, "full_width": full}
        print(f"\n{model}: best rate = {rule.a:.3g} · width ** {rule.b:.2f}; at {FULL_WIDTH} wide {full:.2g}")
        runs = [run for run in runs_at_fourth_size({model: rule}, options) if run.result()]
        for run in runs:
            print(f"  test at {TEST_SIZE[1][0]} × {TEST_SIZE[1][1]}: {run.name}: {run.result()['validation_bpb']:.4f}")
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
    parser.add_argument("--only", choices=("rates", "test", "repeats"), help="this part [default: all, in order]")
    parser.add_argument("--little_bytes", type=int, default=500_000, help="text of repeats [default 500000]")
    parser.add_argument("--table", action="store_true", help="only print what is finished")
    parser.add_argument("--json", type=Path, help="also write the rules here")
    options = settled(parser.parse_args(arguments))
    if options.little_bytes < 1:
        raise UserError(f"--little_bytes {options.little_bytes}: at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    failed: list[Run] = []
    parts = () if options.table else (options.only,) if options.only else ("rates", "test", "repeats")
    if "rates" in parts:
        runs = [
            run
            for name, size in SIZES.items()
            for model, rates in RATES.items()
            for rate in rates
            for run in rate_runs(model, name, size, rate, options)
        ]
        failed += make(runs, options.root)
    if "test" in parts:
        rules = rates_table(options)[1]
        if len(rules) < len(SETTINGS):
            log.warning("the rule of %s models is known: --only rates comes first", len(rules))
        failed += make(runs_at_fourth_size(rules, options), options.root)
    if "repeats" in parts:
        failed += make(repeat_runs(options), options.root)
    found = report(options)
    if options.json:
        write_json_atomic(options.json, found)
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
