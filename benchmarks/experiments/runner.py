"""Trainings as trials: each a process of its own, kept when finished, continued when interrupted.

``ablations.py``, ``side_by_side.py``, ``mixes.py`` and ``scaling.py`` say which; this room runs them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mvlm_trainer
from mvlm_core.console import log, outlive_terminal, setup_logging
from mvlm_core.errors import LINE_BREAK, UserError, printable, run_main
from mvlm_core.export.folder import read_training_config
from mvlm_core.files import RunLock, output_folder_problems
from mvlm_core.hardware import set_process_environment
from mvlm_core.pipeline.child_process import Signals
from mvlm_core.settings import CACHE_DIR, DEFAULT_DATA_DIR, REPOSITORY_ROOT, TrainingSettings
from mvlm_core.signals import PARENT_VARIABLE
from prioritary_mvlm.config import PrioritaryConfig

if TYPE_CHECKING:
    from mvlm_core.training.run import Recipe

SETTINGS = {"mvlm_gpt2": mvlm_trainer.GPT2Settings, "simone_enhanced": PrioritaryConfig}
FIGURES = ("parameters", "validation_bpb", "tokens_per_second", "seconds", "steps", "best_step", "bytes", "rollbacks")
PLACES = {"output_dir", "cache_dir"}  # settings that say where, not what


def recipe_of(model: str) -> Recipe:
    """How a model of this name is built and trained; loads torch."""
    if model == "mvlm_gpt2":
        return mvlm_trainer.recipe()
    from prioritary_mvlm.enhanced_trainer import RECIPE

    return RECIPE


@dataclass(frozen=True)
class Run:
    """One training, in a folder of its own.

    Attributes:
        label: what it tries, in a word; runs that differ in the seed alone share it.
        model: "mvlm_gpt2" or "simone_enhanced".
        values: the settings that are given, seed and output_dir among them; the rest is the preset's.
        classic_part: the one of ``classic_parts.py`` to train with; the folder must be another for each.
    """

    label: str
    model: str
    values: dict[str, Any]
    classic_part: str | None = None

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
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def settings(self) -> TrainingSettings:
        return SETTINGS[self.model](**self.values)

    def result(self) -> dict[str, Any] | None:
        """The figures and the origin of this run, or None while it is not finished (or was another)."""
        config = read_training_config(self.folder)
        made, wanted = (config or {}).get("settings"), self.settings().as_dict()
        # A setting that is younger than the run was as its default is.
        if not made or any(made.get(name, wanted[name]) != wanted[name] for name in wanted.keys() - PLACES):
            return None
        hardware = {key: value for key, value in config["hardware"].items() if key != "device"}
        origin = {"corpus": config["data"]["fingerprint"], **hardware}
        return {name: config["results"][name] for name in FIGURES} | {"origin": origin}


def run_one() -> None:
    """One run in this process, by the command line's ``{"model": …, "settings": {…}, "classic_part": …}``."""
    given = json.loads(sys.argv[1])
    settings = SETTINGS[given["model"]](**given["settings"]).check()
    set_process_environment()
    setup_logging(settings.log_file, quiet=settings.quiet)
    from mvlm_core.training.run import run_training

    if given.get("classic_part"):
        from benchmarks.experiments.classic_parts import CLASSIC_PARTS

        CLASSIC_PARTS[given["classic_part"]]()
    run_training(recipe_of(given["model"]), settings)


def execute(run: Run, signals: Signals) -> tuple[int, str]:
    """Run in a child process with its output in the run's log; returns its exit code and its last lines."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    job = json.dumps({"model": run.model, "settings": run.values, "classic_part": run.classic_part})
    with open(run.log, "a+b") as file:
        before = file.seek(0, os.SEEK_END)
        environment = os.environ | {PARENT_VARIABLE: str(os.getpid())}  # no run outlives this process
        command = [sys.executable, "-m", "benchmarks.experiments.runner", job]
        signals.start(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY_ROOT)
        code = signals.wait()
        file.seek(before)
        return code, "\n".join(file.read().decode("utf-8", "replace").splitlines()[-15:])


def run_all(runs: list[Run], signals: Signals) -> list[Run]:
    """Run what is not finished; returns what failed.

    Raises:
        Stopped: by a signal, after the running child has written its checkpoint.
    """
    left, failed, seconds = [run for run in runs if run.result() is None], [], []
    log.info("%s runs, %s of them finished already", len(runs), len(runs) - len(left))
    for number, run in enumerate(left, 1):
        started = time.monotonic()
        code, tail = execute(run, signals)
        signals.check()
        result = run.result() if code == 0 else None
        if result is None:
            failed.append(run)
            problem = f"exit code {code}" if code else f"{run.folder} holds a run of other settings: remove it"
            log.error("%s failed: %s; %s ends:\n%s", run.name, problem, run.log, printable(tail, LINE_BREAK))
            continue
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)  # the finished model stays; these are 80 MB a run
        seconds.append(time.monotonic() - started)
        log.info(
            "%s of %s  %s: %.4f bits per byte, %s tokens/s, %.0f s of training; about %.0f min left",
            number,
            len(left),
            run.name,
            result["validation_bpb"],
            f"{result['tokens_per_second']:,.0f}",
            result["seconds"],
            statistics.mean(seconds) * (len(left) - number) / 60,
        )
    return failed


def make(runs: list[Run], folder: Path) -> list[Run]:
    """``run_all`` as a command does it: alone in ``folder``, and through a closed terminal; returns what failed.

    Raises:
        UserError: another process works in ``folder``.
        Stopped: by a signal, after the running child has written its checkpoint.
    """
    outlive_terminal()
    setup_logging()
    with RunLock(folder, str(folder)), Signals() as signals:
        return run_all(runs, signals)


def command_line(description: str, name: str) -> argparse.ArgumentParser:
    """A parser with what every command of trials takes; ``name`` is of the folder below .cache."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("cpu", "smoke"), default="cpu", help="[default cpu]")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1 [default 3]")
    parser.add_argument("--max_bytes", type=int, help="bytes of training text a run [default: the preset's]")
    parser.add_argument("--data_dir", type=Path, default=DEFAULT_DATA_DIR)
    parser.add_argument("--work_dir", type=Path, default=CACHE_DIR / name, help=f"[default .cache/{name}]")
    return parser


def settled(options: argparse.Namespace) -> argparse.Namespace:
    """The parsed command line with absolute folders, and ``root``: a folder for each preset and length.

    Raises:
        UserError: every problem with it.
    """
    options.data_dir, options.work_dir = options.data_dir.absolute(), options.work_dir.absolute()
    # Runs of another length are other runs: a preset and a budget have a folder of their own.
    options.root = options.work_dir / "-".join(str(part) for part in (options.preset, options.max_bytes) if part)
    problems = output_folder_problems(options.work_dir, "--work_dir")
    if options.seeds < 1:
        problems.append(f"--seeds {options.seeds}: at least 1")
    if problems:
        raise UserError(problems)
    return options


def values_of(options: argparse.Namespace, *, test_score: bool = False) -> dict[str, Any]:
    """The settings that all runs of a command share."""
    values = {"preset": options.preset, "quiet": True, "no_test_score": not test_score}
    values |= {"data_dir": str(options.data_dir), "cache_dir": str(CACHE_DIR)}
    return values | ({"max_bytes": options.max_bytes} if options.max_bytes else {})


if __name__ == "__main__":
    run_main(run_one)
