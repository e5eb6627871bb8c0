#!/usr/bin/env python3
"""Little text, read many times: both models on the King James train text alone.

    python -m benchmarks.experiments.data_constrained                       all lines, one seed: hours on two cores
    python -m benchmarks.experiments.data_constrained --only committee
    python -m benchmarks.experiments.data_constrained --only "sweep,sweep dropout"

Each line is judged by the King James validation and test books. GPT-2's settings come from the lines of its sweep,
which run only when named (--help names them all), model 2's from shorter runs. A run is shared by --processes processes
of one thread, which is faster than one process of so many threads at these sizes. Run the command again and it goes on
where it stopped.

Exit codes: 0 done, 1 a run failed (the others still ran), 2 bad arguments, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from typing import Any

from benchmarks.experiments.runner import Run, command_line, make, settled, values_of
from mvlm_core.errors import UserError, run_main
from mvlm_core.export.folder import read_training_config
from mvlm_core.monitor import available_threads

TEXT = {"data_subset": "bible/kjv", "train_mix": "", "max_length": 256, "batch_size": 16, "eval_interval": 100}
SMALLER = {"hidden_dim": 192, "num_heads": 3, "ff_dim": 768, "num_layers": 6}
LARGER = {"hidden_dim": 256, "num_heads": 4, "ff_dim": 1024, "num_layers": 6}
SHORT = {"hidden_dim": 128, "num_heads": 2, "ff_dim": 512, "num_layers": 4, "num_epochs": 4.0}
FIRST = {"learning_rate": 0.003, "batch_size": 8, "eval_interval": 200, "dropout": 0.0, "weight_decay": 0.4}
SECOND = {"output_head": "tied", "learning_rate": 0.02, "adamw_learning_rate": 0.006, "unigram_noise": 0.03}
# About equal arithmetic, not equal parameters: two of the smaller ones or one of the larger for seven epochs.
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "committee": (
        "simone_enhanced",
        SMALLER | SECOND | {"num_members": 2, "num_epochs": 7.0, "dropout": 0.1, "weight_decay": 0.2},
    ),
    "one model": (
        "simone_enhanced",
        LARGER | SECOND | {"adamw_learning_rate": 0.005, "num_epochs": 7.0, "dropout": 0.12, "weight_decay": 0.2},
    ),
    "GPT-2": ("mvlm_gpt2", SMALLER | FIRST | {"num_epochs": 7.0}),
}
# What the settings of GPT-2's line are chosen by: a smaller one, one thing changed at a time, without the test books.
SWEEP: dict[str, tuple[str, dict[str, Any]]] = {
    f"sweep{name}": ("mvlm_gpt2", SHORT | FIRST | {"no_test_score": True} | change)
    for name, change in {
        "": {},
        " dropout": {"dropout": 0.1},
        " decay": {"weight_decay": 0.1},
        " half the rate": {"learning_rate": FIRST["learning_rate"] / 2},
        " twice the rate": {"learning_rate": FIRST["learning_rate"] * 2},
        " half the batch": {"batch_size": FIRST["batch_size"] // 2},
        " twice the batch": {"batch_size": FIRST["batch_size"] * 2},
    }.items()
}
FIGURES = ("parameters", "epochs", "seconds", "train_bpb", "validation_bpb")


def plan(options: argparse.Namespace) -> list[Run]:
    """A run for each line and seed.

    Raises:
        UserError: a line that is not there.
    """
    known = LINES | SWEEP
    names = options.only.split(",") if options.only else list(LINES)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--only {', '.join(unknown)}: choose from {', '.join(known)}")
    shared = values_of(options, test_score=True) | {"processes": options.processes}
    runs = []
    for seed in range(options.seeds):
        for name in names:
            model, values = known[name]
            place = {"seed": seed, "output_dir": str(options.root / name.replace(" ", "-") / f"seed{seed}")}
            runs.append(Run(name, model, shared | TEXT | values | place))
    return runs


def figures(run: Run) -> dict[str, float]:
    """What the table shows of a finished run; ``train_bpb`` is the mean of the last tenth of its steps."""
    results = read_training_config(run.folder)["results"]
    history = json.loads((run.folder / "training_history.json").read_text(encoding="utf-8"))
    last = history[-max(1, len(history) // 10) :]
    nats = statistics.mean(record["train_loss"] for record in last if "train_loss" in record)
    bytes_per_token = results["bytes"] / results["tokens"]
    return results | {"epochs": history[-1]["epoch"], "train_bpb": nats / math.log(2) / bytes_per_token}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """A row for each line with finished runs: means over the seeds."""
    lines = ["| line | seeds | parameters | epochs | minutes | train, last tenth | validation | test |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, runs in found.items():
        mean = {key: statistics.mean(run[key] for run in runs) for key in FIGURES}
        tested = [run["test_bpb_kjv"] for run in runs if run.get("test_bpb_kjv") is not None]
        test = f"{statistics.mean(tested):.4f}" if tested else "–"
        lines.append(
            f"| {name} | {len(runs)} | {mean['parameters']:,.0f} | {mean['epochs']:.1f} | {mean['seconds'] / 60:.0f} "
            f"| {mean['train_bpb']:.3f} | {mean['validation_bpb']:.4f} | {test} |"
        )
    return "\n".join(lines)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: every problem with it.
    """
    parser = command_line(__doc__, "little_text")
    parser.set_defaults(seeds=1)
    parser.add_argument("--only", help="these lines, with commas between: " + ", ".join(LINES | SWEEP))
    parser.add_argument(
        "--processes", type=int, default=available_threads()[0], help="that share a run [default: one a core]"
    )
    options = parser.parse_args(arguments)
    if options.processes < 1:
        raise UserError(f"--processes {options.processes}: at least 1")
    return settled(options)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    runs = plan(options)
    failed = make(runs, options.root)
    found: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        if run.result() is not None:
            found.setdefault(run.label, []).append(figures(run))
    print(table(found))
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
