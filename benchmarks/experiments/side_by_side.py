#!/usr/bin/env python3
"""Both models by one preset on several seeds: the final table, and the figure of the README.

Each run is a process of its own and keeps its finished model below --work_dir; run the command again and it goes on
where it stopped. The two models of a seed run one after the other, so that a machine that grows slower does so for
both. Test scores are those that the trainers compute once, from the exported files.

Exit codes: 0 done, 1 a run failed (the others still ran), 2 bad arguments, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.experiments.runner import SETTINGS, Run, command_line, make, settled, values_of
from mvlm_core.errors import run_main
from mvlm_core.export.folder import read_training_config
from mvlm_core.files import write_atomic, write_json_atomic
from mvlm_core.pipeline.plots import STYLES

NAMES = tuple(SETTINGS)
ROWS = (
    ("parameters", "parameters", "{:,.0f}"),
    ("bytes of training text", "bytes", "{:,.0f}"),
    ("seconds of training", "seconds", "{:.0f}"),
    ("tokens per second", "tokens_per_second", "{:,.0f}"),
    ("validation, bits per byte", "validation_bpb", "{:.4f}"),
    ("test, bits per byte", "test_bpb", "{:.4f}"),
    ("test, King James part", "test_bpb_kjv", "{:.4f}"),
)


def plan(options: argparse.Namespace) -> list[Run]:
    shared = values_of(options, test_score=True)
    return [
        Run(name, name, shared | {"seed": seed, "output_dir": str(options.root / name / f"seed{seed}")})
        for seed in range(options.seeds)
        for name in NAMES
    ]


def collect(runs: list[Run]) -> dict[int, dict[str, dict[str, Any]]]:
    """Seed → model → results and evaluations, of the seeds that both models have finished."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for run in runs:
        if run.result() is not None:
            history = json.loads((run.folder / "training_history.json").read_text(encoding="utf-8"))
            evaluations = [record for record in history if "validation_bpb" in record]
            results = read_training_config(run.folder)["results"]
            found.setdefault(run.seed, {})[run.model] = results | {"evaluations": evaluations}
    return {seed: models for seed, models in found.items() if len(models) == len(NAMES)}


def reached(first: dict[str, Any], second: dict[str, Any]) -> dict[str, float] | None:
    """Shares of the first model's text and seconds after which the second evaluates at most at the first's end.

    None where it never does.
    """
    goal = first["validation_bpb"]
    for record in second["evaluations"]:
        if record["validation_bpb"] <= goal:
            return {key: record[key] / first[key] for key in ("bytes", "seconds")}
    return None


def spread(values: list[float], form: str) -> str:
    """Mean, and least and most where there are several that differ in what is shown."""
    shown = [form.format(of(values)) for of in (statistics.mean, min, max)]
    return shown[0] if shown[1] == shown[2] else "{} ({} … {})".format(*shown)


def table(seeds: dict[int, dict[str, dict[str, Any]]]) -> str:
    first, second = NAMES
    lines = [f"| {len(seeds)} seeds: mean (least … most) | {first} | {second} | ratio, seed by seed |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for words, key, form in ROWS:
        columns = [[models[name][key] for models in seeds.values()] for name in NAMES]
        if any(value is None for column in columns for value in column):
            continue
        ratios = [b / a for a, b in zip(*columns, strict=True)]
        lines.append(f"| {words} | {' | '.join(spread(c, form) for c in columns)} | {spread(ratios, '{:.3f}')} |")
    shares = [reached(models[first], models[second]) for models in seeds.values()]
    for key, words in (("bytes", "text"), ("seconds", "seconds")):
        if None not in shares:
            value = spread([share[key] for share in shares], "{:.3f}")
            lines.append(f"| share of {first}'s {words} until its final validation is reached | | {value} | |")
    return "\n".join(lines)


def plot(seeds: dict[int, dict[str, dict[str, Any]]], path: Path) -> None:
    """Validation against text and against seconds: the mean of the seeds as a line, least to most as a band."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no display is asked for and no global state is left
    panels = zip(figure.subplots(1, 2, sharey=True), (("bytes", 1e6), ("seconds", 1.0)), strict=True)
    words = {"bytes": "training text read, MB", "seconds": "seconds of training"}
    for axes, (key, unit) in panels:
        for style, name in zip(STYLES, NAMES, strict=True):
            runs = [models[name]["evaluations"] for models in seeds.values()]
            steps = range(min(len(run) for run in runs))
            x = np.mean([[run[step][key] / unit for step in steps] for run in runs], axis=0)
            y = np.array([[run[step]["validation_bpb"] for step in steps] for run in runs])
            axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=style["color"], alpha=0.3, linewidth=0)
            line = {"color": style["color"], "linestyle": style["linestyle"], "marker": style["marker"]}
            axes.plot(x, y.mean(axis=0), label=name, markersize=4, **line)
            if name == NAMES[0]:
                axes.axhline(y[:, -1].mean(), color="0.4", linewidth=1, linestyle=":")
        axes.set(xlabel=words[key], xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("validation, bits per byte")
    figure.suptitle(f"King James validation books; line: mean of {len(seeds)} seeds, band: least to most", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: every problem with it.
    """
    parser = command_line(__doc__, "side_by_side")
    parser.add_argument("--plot", type=Path, help="draw the figure here")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    return settled(parser.parse_args(arguments))


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    runs = plan(options)
    failed = make(runs, options.root)
    seeds = collect(runs)
    if seeds:
        print(table(seeds))
        if options.plot:
            plot(seeds, options.plot)
        if options.json:
            write_json_atomic(options.json, {"preset": options.preset, "max_bytes": options.max_bytes, "seeds": seeds})
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
