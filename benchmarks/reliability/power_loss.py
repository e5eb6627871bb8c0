"""Cut the power after every file operation of small real runs: what is left is whole, or is known not to be.

Runs of a tiny model are recorded (from scratch, resumed after a kill, returned to an older checkpoint): every change
of a folder's entries and of a file's content below the run's folder, and every fsync. Each prefix of the record is
replayed three ways, as a disk may be found after a power failure: all that was not flushed is dropped; all names are
there, but what was not flushed is cut in half or zero from there on; of each folder's and file's later changes some,
drawn at random, have reached the disk. Then the readers look at it: the newest checkpoint is intact and none older
than the last one whose save had returned, with its best one; the history is the undisturbed run's, up to that
checkpoint at least; an export or archive that counts as good is the undisturbed run's. Some of the states, drawn at
random, are resumed to the end and compared bit for bit.

Folders are strict, as POSIX allows: an entry counts as there only after its own folder was flushed.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.reliability.fault_injection import (
    CONTEXT,
    FILE_EVENTS,
    MODELS,
    PRELOAD,
    TIMES,
    Bench,
    train_and_pack,
    write_at_the_next_step,
)
from mvlm_core.errors import LINE_BREAK, UserError, run_main

ROOT = 0
DROPPED, TORN, MIXED = "dropped", "torn", "mixed"
WAYS = (DROPPED, TORN, MIXED)
Tree = dict[str, bytes | None]  # path below the run's folder → content, None for a folder


@dataclass(frozen=True)
class Operation:
    """One thing that happened to the disk, or to what the run may count on.

    Attributes:
        kind: "entries", "write" or "sync" of the file or folder ``item``; "saved", "returned", "exported", "archived".
        entries: of a folder, changed at once: name → item, None where the name is gone.
        content: of a file, as a whole.
        step: of a checkpoint.
    """

    kind: str
    item: int = -1
    entries: dict[str, int | None] = field(default_factory=dict)
    content: bytes = b""
    step: int = -1


class Recorder:
    """Notes what changes below a folder, by looking at it before each of this process's file operations there.

    So it sees what a library writes by itself, too: whatever has changed since the operation before.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.operations: list[Operation] = []
        self.folders = {ROOT}
        self._entries: dict[int, dict[str, int]] = {ROOT: {}}
        self._items: dict[int, int] = {place.stat().st_ino: ROOT}  # inode → item
        self._stamps: dict[int, tuple[int, int]] = {}
        self._contents: dict[int, bytes] = {}
        self._count, self._looking = ROOT, False
        self.look()
        for item in self._entries.keys() | self._contents.keys():  # what is there at the start is on the disk
            self.operations.append(Operation("sync", item))
        self.start = len(self.operations)
        self._fsync = os.fsync
        os.fsync = self._sync
        sys.addaudithook(self._before)

    def mark(self, kind: str, step: int = -1) -> None:
        """Note what the run may count on from now on."""
        self.look()
        self.operations.append(Operation(kind, step=step))

    def _before(self, event: str, arguments: tuple) -> None:
        if event in FILE_EVENTS and not self._looking and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.fsdecode(arguments[0])
            if path.startswith(str(self.place)) or not os.path.isabs(path):  # shutil.rmtree names files relatively
                self.look()

    def _sync(self, descriptor: int) -> None:
        self.look()
        self._fsync(descriptor)
        item = self._items.get(os.fstat(descriptor).st_ino)
        if item is not None:
            self.operations.append(Operation("sync", item))

    def look(self) -> None:
        """Note all changes since the last look: new contents first, then names."""
        self._looking = True
        try:
            found = {ROOT: self._list(self.place)}
            for folder, path in self._below(ROOT, self.place, found):
                found[folder] = self._list(path)
        finally:
            self._looking = False
        for folder in found.keys() | self._entries.keys():
            old, new = self._entries.get(folder, {}), found.get(folder, {})
            changed = {name: new.get(name) for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
            if changed and folder in found:
                self.operations.append(Operation("entries", folder, entries=changed))
        self._entries = found
        alive = {ROOT}.union(*(entries.values() for entries in found.values()))
        self._items = {inode: item for inode, item in self._items.items() if item in alive}

    def _below(self, folder: int, path: Path, found: dict[int, dict[str, int]]) -> Iterator[tuple[int, Path]]:
        for name, item in list(found[folder].items()):
            if item in self.folders:
                yield item, path / name
                yield from self._below(item, path / name, found)

    def _list(self, path: Path) -> dict[str, int]:
        """The entries of a folder; notes the new contents of its files."""
        entries = {}
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            status = entry.stat(follow_symlinks=False)
            if status.st_ino not in self._items:
                self._count += 1
                self._items[status.st_ino] = self._count
            item = entries[entry.name] = self._items[status.st_ino]
            if entry.is_dir(follow_symlinks=False):
                self.folders.add(item)
                continue
            stamp = (status.st_size, status.st_mtime_ns)
            # The time of a change is coarse: what is small is compared as it is.
            if self._stamps.get(item) != stamp or status.st_size < 1 << 16:
                content = Path(entry.path).read_bytes()
                if content != self._contents.get(item):
                    self._contents[item] = content
                    self.operations.append(Operation("write", item, content=content))
                self._stamps[item] = stamp
        return entries


def recorded_job(line: Any, model: str, corpus: str, place: str, changes: dict[str, Any]) -> None:
    """``train_and_pack`` in a process of its own; sends what it did to the disk."""
    from mvlm_core.export import archive
    from mvlm_core.training import checkpoint as checkpoints

    write_at_the_next_step()
    save, pack, set_aside = checkpoints.save_checkpoint, archive.write_archive, checkpoints.set_aside_later
    recorder = Recorder(Path(place))

    def recorded_save(root: Path, step: int, tensors: Any, state: dict[str, Any]) -> Path:
        folder = save(root, step, tensors, state)
        if not state["weights_only"]:
            recorder.mark("saved", step)
        return folder

    def recorded_pack(*arguments: Any) -> str:
        recorder.mark("exported")
        digest = pack(*arguments)
        recorder.mark("archived")
        return digest

    def recorded_return(root: Path, step: int) -> None:
        recorder.mark("returned", step)
        set_aside(root, step)

    checkpoints.save_checkpoint, checkpoints.set_aside_later = recorded_save, recorded_return
    archive.write_archive = recorded_pack
    train_and_pack(model, corpus, place, **changes)
    line.send((recorder.operations, recorder.folders, recorder.start))
    line.close()


@dataclass
class Promises:
    """What a run may count on after a prefix: the newest checkpoint on the disk, a finished export and archive."""

    step: int = -1
    exported: bool = False
    archived: bool = False

    def after(self, operation: Operation) -> None:
        if operation.kind == "saved":
            self.step = max(self.step, operation.step)
        elif operation.kind == "returned":
            self.step = min(self.step, operation.step)
        self.exported |= operation.kind == "exported"
        self.archived |= operation.kind == "archived"


class Disk:
    """A disk with a cache: what of the operations so far is flushed, and what only may have reached it."""

    def __init__(self, folders: set[int]) -> None:
        self.folders = folders
        self.entries: dict[int, dict[str, int]] = defaultdict(dict)
        self.later_entries: dict[int, list[dict[str, int | None]]] = defaultdict(list)
        self.content: dict[int, bytes] = defaultdict(bytes)
        self.later_contents: dict[int, list[bytes]] = defaultdict(list)

    def apply(self, operation: Operation) -> None:
        item = operation.item
        if operation.kind == "entries":
            self.later_entries[item].append(operation.entries)
        elif operation.kind == "write":
            self.later_contents[item].append(operation.content)
        elif operation.kind == "sync" and item in self.folders:
            self.entries[item] = self._entries(item, len(self.later_entries[item]))
            self.later_entries[item] = []
        elif operation.kind == "sync":
            self.content[item] = (self.later_contents.pop(item, None) or [self.content[item]])[-1]

    def after_power_loss(self, way: str, chance: random.Random) -> Tree:
        """The files and folders that are found."""
        tree: Tree = {}
        self._find(ROOT, "", way, chance, tree)
        return tree

    def _find(self, folder: int, path: str, way: str, chance: random.Random, tree: Tree) -> None:
        later = self.later_entries.get(folder, [])
        reached = {DROPPED: 0, TORN: len(later), MIXED: chance.randint(0, len(later))}[way]
        for name, item in self._entries(folder, reached).items():
            tree[path + name] = None if item in self.folders else self._torn(item, way, chance)
            if item in self.folders:
                self._find(item, f"{path}{name}/", way, chance, tree)

    def _entries(self, folder: int, reached: int) -> dict[str, int]:
        entries: dict[str, int | None] = dict(self.entries[folder])
        for changed in self.later_entries[folder][:reached]:
            entries |= changed
        return {name: item for name, item in entries.items() if item is not None}

    def _torn(self, item: int, way: str, chance: random.Random) -> bytes:
        flushed, later = self.content[item], self.later_contents.get(item, [])
        if way == DROPPED or not later or (way == MIXED and chance.random() < 0.3):
            return flushed
        newest = later[-1] if way == TORN else chance.choice(later)
        same = len(flushed) if newest.startswith(flushed) else 0
        cut = (same + len(newest)) // 2 if way == TORN else chance.randint(same, len(newest))
        return newest[:cut] + bytes(len(newest) - cut) * chance.randint(0, 1)


def lay_out(tree: Tree, place: Path) -> Path:
    """Write a tree into a new folder."""
    place.mkdir()
    for path, content in tree.items():  # a folder comes before what is in it
        if content is None:
            (place / path).mkdir()
        else:
            (place / path).write_bytes(content)
    return place


@dataclass
class Found:
    """What the readers make of a disk after a power failure.

    Attributes:
        step: of the newest checkpoint, -1 where there is none.
        lies: what counts as good and is not, and tracebacks.
    """

    step: int = -1
    exported: bool = False
    archived: bool = False
    lies: list[str] = field(default_factory=list)

    def broken(self, promises: Promises) -> list[str]:
        """What is wrong, given what the run could count on."""
        kept = {
            f"checkpoint of step {promises.step} lost, the newest is of {self.step}": self.step >= promises.step,
            "finished export lost": self.exported >= promises.exported,
            "finished archive lost": self.archived >= promises.archived,
        }
        return self.lies + [problem for problem, holds in kept.items() if not holds]


def read(bench: Bench, place: Path) -> Found:
    """Open everything, as a resumed run and the checks of exports and archives do."""
    from mvlm_core.export.archive import check_archive
    from mvlm_core.export.manifest import verify_folder
    from mvlm_core.files import sha256_file
    from mvlm_core.training.checkpoint import DamagedCheckpoint, checkpoint_folder, newest_checkpoint, open_checkpoint
    from mvlm_core.training.history import read_history

    folder, archive, found = place / bench.model, place / f"{bench.model}_model.tar.gz", Found()
    try:
        newest = newest_checkpoint(folder / "checkpoints")
        records = read_history(folder / "training_history.jsonl")
        history = [{k: v for k, v in record.items() if k not in TIMES} for record in records]
        if history != bench.expected["history"][: len(history)]:
            found.lies.append("the history is another one")
        if newest is not None:
            found.step = newest.step
            if len(history) < newest.step:
                found.lies.append(f"the history ends at {len(history)}, before the checkpoint of {newest.step}")
            best = newest.state["best_step"]
            if best not in (None, newest.step):
                open_checkpoint(checkpoint_folder(folder / "checkpoints", best))
        found.exported = not verify_folder(folder)
        if found.exported and sha256_file(folder / "model.safetensors") != bench.expected["export"]:
            found.lies.append("the export holds other weights")
        if archive.exists():
            found.archived = not check_archive(archive)
            if not found.archived:
                found.lies.append("a damaged archive under its final name")
    except DamagedCheckpoint as damage:
        found.lies.append(f"the best checkpoint is lost: {damage}")
    except Exception as error:  # whatever it is, a reader must not raise it
        found.lies.append(f"traceback: {type(error).__name__}: {error}")
    return found


@dataclass
class Outcome:
    """What power failures did to one recorded run.

    Attributes:
        prefixes: of the record; each is replayed in three ways.
        opened: different states among them.
    """

    model: str
    run: str
    prefixes: int = 0
    opened: int = 0
    broken: int = 0
    resumed: int = 0
    differing: int = 0


class Recording:
    """The record of one run, and what is found after each of its prefixes."""

    def __init__(self, bench: Bench, name: str, place: Path, **changes: Any) -> None:
        self.bench, self.outcome = bench, Outcome(bench.model, name)
        place.mkdir(exist_ok=True)
        ours, theirs = CONTEXT.Pipe(duplex=False)
        arguments = (theirs, bench.model, str(bench.corpus), str(place), changes)
        process = CONTEXT.Process(target=recorded_job, args=arguments)
        process.start()
        theirs.close()
        try:
            self.operations, self.folders, self.start = ours.recv()
        except EOFError:
            raise SystemExit(f"the run to be recorded failed: {name}") from None
        process.join()

    def states(self, seed: int, every: int = 1) -> Iterator[tuple[int, str, Tree, Promises]]:
        """Prefix by prefix, the three ways in which its disk may be found, and what the run could count on."""
        disk, promises = Disk(self.folders), Promises()
        for number, operation in enumerate(self.operations, 1):
            disk.apply(operation)
            promises.after(operation)
            if number >= self.start and (number - self.start) % every == 0:
                for way in WAYS:
                    yield number, way, disk.after_power_loss(way, random.Random(f"{seed} {number} {way}")), promises

    def read_all(self, seed: int, every: int = 1) -> Outcome:
        """Let the readers look at every state."""
        outcome, seen = self.outcome, dict[str, tuple[Tree, Found]]()
        for number, way, tree, promises in self.states(seed, every):
            outcome.prefixes += way == DROPPED
            if way not in seen or seen[way][0] != tree:
                with tempfile.TemporaryDirectory(dir=self.bench.root) as folder:
                    seen[way] = tree, read(self.bench, lay_out(tree, Path(folder) / "disk"))
                outcome.opened += 1
            if problems := seen[way][1].broken(promises):
                outcome.broken += 1
                print(f"  {outcome.run}, prefix {number}, {way}: {'; '.join(problems)}", flush=True)
        return outcome

    def resume_some(self, count: int, seed: int) -> Outcome:
        """Start again from ``count`` of the states, drawn at random, and compare what comes out."""
        numbers = range(self.start, len(self.operations) + 1)
        drawn = {(number, way) for number in numbers for way in WAYS}
        chosen = set(random.Random(seed).sample(sorted(drawn), count))
        for number, way, tree, _ in self.states(seed):
            if (number, way) in chosen:
                place = lay_out(tree, next(self.bench.places))
                code, _ = self.bench.start(place)
                self.outcome.resumed += 1
                if code != 0 or self.bench.result(place) != self.bench.expected:
                    self.outcome.differing += 1
                    print(f"  differs: {self.outcome.run}, prefix {number}, {way}, exit code {code}", flush=True)
        return self.outcome


def recordings(bench: Bench) -> Iterator[Recording]:
    """A run from scratch, one that goes on after a kill, and one that returns to an older checkpoint."""
    from mvlm_core.training.checkpoint import checkpoint_folders

    yield Recording(bench, "from scratch", bench.root / "scratch")
    for name, back in (("resumed after a kill", False), ("returned to an older checkpoint", True)):
        place = bench.root / name.replace(" ", "-")
        bench.start(place, kill_before=bench.events // 2)
        whole = [
            folder
            for folder in checkpoint_folders(place / bench.model / "checkpoints")
            if (folder / "optimizer.safetensors").exists()
        ]
        yield Recording(bench, name, place, **({"resume_from": str(whole[-2])} if back else {}))


def table(outcomes: list[Outcome]) -> str:
    columns = ("model", "run", "prefixes", "states opened", "broken", "resumed", "differing")
    return command.table(columns, [tuple(vars(outcome).values()) for outcome in outcomes], left=2)


def main(arguments: list[str] | None = None) -> int:
    parser = command.new_parser(__doc__)
    parser.add_argument("--only", default=",".join(MODELS), help="these models, separated by commas [default both]")
    parser.add_argument("--every", type=int, default=1, help="open every N-th prefix [default 1]")
    parser.add_argument("--resumed", type=int, default=20, help="states resumed to the end, a model [default 20]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if problems := command.below_one(options, "every"):
        raise UserError(problems)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    CONTEXT.set_forkserver_preload(PRELOAD)
    from tests.helpers import build_tiny_corpus

    outcomes: list[Outcome] = []
    for model in command.chosen(options.only, MODELS):
        with tempfile.TemporaryDirectory(prefix="power-") as folder:
            bench = Bench(model, build_tiny_corpus(Path(folder) / "corpus"), Path(folder))
            for number, recording in enumerate(recordings(bench)):
                recording.read_all(options.seed, options.every)
                share = len(range(number, options.resumed, 3))
                outcomes.append(recording.resume_some(share, options.seed))
                print(command.row(vars(outcomes[-1]).values()), flush=True)
    end = f"each prefix {', '.join(WAYS)}; seed {options.seed}"
    command.show(f"{table(outcomes)}{LINE_BREAK}{end}", [vars(outcome) for outcome in outcomes], options)
    return 0 if not any(outcome.broken or outcome.differing for outcome in outcomes) else 1


if __name__ == "__main__":
    run_main(main)
