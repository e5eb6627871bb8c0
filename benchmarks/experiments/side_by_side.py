"""Compare both models with one preset on several seeds: the final table and the README's figure.

    python -m benchmarks.experiments.side_by_side --seeds 3 --plot docs/side_by_side.png

The two models of a seed run back to back, so that a machine that slows down affects both. Test scores are those that
the trainers compute once, from the exported models.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.experiments import runner
from benchmarks.experiments.runner import SETTINGS, Figures, ResultsBySeed, Run, Variant
from mvlm_core.errors import run_main
from mvlm_core.export.plots import BY_TEXT, BY_TIME, STYLES
from mvlm_core.files import write_atomic
from mvlm_core.metrics import METRICS

NAMES = tuple(SETTINGS)


def make_runs(options: argparse.Namespace) -> list[Run]:
    variants = {name: Variant(name) for name in NAMES}
    return runner.make_runs(variants, options, runner.shared_values(options, test_score=True))


def figures(run: Run, result: Figures) -> Figures:
    """Return a finished run's results and its evaluations."""
    return result | {"evaluations": [record for record in run.history() if "validation_bpb" in record]}


def reached(first: Figures, second: Figures) -> dict[str, float] | None:
    """Return the shares of the first model's text and seconds in which the second matches its final validation.

    Interpolates between evaluations, but not before the first one; None if the second model never matches it.
    """
    goal, before = first["validation_bpb"], None
    for record in second["evaluations"]:
        if record["validation_bpb"] <= goal:
            before = before or record
            fall = before["validation_bpb"] - record["validation_bpb"]
            way = (before["validation_bpb"] - goal) / fall if fall else 0.0
            return {key: (before[key] + way * (record[key] - before[key])) / first[key] for key in ("bytes", "seconds")}
        before = record
    return None


def pairs(results: ResultsBySeed) -> list[tuple[Figures, Figures]]:
    """Return both models' figures for the seeds that both have finished."""
    first, second = (results.get(name, {}) for name in NAMES)
    return [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]


def table(results: ResultsBySeed) -> str:
    seeds = pairs(results)
    rows: list[tuple[str, ...]] = []
    for metric in METRICS:
        columns = [[one.get(metric.name) for one in models] for models in zip(*seeds, strict=True)]
        if not columns or any(value is None for column in columns for value in column):
            continue
        ratios = [second / first for first, second in zip(*columns, strict=True)]
        cells = (command.spread(column, metric.form) for column in columns)
        rows.append((metric.title, *cells, command.spread(ratios, "{:.3f}")))
    shares = [share for share in (reached(*models) for models in seeds) if share is not None]
    for key, words in (("bytes", "text"), ("seconds", "seconds")):
        if shares and len(shares) == len(seeds):
            value = command.spread([share[key] for share in shares], "{:.3f}")
            rows.append((f"share of {NAMES[0]}'s {words} to reach its final validation", "", value, ""))
    return command.table((f"{len(seeds)} seeds: mean (min … max)", *NAMES, "ratio, paired by seed"), rows)


def plot(results: ResultsBySeed, path: Path) -> None:
    """Plot validation against text and time: mean over seeds as a line, range as a band."""
    import numpy as np
    from matplotlib.figure import Figure

    figure, seeds = Figure(figsize=(10, 4.2), layout="constrained"), pairs(results)  # no pyplot: no display, no state
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (key, unit, xlabel) in zip(panels, (BY_TEXT, BY_TIME), strict=True):
        for style, name, models in zip(STYLES, NAMES, zip(*seeds, strict=True), strict=True):
            runs: list[list[dict[str, Any]]] = [one["evaluations"] for one in models]
            steps = range(min(len(run) for run in runs))
            x = np.mean([[run[step][key] / unit for step in steps] for run in runs], axis=0)
            y = np.array([[run[step]["validation_bpb"] for step in steps] for run in runs])
            axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=style["color"], alpha=0.3, linewidth=0)
            look: dict[str, Any] = {part: style[part] for part in ("color", "linestyle", "marker")}
            axes.plot(x, y.mean(axis=0), label=name, markersize=4, **look)
            if name == NAMES[0]:
                axes.axhline(y[:, -1].mean(), color="0.4", linewidth=1, linestyle=":")
        axes.set(xlabel=xlabel, xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("validation, bits per byte")
    title = f"validation books of the primary translation; line: mean of {len(seeds)} seeds, band: range"
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = runner.command_line(__doc__, "side_by_side")
    parser.add_argument("--plot", type=Path, help="save the figure to this file")
    return runner.checked(parser.parse_args(arguments))


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)

    def show(results: ResultsBySeed) -> str:
        if options.plot and pairs(results):
            plot(results, options.plot)
        return table(results)

    return runner.run_experiment(make_runs(options), options, show, figures)


if __name__ == "__main__":
    run_main(main)
