"""Simulate power loss after every file operation of small real runs, and check what survives on disk.

    python -m benchmarks.reliability.power_loss --resumed 20

Records runs of a tiny model (from scratch, resumed after a kill, rolled back to an older checkpoint): every change to
directory entries and file contents in the run's folder, and every fsync. Each prefix of the recording is replayed as
three possible disk states: unflushed changes are lost; all names exist, but unflushed content is truncated or zeroed
from the middle on; a random subset of the unflushed changes reached the disk. The readers are then run on each state:
the newest checkpoint must be intact and at least as new as the last completed save, with its best checkpoint; the
history must match the uninterrupted run's and reach at least that checkpoint; an export or archive that validates must
match the uninterrupted run's. A random sample of states is resumed to the end and compared bit by bit.

Directories use the strictest POSIX semantics: an entry exists only after its directory was fsynced.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import command
from benchmarks.reliability.fault_injection import (
    CONTEXT,
    MODELS,
    Bench,
    before_file_operations,
    benches,
    train_and_pack,
    write_at_the_next_step,
)
from mvlm_core.errors import UserError, run_main

ROOT = 0
DROPPED, TORN, MIXED = "dropped", "torn", "mixed"
WAYS = (DROPPED, TORN, MIXED)
Content = dict[str, int] | bytes  # folder: name → item; file: its bytes
Tree = dict[str, bytes | None]  # path below the run's folder → content, None for a folder


@dataclass(frozen=True)
class Promised:
    """Durability guarantees at some point: step of the newest checkpoint (-1: none), finished export and archive."""

    step: int = -1
    exported: bool = False
    archived: bool = False


class Operation(NamedTuple):
    """A recorded event: "write" of a new ``value``, "sync" of a file or folder, or a new "promise" ``value``."""

    kind: str
    item: int = -1
    value: Any = None


class Recorder:
    """Record changes below a folder by inspecting it before each of this process's file operations there.

    This also captures writes by native libraries, as changes since the previous operation.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.promised = place, Promised()
        self.operations: list[Operation] = []
        self._items: dict[int, int] = {}  # inode → item
        self._contents: dict[int, Content] = {}
        self._count, self._looking = ROOT, False
        self.look()
        self.operations += [Operation("sync", item) for item in self._contents]  # the initial content is flushed
        self.start = len(self.operations)
        self._fsync, os.fsync = os.fsync, self._sync
        before_file_operations(str(place), self.look)

    def promise(self, **fields: Any) -> None:
        """Record a new durability guarantee, with these fields of ``Promised`` replaced."""
        self.look()
        self.promised = replace(self.promised, **fields)
        self.operations.append(Operation("promise", value=self.promised))

    def _sync(self, descriptor: int) -> None:
        self.look()
        self._fsync(descriptor)
        item = self._items.get(os.fstat(descriptor).st_ino)
        if item is not None:
            self.operations.append(Operation("sync", item))

    def look(self) -> None:
        """Record all changes since the last inspection: file contents first, then names."""
        if self._looking:  # ignore the file operations of the inspection itself
            return
        contents: dict[int, Content] = {}
        self._looking = True
        self._visit(self.place, contents)
        self._looking = False
        for item, content in sorted(contents.items(), key=lambda pair: isinstance(pair[1], dict)):
            if content != self._contents.get(item):
                self.operations.append(Operation("write", item, content))
        self._contents = contents
        # A freed inode may be reused by another file.
        self._items = {inode: item for inode, item in self._items.items() if item in contents}

    def _visit(self, path: Path, contents: dict[int, Content]) -> int:
        """Return the item at ``path``; add its content, and everything below it, to ``contents``."""
        inode = path.stat(follow_symlinks=False).st_ino
        if inode not in self._items:
            self._items[inode], self._count = self._count, self._count + 1
        item = self._items[inode]
        if path.is_dir():
            contents[item] = {child.name: self._visit(child, contents) for child in sorted(path.iterdir())}
        else:
            contents[item] = path.read_bytes()
        return item


