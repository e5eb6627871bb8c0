"""Experiment runner: each training run is a separate process; finished runs are kept, interrupted ones resumed.

An experiment defines its variants, the settings each one overrides, and its table; this module does the rest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mvlm_trainer
from benchmarks import command
from mvlm_core.console import log, outlive_terminal, setup_logging
from mvlm_core.errors import UserError, printable, run_main
from mvlm_core.export.manifest import CHECKPOINTS, training_config
from mvlm_core.files import RunLock, output_folder_problems
from mvlm_core.hardware import set_process_environment
from mvlm_core.machine import available_threads
from mvlm_core.metrics import BY_NAME as METRICS
from mvlm_core.pipeline.child_process import SignalForwarder
from mvlm_core.settings import CACHE_DIR, DEFAULT_DATA_DIR, REPOSITORY_ROOT, TrainingSettings
from mvlm_core.signals import PARENT_VARIABLE
from mvlm_core.training.distillation import teacher_and_student_settings
from prioritary_mvlm.config import NAME, PrioritaryConfig

if TYPE_CHECKING:
    from mvlm_core.training.recipe import Recipe

SETTINGS = {mvlm_trainer.NAME: mvlm_trainer.GPT2Settings, NAME: PrioritaryConfig}
EPILOG = f"""Each run trains in a separate process, like the trainers, and saves its finished model in --work_dir.
Run the command again to resume: finished runs are skipped, an interrupted one continues from its checkpoint.
{command.EXIT_CODES}"""
PATHS = {"output_dir", "cache_dir", "teacher"}  # paths, which do not identify a run
LOGGED = ("validation_bpb", "tokens_per_second", "seconds")  # metrics logged for each finished run
Figures = dict[str, Any]
ResultsBySeed = dict[str, dict[int, Figures]]  # label → seed → figures of a finished run


def recipe_of(model: str, component_swap: str | None = None) -> Recipe:
    """Return the training recipe of a model, for model 2 optionally with a swapped component. Imports torch."""
    if model == mvlm_trainer.NAME:
        return mvlm_trainer.recipe()
    from prioritary_mvlm.enhanced_trainer import RECIPE

    if not component_swap:
        return RECIPE
    from benchmarks.experiments.component_swaps import with_component_swap

    return with_component_swap(RECIPE, component_swap)


@dataclass(frozen=True)
class Variant:
    """One variant of an experiment, a row of its table.

    Attributes:
        overrides: settings that differ from the preset's and the experiment's.
        component_swap: name of the swap from ``component_swaps.py`` to apply.
    """

    model: str
    description: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    component_swap: str | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """One training run of the variant ``label``, in its own folder.

    Attributes:
        values: explicit settings, including seed and output_dir; the rest comes from the preset.
    """

    label: str
    model: str
    values: dict[str, Any]
    component_swap: str | None = None

    @property
    def seed(self) -> int:
        return self.values["seed"]

    @property
    def name(self) -> str:
        return f"{self.label}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.values["output_dir"])

    @property
    def log_file(self) -> Path:
        return self.folder.with_suffix(".log")

    def settings(self) -> TrainingSettings:
        return SETTINGS[self.model](**self.values)

    def result(self) -> Figures | None:
        """Return the results and origin of this run, or None if it is unfinished or had other settings."""
        config = training_config(self.folder)
        actual, expected = config.get("settings"), asdict(teacher_and_student_settings(self.settings())[-1])
        # A setting that was added after the run had its default value.
        if not actual or any(actual.get(name, expected[name]) != expected[name] for name in expected.keys() - PATHS):
            return None
        hardware = {key: value for key, value in config["hardware"].items() if key != "device"}
        return config["results"] | {"origin": {"corpus": config["data"]["fingerprint"], **hardware}}

    def history(self) -> list[dict[str, Any]]:
        """Return the training history of a finished run, one record per logged step."""
        return json.loads((self.folder / "training_history.json").read_text(encoding="utf-8"))


def make_runs(variants: Mapping[str, Variant], options: argparse.Namespace, shared: dict[str, Any]) -> list[Run]:
    """Create a run for each variant and seed, ordered by seed, so that an early stop leaves complete seeds and a
    machine that slows down affects all variants equally."""
    runs = []
    for seed, (label, variant) in itertools.product(range(options.seeds), variants.items()):
        place = {"seed": seed, "output_dir": str(options.root / label.replace(" ", "-") / f"seed{seed}")}
        runs.append(Run(label, variant.model, shared | variant.overrides | place, variant.component_swap))
    return runs


def run_one() -> int:
    """Execute the run given as JSON on the command line, in this process or, with several ranks, in children."""
    run = Run(**json.loads(sys.argv[1]))
    settings = run.settings().check()
    set_process_environment()
    setup_logging(settings.log_file, quiet=settings.quiet)
    from mvlm_core.training.launch import train

    recipe = partial(recipe_of, run.model, run.component_swap)
    return train(recipe, settings, ["-m", "benchmarks.experiments.runner", sys.argv[1]])


def start(run: Run, signals: SignalForwarder, jobs: int) -> subprocess.Popen[bytes]:
    """Start ``run`` in a child process with its share of the CPU threads; its output is appended to its log file."""
    run.log_file.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {PARENT_VARIABLE: str(os.getpid())}  # the run stops if this process ends
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, available_threads()[0] // jobs))
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # all runs on one GPU, instead of each on all GPUs
    child = [sys.executable, "-m", "benchmarks.experiments.runner", json.dumps(asdict(run))]
    with open(run.log_file, "ab") as file:
        return signals.start(child, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY_ROOT)


def run_all(runs: list[Run], folder: Path, options: argparse.Namespace) -> list[Run]:
    """Execute the unfinished runs, ``--jobs`` at a time, until ``--hours`` have passed; return the failed ones.

    Locks ``folder`` and survives a closed terminal.

    Raises:
        UserError: another process is using ``folder``, or settings are invalid.
        Stopped: on a signal, after the running children have saved a checkpoint.
    """
    if problems := sorted({problem for run in runs for problem in run.settings().problems()}):
        raise UserError(problems)
    outlive_terminal()
    setup_logging()
    failed, seconds, late = [], [], False
    with RunLock(folder), SignalForwarder() as signals:
        left = deque(run for run in runs if run.result() is None)
        log.info("%s runs, %s already finished", len(runs), len(runs) - len(left))
        running: dict[subprocess.Popen[bytes], tuple[Run, float]] = {}
        while running or (left and not late and signals.number is None):
            if not late and time.monotonic() >= options.deadline:
                late = True
                log.info(
                    "--hours reached with %s runs left: run the same command again to continue",
                    len(left) + len(running),
                )
                signals.send(signal.SIGTERM)
            while left and len(running) < options.jobs and not late and signals.number is None:
                run = left.popleft()
                running[start(run, signals, options.jobs)] = run, time.monotonic()
            for child, (run, started) in list(running.items()):
                if (code := signals.ended(child)) is None:
                    continue
                del running[child]
                if signals.number is not None or (late and code == 128 + signal.SIGTERM):
                    continue
                if (result := outcome(run, code)) is None:
                    failed.append(run)
                    continue
                seconds.append(time.monotonic() - started)
                minutes = statistics.mean(seconds) * (len(left) + len(running)) / options.jobs / 60
                metrics = ", ".join(f"{METRICS[name].text(result[name])} {METRICS[name].unit}" for name in LOGGED)
                log.info("%s: %s; about %.0f min left", run.name, metrics, minutes)
        signals.check()
    return failed


def outcome(run: Run, code: int) -> Figures | None:
    """Return the results of a run that has ended and remove its checkpoints; if it failed, log why and return None."""
    result = run.result() if code == 0 else None
    if result is None:
        problem = f"exit code {code}" if code else f"{run.folder} contains a run with other settings: remove it"
        tail = "\n".join(run.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        log.error("%s failed: %s; end of %s:\n%s", run.name, problem, run.log_file, printable(tail, keep="\n"))
    else:
        for checkpoint in run.folder.glob(f"{CHECKPOINTS}/step-*"):  # 80 MB per run; keep the finished model
            shutil.rmtree(checkpoint, ignore_errors=True)
    return result


def run_experiment(
    runs: list[Run],
    options: argparse.Namespace,
    table: Callable[[ResultsBySeed], str],
    figures: Callable[[Run, Figures], Figures] = lambda _run, result: result,
) -> int:
    """Execute missing runs (none with ``--table``), show the table of finished ones and return the exit code.

    Args:
        figures: what the table shows of a finished run with this result.
    """
    failed = [] if options.table else run_all(runs, options.root, options)
    finished = {run: result for run in runs if (result := run.result()) is not None}
    results: ResultsBySeed = {}
    for run, result in finished.items():
        results.setdefault(run.label, {})[run.seed] = figures(run, result)
    if results:
        command.show(table(results), results, options)
    print(f"\nPreset {options.preset}; {len(finished)} of {len(runs)} runs finished.")
    origins = {json.dumps(result["origin"]) for result in finished.values()}
    if len(origins) > 1:  # different machines, precisions or texts
        print("Runs with different origins, not to be compared:", *sorted(origins), sep="\n  ")
    return 1 if failed else 0


def command_line(
    description: str | None, name: str, choices: Iterable[str] = (), *, kind: str = "variants"
) -> argparse.ArgumentParser:
    """Create a parser with the options common to all experiments.

    Args:
        name: the experiment's folder in .cache.
        choices: choices of ``--only``; without any, the option is left out.
        kind: what the choices are, for the help text.
    """
    parser = command.new_parser(description, EPILOG)
    parser.add_argument("--preset", choices=("cpu", "smoke", "h200"), default="cpu", help="[default cpu]")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side on this machine [default 1]")
    parser.add_argument("--hours", type=float, help="stop after this time; the same command continues later")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1 [default 3]")
    parser.add_argument("--max_bytes", type=int, help="bytes of training text per run [default: the preset's]")
    parser.add_argument("--data_dir", type=Path, default=DEFAULT_DATA_DIR)
    parser.add_argument("--work_dir", type=Path, default=CACHE_DIR / name, help=f"[default .cache/{name}]")
    parser.add_argument("--table", action="store_true", help="run nothing, only print finished runs")
    if names := ", ".join(choices):
        parser.add_argument("--only", metavar=kind.upper(), help=f"comma-separated {kind} to run, from: {names}")
    return parser


def checked(options: argparse.Namespace, *counts: str) -> argparse.Namespace:
    """Check the parsed command line, make folders absolute, and add ``root``, a folder per preset and length, and
    ``deadline``.

    Args:
        counts: further options that must be at least 1.

    Raises:
        UserError: with all problems at once.
    """
    options.data_dir, options.work_dir = options.data_dir.absolute(), options.work_dir.absolute()
    options.root = options.work_dir / "-".join(str(part) for part in (options.preset, options.max_bytes) if part)
    problems = output_folder_problems(options.work_dir, "--work_dir")
    problems += command.at_least_one(options, "seeds", "jobs", "max_bytes", *counts)
    if options.hours is not None and not 0 < options.hours < math.inf:
        problems.append(f"--hours {options.hours:g}: must be above 0")
    options.deadline = math.inf if options.hours is None else time.monotonic() + 3600 * options.hours
    if problems:
        raise UserError(problems)
    return options


def shared_values(options: argparse.Namespace, *, test_score: bool = False) -> dict[str, Any]:
    """Return the settings shared by all runs of an experiment."""
    values = {"preset": options.preset, "quiet": True, "no_test_score": not test_score}
    values |= {"data_dir": str(options.data_dir), "cache_dir": str(CACHE_DIR)}
    if options.preset == "h200":  # no teachers: a ninth to an eleventh of the preset's compute
        values |= {"num_models": 1, "num_epochs": None if options.max_bytes else 3.0}
    return values | ({"max_bytes": options.max_bytes} if options.max_bytes else {})


if __name__ == "__main__":
    run_main(run_one)
