"""Fault injection: kill small real training runs repeatedly and check that resuming gives the same result.

    python -m benchmarks.reliability.fault_injection --kills 100

Each run trains, exports and packs a tiny model. It is killed with SIGKILL at random times and before every file
operation in its folder, stopped with SIGTERM, and its newest checkpoint is corrupted; after each fault it is restarted.
The result is compared with an uninterrupted run: weights and optimizer state bit by bit, all history records except
times, and the archive against the export.

At random times, signals can hit the running checkpoint writer thread. For a kill at a specific file operation, the
writer runs at the loop's next step boundary instead, so that the order of operations is deterministic.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.experiments.runner import recipe_of
from benchmarks.reliability.tiny_runs import MODELS, build_tiny_corpus, tiny_settings
from mvlm_core.errors import UserError, run_main

STEPS, CHECKPOINT_INTERVAL = 24, 4
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}
# Fields of history records and checkpoint states that depend on the time taken or the memory in use, so that even an
# identical run differs in them. The timed steps and their seconds are zero without --max_hours, as here.
TIMES = ("seconds", "step_seconds", "spent", "timed_steps", "timed_seconds", "tokens_per_second", "memory_bytes")
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
DAMAGES = ("flip a bit", "cut in half", "delete")
PRELOAD = ["benchmarks.reliability.tiny_runs", "mvlm_core.training.run", "prioritary_mvlm.enhanced_trainer"]
PRELOAD += ["safetensors.torch", "transformers.models.gpt2", "matplotlib.pyplot"]
# A fork server with the libraries preloaded: starting a process takes 20 ms instead of seconds.
CONTEXT = multiprocessing.get_context("forkserver")


def before_file_operations(place: str, do: Callable[[], None]) -> None:
    """Call ``do`` before each of this process's file operations below ``place``.

    Uses Python's audit hooks, so the tested code runs unmodified.
    """

    def hook(event: str, arguments: tuple) -> None:
        if event in FILE_EVENTS and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.fsdecode(arguments[0])
            if path.startswith(place) or not os.path.isabs(path):  # shutil.rmtree names files relatively
                do()

    sys.addaudithook(hook)


def train_and_pack(model: str, corpus: str, place: str, **overrides: Any) -> None:
    """Train, export and pack a model as the pipeline does."""
    import torch

    from mvlm_core.errors import Stopped
    from mvlm_core.export import archive
    from mvlm_core.training.run import run_training

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    intervals = {"checkpoint_interval": CHECKPOINT_INTERVAL, "eval_interval": 6, "log_interval": 1}
    overrides |= intervals | {"max_steps": STEPS, "dropout": 0.1, "cache_dir": str(Path(corpus).parent / "cache")}
    settings = tiny_settings(model, Path(corpus), Path(place), **overrides)
    try:
        folder = run_training(recipe_of(model), settings)
    except Stopped as stop:
        sys.exit(128 + stop.signal_number)
    archive.write_archive(folder, Path(place) / f"{model}_model.tar.gz")


class DelayedThread:
    """Replaces the checkpoint writer's thread: does its work when the loop waits for it.

    That is the latest possible moment, or with ``ended`` the earliest, at the loop's next step boundary.
    """

    ended = False

    def __init__(self, target: Callable[[], None], name: str) -> None:
        self.join = target

    def start(self) -> None:
        pass

    def is_alive(self) -> bool:
        return not self.ended


class ThreadOfOneStep(DelayedThread):
    ended = True


def write_at_the_next_step() -> None:
    """Make the checkpoint writer run synchronously, at the loop's next step boundary."""
    from mvlm_core.training import checkpointer

    checkpointer.Thread = ThreadOfOneStep


def job(model: str, corpus: str, place: str, kill_before: int | None, count: Any, threads: bool) -> None:
    """Run ``train_and_pack``, killed before file operation ``kill_before``; ``threads``: write in the background."""

    def count_or_kill() -> None:
        count.value += 1
        if count.value == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)

    if not threads:
        write_at_the_next_step()
    before_file_operations(place, count_or_kill)
    train_and_pack(model, corpus, place)