def recorded_job(sender: Connection, model: str, corpus: str, place: str, overrides: dict[str, Any]) -> None:
    """Child process: run ``train_and_pack`` and send the recorded disk operations."""
    from mvlm_core.export import archive
    from mvlm_core.training import checkpoint as checkpoints

    write_at_the_next_step()
    save, pack, set_aside = checkpoints.save_checkpoint, archive.write_archive, checkpoints.set_aside_newer
    recorder = Recorder(Path(place))

    def recorded_save(root: Path, step: int, tensors: Any, state: dict[str, Any]) -> Path:
        folder = save(root, step, tensors, state)
        if not state["weights_only"]:
            recorder.promise(step=step)
        return folder

    def recorded_pack(*arguments: Any) -> str:
        recorder.promise(exported=True)
        digest = pack(*arguments)
        recorder.promise(archived=True)
        return digest

    def recorded_return(root: Path, step: int) -> None:
        recorder.promise(step=step)
        set_aside(root, step)

    checkpoints.save_checkpoint, checkpoints.set_aside_newer = recorded_save, recorded_return
    archive.write_archive = recorded_pack
    train_and_pack(model, corpus, place, **overrides)
    sender.send((recorder.operations, recorder.start))
    sender.close()


class Disk:
    """Disk with a write cache: for each file and folder, the flushed content followed by unflushed versions."""

    def __init__(self) -> None:
        self.contents: dict[int, list[Any]] = {ROOT: [{}]}

    def apply(self, operation: Operation) -> None:
        item = operation.item
        if operation.kind == "write":
            self.contents.setdefault(item, [type(operation.value)()]).append(operation.value)
        elif operation.kind == "sync":
            self.contents[item] = self.contents[item][-1:]

    def after_power_loss(self, way: str, rng: random.Random) -> Tree:
        """Return the files and folders found after the power loss."""
        tree: Tree = {}

        def find(folder: int, path: str) -> None:
            contents = self.contents[folder]
            entries = {DROPPED: contents[0], TORN: contents[-1], MIXED: rng.choice(contents)}[way]
            for name, item in entries.items():
                if isinstance(self.contents[item][0], dict):
                    tree[path + name] = None
                    find(item, f"{path}{name}/")
                else:
                    tree[path + name] = torn(self.contents[item], way, rng)

        find(ROOT, "")
        return tree


def torn(contents: list[bytes], way: str, rng: random.Random) -> bytes:
    """Return a file's content after the power loss: the flushed version, or the start of a later one."""
    flushed, *later = contents
    if way == DROPPED or not later or (way == MIXED and rng.random() < 0.3):
        return flushed
    newest = later[-1] if way == TORN else rng.choice(later)
    same = len(flushed) if newest.startswith(flushed) else 0
    cut = (same + len(newest)) // 2 if way == TORN else rng.randint(same, len(newest))
    return newest[:cut] + bytes(len(newest) - cut) * rng.randint(0, 1)


def lay_out(tree: Tree, place: Path) -> Path:
    """Write a tree into a new folder."""
    place.mkdir()
    for path, content in tree.items():  # a folder precedes its contents
        if content is None:
            (place / path).mkdir()
        else:
            (place / path).write_bytes(content)
    return place


def problems(bench: Bench, place: Path, promised: Promised) -> list[str]:
    """Read everything as a resumed run and the export and archive checks do; return what is corrupt or lost."""
    from mvlm_core.export.archive import check_archive
    from mvlm_core.export.manifest import verify_folder
    from mvlm_core.files import sha256_file
    from mvlm_core.training.checkpoint import CheckpointError, checkpoint_folder, newest_checkpoint, open_checkpoint

    folder, archive, issues = place / bench.model, place / f"{bench.model}_model.tar.gz", []
    try:
        newest, history = newest_checkpoint(folder / "checkpoints"), bench.history(place)
        step = newest.step if newest else -1
        if step < promised.step:
            issues.append(f"checkpoint of step {promised.step} lost, the newest is of {step}")
        if history != bench.expected["history"][: len(history)]:
            issues.append("the history differs from the uninterrupted run's")
        if len(history) < step:
            issues.append(f"the history ends at {len(history)}, before the checkpoint of {step}")
        if newest and newest.state["best_step"] not in (None, step):
            open_checkpoint(checkpoint_folder(folder / "checkpoints", newest.state["best_step"]))
        exported = not verify_folder(folder)
        if exported and sha256_file(folder / "model.safetensors") != bench.expected["export"]:
            issues.append("the export holds other weights")
        if promised.exported and not exported:
            issues.append("finished export lost")
        if archive.exists() and check_archive(archive):
            issues.append("a damaged archive under its final name")
        if promised.archived and not archive.exists():
            issues.append("finished archive lost")
    except CheckpointError as damage:
        issues.append(f"the best checkpoint is lost: {damage}")
    except Exception as error:  # readers must not raise any other exception
        issues.append(f"traceback: {type(error).__name__}: {error}")
    return issues


