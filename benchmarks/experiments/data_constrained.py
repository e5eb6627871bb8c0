"""Data-constrained training: both models read the primary translation's train text alone, many times.

    python -m benchmarks.experiments.data_constrained                       all lines, one seed: hours on two cores
    python -m benchmarks.experiments.data_constrained --only ensemble
    python -m benchmarks.experiments.data_constrained --only "sweep,sweep dropout"

Each line is judged by the primary translation's validation and test books. GPT-2's settings come from the lines of its
sweep, which run only when named, model 2's from shorter runs. Each run uses --processes CPU workers of one thread,
which at these sizes is faster than one process with as many threads.
"""

from __future__ import annotations

import argparse
import math
import statistics

from benchmarks import command
from benchmarks.experiments import runner
from benchmarks.experiments.runner import Figures, Found, Line, Run
from bible_corpus.books import PRIMARY_TRANSLATION
from mvlm_core.errors import run_main
from mvlm_core.metrics import PRIMARY_TEST_BPB
from mvlm_core.monitor import available_threads

TEXT = {"data_subset": f"bible/{PRIMARY_TRANSLATION}", "train_mix": "", "max_length": 256, "batch_size": 16}
SMALLER = {"hidden_dim": 192, "num_heads": 3, "ff_dim": 768, "num_layers": 6}
LARGER = {"hidden_dim": 256, "num_heads": 4, "ff_dim": 1024, "num_layers": 6}
SHORT = {"hidden_dim": 128, "num_heads": 2, "ff_dim": 512, "num_layers": 4, "num_epochs": 4.0}
FIRST = {"learning_rate": 0.003, "batch_size": 8, "eval_interval": 200, "dropout": 0.0, "weight_decay": 0.4}
SECOND = {"output_head": "tied", "learning_rate": 0.02, "unigram_noise": 0.03, "num_epochs": 7.0, "weight_decay": 0.2}
# About equal arithmetic, not equal parameters: two of the smaller ones or one of the larger for seven epochs.
LINES = {
    "ensemble": Line(
        "simone_enhanced", changes=SMALLER | SECOND | {"num_models": 2, "adamw_learning_rate": 0.006, "dropout": 0.1}
    ),
    "one model": Line("simone_enhanced", changes=LARGER | SECOND | {"adamw_learning_rate": 0.005, "dropout": 0.12}),
    "GPT-2": Line("mvlm_gpt2", changes=SMALLER | FIRST | {"num_epochs": 7.0}),
}
# How the settings of GPT-2's line were chosen: a smaller model, one thing changed at a time, without the test books.
SWEEP = {
    f"sweep{name}": Line("mvlm_gpt2", changes=SHORT | FIRST | {"no_test_score": True} | change)
    for name, change in {
        "": {},
        " dropout": {"dropout": 0.1},
        " decay": {"weight_decay": 0.1},
        " half the learning rate": {"learning_rate": FIRST["learning_rate"] / 2},
        " twice the learning rate": {"learning_rate": FIRST["learning_rate"] * 2},
        " half the batch": {"batch_size": FIRST["batch_size"] // 2},
        " twice the batch": {"batch_size": FIRST["batch_size"] * 2},
    }.items()
}


def plan(options: argparse.Namespace) -> list[Run]:
    """A run for each line and seed.

    Raises:
        UserError: an unknown line.
    """
    known = LINES | SWEEP
    lines = {name: known[name] for name in command.chosen(options.only, known, LINES)}
    shared = runner.shared_values(options, test_score=True) | {"eval_interval": 100, "processes": options.processes}
    return runner.plan(lines, options, shared | TEXT)


def figures(run: Run) -> Figures:
    """A finished run's results with its epochs and ``train_bpb``, the mean of the last tenth of its steps."""
    results, history = run.result(), run.history()
    last = history[-max(1, len(history) // 10) :]
    nats = statistics.mean(record["train_loss"] for record in last if "train_loss" in record)
    bytes_per_token = results["bytes"] / results["tokens"]
    return results | {"epochs": history[-1]["epoch"], "train_bpb": nats / math.log(2) / bytes_per_token}


def table(found: Found) -> str:
    """A row for each line with finished runs: means over the seeds."""
    columns = ("line", "seeds", "parameters", "epochs", "minutes", "train, last tenth", "validation", "test")
    keys = {"parameters": "{:,.0f}", "epochs": "{:.1f}", "minutes": "{:.0f}", "train_bpb": "{:.3f}"}
    keys |= {"validation_bpb": "{:.4f}", PRIMARY_TEST_BPB: "{:.4f}"}
    rows = []
    for name, seeds in found.items():
        runs = [one | {"minutes": one["seconds"] / 60} for one in seeds.values()]
        values = {key: [run[key] for run in runs if run[key] is not None] for key in keys}
        cells = [form.format(statistics.mean(values[key])) if values[key] else "–" for key, form in keys.items()]
        rows.append((name, len(seeds), *cells))
    return command.table(columns, rows)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = runner.command_line(__doc__, "data_constrained", LINES | SWEEP)
    parser.set_defaults(seeds=1)
    parser.add_argument(
        "--processes", type=int, default=available_threads()[0], help="CPU workers per run [default: one per core]"
    )
    return runner.settled(parser.parse_args(arguments), "processes")


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    return runner.conduct(plan(options), options, table, figures)


if __name__ == "__main__":
    run_main(main)