@dataclass
class Outcome:
    """Results of one kind of fault for one model."""

    model: str
    fault: str
    tried: int = 0
    resumed: int = 0
    differing: int = 0
    lost_checkpoints: int = 0
    repeated: list[int] = field(default_factory=list)

    @property
    def survived(self) -> bool:
        return not self.differing and not self.lost_checkpoints


class Bench:
    """Runs of one model in subfolders of ``root``, compared with an uninterrupted run."""

    def __init__(self, model: str, root: Path) -> None:
        self.model, self.corpus, self.root = model, build_tiny_corpus(root / "corpus"), root
        self.places = (root / f"run{number}" for number in itertools.count())
        self.events = self.start(root / "undisturbed")[1]  # also starts the server and fills the cache
        self.expected = self.result(root / "undisturbed")
        started = time.perf_counter()
        self.start(root / "again")
        self.seconds = time.perf_counter() - started
        if self.result(root / "again") != self.expected:
            raise SystemExit("two uninterrupted runs differ: comparison is impossible")

    def start(self, place: Path, kill_before: int | None = None, after: float | None = None, number: int = 9):
        """Run the job in a child process; return its exit code and its number of file operations."""
        place.mkdir(exist_ok=True)
        count = CONTEXT.Value("i", 0)
        arguments = (self.model, str(self.corpus), str(place), kill_before, count, after is not None)
        process = CONTEXT.Process(target=job, args=arguments)
        process.start()
        if after is not None:
            process.join(after)
            if process.is_alive():
                os.kill(process.pid, number)
        process.join(300)
        if process.is_alive():
            process.kill()
            raise SystemExit(f"a run hung in {place}")
        return process.exitcode, count.value

    def result(self, place: Path) -> dict[str, Any]:
        """Return everything in a finished run that must not depend on interruptions."""
        from mvlm_core.export.archive import check_archive
        from mvlm_core.files import sha256_file
        from mvlm_core.training.checkpoint import newest_checkpoint

        folder, archive = place / self.model, place / f"{self.model}_model.tar.gz"
        newest = newest_checkpoint(folder / "checkpoints")
        return {
            "step": newest.step,
            "checkpoint": {n: sha256_file(newest.folder / f"{n}.safetensors") for n in ("model", "optimizer")},
            "state": without_times(newest.state),
            "export": sha256_file(folder / "model.safetensors"),
            "history": self.history(place),
            "archive": not check_archive(archive, folder),
        }

    def history(self, place: Path) -> list[dict[str, Any]]:
        from mvlm_core.training.history import read_history

        return [without_times(record) for record in read_history(place / self.model / "training_history.jsonl")]

    def resumable(self, place: Path) -> list[Path]:
        """Return the checkpoints with optimizer state, oldest first."""
        from mvlm_core.training.checkpoint import checkpoint_folders

        folders = checkpoint_folders(place / self.model / "checkpoints")
        return [folder for folder in folders if (folder / "optimizer.safetensors").exists()]

    def after_fault(self, place: Path, outcome: Outcome) -> None:
        """Inspect the state after a fault: all checkpoints must be intact; count the steps lost since the newest."""
        from mvlm_core.training.checkpoint import CheckpointError, checkpoint_folders, open_checkpoint

        outcome.tried += 1
        steps = []
        for folder in checkpoint_folders(place / self.model / "checkpoints"):
            try:
                checkpoint = open_checkpoint(folder)
            except CheckpointError:
                outcome.lost_checkpoints += 1
            else:
                steps += [] if checkpoint.state["weights_only"] else [checkpoint.step]
        if steps:
            records = self.history(place)
            outcome.repeated.append(max(0, (records[-1]["step"] if records else 0) - max(steps)))

    def finish(self, place: Path, outcome: Any, after: str) -> None:
        """Restart without faults and compare the result; ``after`` describes the fault."""
        code, _ = self.start(place)
        outcome.resumed += 1
        if code != 0 or self.result(place) != self.expected:
            outcome.differing += 1
            print(f"  differs: {after}, {place}, exit code {code}", flush=True)

    def stop_at_random(self, number: signal.Signals, count: int, rng: random.Random) -> Outcome:
        """Send each run several signals, at times drawn uniformly over its duration."""
        outcome = Outcome(self.model, f"{number.name} at a random moment")
        while outcome.tried < count:
            place = next(self.places)
            for _ in range(min(5, count - outcome.tried)):
                code, _ = self.start(place, after=rng.uniform(0, self.seconds), number=number)
                if code != 0:  # otherwise the run had already finished
                    self.after_fault(place, outcome)
            self.finish(place, outcome, outcome.fault)
        return outcome

    def kill_at_writes(self, every: int) -> Outcome:
        """Kill before every ``every``-th file operation of checkpoints, export and archive."""
        outcome = Outcome(self.model, "SIGKILL before a file operation")
        for number in range(1, self.events + 1, every):
            place = next(self.places)
            self.start(place, kill_before=number)
            self.after_fault(place, outcome)
            self.finish(place, outcome, f"{outcome.fault}, number {number}")
        return outcome

    def damage_newest(
        self, rng: random.Random, kinds: Iterable[tuple[str, str]] = tuple(itertools.product(FILES, DAMAGES))
    ) -> Outcome:
        """For each file and kind of damage: kill mid-run, damage that file in the newest checkpoint, and resume."""
        outcome = Outcome(self.model, "newest checkpoint damaged")
        for name, damage in kinds:
            place = next(self.places)
            self.start(place, kill_before=int(self.events * rng.uniform(0.4, 0.6)))
            file = self.resumable(place)[-1] / name
            content = bytearray(file.read_bytes())
            if damage == "delete":
                file.unlink()
            elif damage == "cut in half":
                file.write_bytes(content[: len(content) // 2])
            else:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                file.write_bytes(content)
            outcome.tried += 1
            self.finish(place, outcome, f"{name}, {damage}")
        return outcome


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """Return a history record or a checkpoint state without ``TIMES``."""
    return {name: value for name, value in record.items() if name not in TIMES}


def benches(models: Iterable[str]) -> Iterator[Bench]:
    """Yield a bench for each model, each in its own temporary folder."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    CONTEXT.set_forkserver_preload(PRELOAD)
    for model in models:
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            yield Bench(model, Path(folder))


def faults(bench: Bench, kills: int, every: int, seed: int) -> Iterator[Outcome]:
    rng = random.Random(seed)
    yield bench.stop_at_random(signal.SIGKILL, kills, rng)
    yield bench.kill_at_writes(every)
    yield bench.stop_at_random(signal.SIGTERM, max(5, kills // 5), rng)
    yield bench.damage_newest(rng)


def main(arguments: list[str] | None = None) -> int:
    parser = command.new_parser(__doc__)
    parser.add_argument("--kills", type=int, default=100, help="kills at random times per model [default 100]")
    parser.add_argument("--every", type=int, default=1, help="kill before every N-th file operation [default 1]")
    parser.add_argument("--only", default=",".join(MODELS), help="comma-separated models [default both]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if problems := command.at_least_one(options, "kills", "every"):
        raise UserError(problems)
    models = command.parse_only(options.only, MODELS)
    columns = ("model", "fault", "tried", "runs finished", "differing", "lost checkpoints", "steps repeated, mean")
    print(command.head(columns, left=2), flush=True)
    outcomes: list[Outcome] = []
    for bench in benches(models):
        for outcome in faults(bench, options.kills, options.every, options.seed):
            outcomes.append(outcome)
            repeated = f"{statistics.mean(outcome.repeated or [0]):.1f}"
            print(command.row((vars(outcome) | {"repeated": repeated}).values()), flush=True)
    end = f"{STEPS} steps a run, a checkpoint every {CHECKPOINT_INTERVAL}; seed {options.seed}"
    command.show(f"\n{end}", [vars(outcome) for outcome in outcomes], options)
    return 0 if all(outcome.survived for outcome in outcomes) else 1


if __name__ == "__main__":
    run_main(main)