@dataclass
class Outcome:
    """Results of the simulated power losses for one recorded run.

    Attributes:
        prefixes: prefixes of the recording; each is replayed as three disk states.
        opened: disk states that were checked, without repeats.
    """

    model: str
    run: str
    prefixes: int = 0
    opened: int = 0
    broken: int = 0
    resumed: int = 0
    differing: int = 0


class Recording:
    """Recording of one run, and the disk states after each of its prefixes."""

    def __init__(self, bench: Bench, name: str, place: Path, **overrides: Any) -> None:
        self.bench, self.outcome = bench, Outcome(bench.model, name)
        place.mkdir(exist_ok=True)
        receiver, sender = CONTEXT.Pipe(duplex=False)
        arguments = (sender, bench.model, str(bench.corpus), str(place), overrides)
        process = CONTEXT.Process(target=recorded_job, args=arguments)
        process.start()
        sender.close()
        try:
            self.operations, self.start = receiver.recv()
        except EOFError:
            raise SystemExit(f"the run to be recorded failed: {name}") from None
        process.join()

    def states(self, seed: int, every: int = 1) -> Iterator[tuple[int, str, Tree, Promised]]:
        """For each prefix, yield the three possible disk states and the durability guarantee at that point."""
        disk, promised = Disk(), Promised()
        for number, operation in enumerate(self.operations, 1):
            disk.apply(operation)
            if operation.kind == "promise":
                promised = operation.value
            if number >= self.start and (number - self.start) % every == 0:
                for way in WAYS:
                    yield number, way, disk.after_power_loss(way, random.Random(f"{seed} {number} {way}")), promised

    def open_all(self, seed: int, every: int = 1) -> Outcome:
        """Run the readers on every state."""
        outcome, seen = self.outcome, dict[str, tuple[Tree, Promised]]()
        for number, way, tree, promised in self.states(seed, every):
            outcome.prefixes += way == DROPPED
            if seen.get(way) == (tree, promised):
                continue
            seen[way] = tree, promised
            outcome.opened += 1
            with tempfile.TemporaryDirectory(dir=self.bench.root) as folder:
                if issues := problems(self.bench, lay_out(tree, Path(folder) / "disk"), promised):
                    outcome.broken += 1
                    print(f"  {outcome.run}, prefix {number}, {way}: {'; '.join(issues)}", flush=True)
        return outcome

    def resume_some(self, count: int, seed: int) -> Outcome:
        """Resume from a random sample of ``count`` states and compare the results."""
        numbers = range(self.start, len(self.operations) + 1)
        drawn = random.Random(seed).sample([(number, way) for number in numbers for way in WAYS], count)
        for number, way, tree, _ in self.states(seed):
            if (number, way) in drawn:
                place = lay_out(tree, next(self.bench.places))
                self.bench.finish(place, self.outcome, f"{self.outcome.run}, prefix {number}, {way}")
        return self.outcome


def recordings(bench: Bench) -> Iterator[Recording]:
    """Yield recordings of a run from scratch, one resumed after a kill, and one rolled back to an older checkpoint."""
    yield Recording(bench, "from scratch", bench.root / "scratch")
    for name, back in (("resumed after a kill", False), ("returned to an older checkpoint", True)):
        place = bench.root / name.replace(" ", "-")
        bench.start(place, kill_before=bench.events // 2)
        older = {"resume_from": str(bench.resumable(place)[-2])} if back else {}
        yield Recording(bench, name, place, **older)


def main(arguments: list[str] | None = None) -> int:
    parser = command.new_parser(__doc__)
    parser.add_argument("--only", default=",".join(MODELS), help="comma-separated models [default both]")
    parser.add_argument("--every", type=int, default=1, help="open every N-th prefix [default 1]")
    parser.add_argument("--resumed", type=int, default=20, help="states resumed to the end per model [default 20]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if bad := command.at_least_one(options, "every"):
        raise UserError(bad)
    models = command.parse_only(options.only, MODELS)
    columns = ("model", "run", "prefixes", "states opened", "broken", "resumed", "differing")
    print(command.head(columns, left=2), flush=True)
    outcomes: list[Outcome] = []
    for bench in benches(models):
        for number, recording in enumerate(recordings(bench)):
            recording.open_all(options.seed, options.every)
            share = len(range(number, options.resumed, 3))
            outcomes.append(recording.resume_some(share, options.seed))
            print(command.row(vars(outcomes[-1]).values()), flush=True)
    end = f"each prefix {', '.join(WAYS)}; seed {options.seed}"
    command.show(f"\n{end}", [vars(outcome) for outcome in outcomes], options)
    return 0 if not any(outcome.broken or outcome.differing for outcome in outcomes) else 1


if __name__ == "__main__":
    run_main(main)
