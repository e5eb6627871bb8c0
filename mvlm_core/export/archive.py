"""Archives of exported models: reproducible to the byte, self-checking, safe to open.

An archive is a `.tar.gz` with one top folder (the model's name) that holds `manifest.json` and exactly the
files this manifest lists with their SHA-256. It is read by `strict_tar`, never by `tarfile`; what is not
accepted is named, with the reason, and hostile bytes never end in a traceback.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from mvlm_core.errors import UserError
from mvlm_core.export.strict_tar import (
    ENTRY_LIMIT,
    PROBLEM_LIMIT,
    BoundedStream,
    Damaged,
    Entry,
    entries,
    name_problem,
)
from mvlm_core.files import fsync_path, read_regular, sha256_file

__all__ = [
    "ArchiveError",
    "MANIFEST",
    "check_archive",
    "extract_archive",
    "matches_export",
    "read_manifest",
    "sha256_file",
    "verify_folder",
    "write_archive",
]

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
MANIFEST_LIMIT = 1 << 20  # bytes; a real one has a few kilobytes
# Weights hardly compress (about 0.9), texts and tokenizers 5- to 10-fold; gzip's own limit is about
# 1,030-fold. What unpacks to more than this is a bomb, and reading stops there.
SIZE_ALLOWANCE = 64 << 20
EXPANSION_LIMIT = 50


class ArchiveError(UserError):
    """An archive or an export folder that must not be used; `.problems` says why."""


# --- manifest -----------------------------------------------------------------------------------------------


def _no_repeats(pairs):
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def parse_manifest(data: bytes) -> dict:
    """The manifest in `data`; raises ArchiveError naming what is wrong with it."""
    if len(data) > MANIFEST_LIMIT:
        raise ArchiveError(f"{MANIFEST}: larger than {MANIFEST_LIMIT:,} bytes")
    try:
        manifest = json.loads(data.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{MANIFEST}: no valid JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise ArchiveError(f"{MANIFEST}: not a manifest of format {MANIFEST_FORMAT}")
    name, files = manifest.get("name"), manifest.get("files")
    problems = []
    if not isinstance(name, str) or "/" in name or name_problem(name):
        problems.append(f"{MANIFEST}: 'name' is no plain folder name")
    if not isinstance(files, dict) or not files or len(files) > ENTRY_LIMIT:
        raise ArchiveError([*problems, f"{MANIFEST}: 'files' is no list of names with their SHA-256"])
    folded = {MANIFEST: MANIFEST}
    for file, digest in files.items():
        if (reason := name_problem(file)) or file == MANIFEST:
            problems.append(f"{MANIFEST}: {reason or 'lists itself'}")
        elif not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            problems.append(f"{MANIFEST}: {file} has no SHA-256")
        elif folded.setdefault(file.lower(), file) != file:
            problems.append(f"{MANIFEST}: {file} and {folded[file.lower()]} differ only in capital letters")
        elif any(str(parent) in files for parent in PurePosixPath(file).parents):
            problems.append(f"{MANIFEST}: {file} lies below a file")
        if len(problems) >= PROBLEM_LIMIT:
            break
    if problems:
        raise ArchiveError(problems)
    return manifest


def read_manifest(model_dir: Path) -> dict:
    """The manifest of an export folder; raises ArchiveError when there is none or it is damaged."""
    path = Path(model_dir) / MANIFEST
    try:
        if path.is_symlink() or not path.is_file():
            raise ArchiveError(f"{path}: no manifest, so no finished export")
        with path.open("rb") as file:
            return parse_manifest(file.read(MANIFEST_LIMIT + 1))
    except OSError as error:
        raise ArchiveError(f"{path}: {error.strerror}") from None
    except ArchiveError as error:
        raise ArchiveError([p if str(path) in p else f"{path.parent}: {p}" for p in error.problems]) from None


def verify_folder(model_dir: Path) -> list[str]:
    """What differs between an export folder and its manifest; [] = every listed file has its hash."""
    model_dir = Path(model_dir)
    try:
        manifest = read_manifest(model_dir)
    except ArchiveError as error:
        return list(error.problems)
    problems = []
    for name, digest in sorted(manifest["files"].items()):
        path = model_dir / name
        try:
            if any((model_dir / part).is_symlink() for part in (name, *PurePosixPath(name).parents)):
                problems.append(f"{path}: a symbolic link, not a file of the export")
            elif not path.is_file():
                problems.append(f"{path}: missing")
            elif sha256_file(path) != digest:
                problems.append(f"{path}: SHA-256 differs from the manifest's")
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror})")
    return problems


# --- writing ------------------------------------------------------------------------------------------------


class _Hashing:
    """A file with a running SHA-256 of what passes through `read` or `write`."""

    def __init__(self, file):
        self.file, self.hash = file, hashlib.sha256()

    def read(self, size=-1):
        data = self.file.read(size)
        self.hash.update(data)
        return data

    def write(self, data):
        self.hash.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def _add_file(tar: tarfile.TarFile, path: Path, name: str, digest: str | None) -> None:
    info = tarfile.TarInfo(name)  # owner, group, times: 0 and empty, so that equal models give equal bytes
    info.mode = 0o644
    with path.open("rb") as file:
        info.size = os.fstat(file.fileno()).st_size
        source = _Hashing(file)
        tar.addfile(info, source)
    if digest is not None and source.hash.hexdigest() != digest:
        raise ArchiveError(f"{path}: SHA-256 differs from the manifest's")


def write_archive(model_dir: Path, archive: Path) -> str:
    """Pack the files of `model_dir`'s manifest; returns the archive's SHA-256.

    The same files give the same bytes (with the same zlib). Written under a temporary name and renamed when
    whole, so a crash leaves the old archive or none. Raises ArchiveError when a file is not what the manifest
    says.
    """
    model_dir, archive = Path(model_dir), Path(archive)
    if problems := verify_folder(model_dir):
        raise ArchiveError(problems)
    manifest = read_manifest(model_dir)
    top = manifest["name"]
    archive.parent.mkdir(parents=True, exist_ok=True)
    for leftover in archive.parent.glob(f".{archive.name}.*.partial"):
        leftover.unlink(missing_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{archive.name}.", suffix=".partial", dir=archive.parent)
    try:
        with os.fdopen(handle, "wb") as raw:
            target = _Hashing(raw)
            with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=target, mtime=0) as packed:
                with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
                    folders = {PurePosixPath(top, file).parent for file in manifest["files"]}
                    for folder in sorted({str(p) for f in folders for p in (f, *f.parents)} - {"."}):
                        info = tarfile.TarInfo(folder)
                        info.type, info.mode = tarfile.DIRTYPE, 0o755
                        tar.addfile(info)
                    _add_file(tar, model_dir / MANIFEST, f"{top}/{MANIFEST}", None)
                    for file, digest in sorted(manifest["files"].items()):
                        _add_file(tar, model_dir / file, f"{top}/{file}", digest)
            raw.flush()
            os.fchmod(raw.fileno(), 0o644)
            os.fsync(raw.fileno())
        os.replace(partial, archive)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    fsync_path(archive.parent)
    return target.hash.hexdigest()


# --- reading ------------------------------------------------------------------------------------------------


@dataclass
class _Scan:
    """What one pass over an archive found."""

    problems: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)  # name with the top folder -> SHA-256
    folders: set[str] = field(default_factory=set)
    manifest_bytes: bytes | None = None
    manifest: dict | None = None


Sink = Callable[[str, Iterator[bytes]], None]


def _take_file(scan: _Scan, entry: Entry, content: Iterator[bytes], sink: Sink | None) -> None:
    digest, kept = hashlib.sha256(), []
    is_manifest = entry.name.count("/") == 1 and entry.name.endswith("/" + MANIFEST)

    def chunks():
        for data in content:
            digest.update(data)
            if is_manifest and entry.size <= MANIFEST_LIMIT:
                kept.append(data)
            yield data

    if sink is None:
        for _ in chunks():
            pass
    else:
        sink(entry.name, chunks())
    scan.digests[entry.name] = digest.hexdigest()
    if is_manifest and scan.manifest_bytes is None and entry.size <= MANIFEST_LIMIT:
        scan.manifest_bytes = b"".join(kept)


def _compare_with_manifest(scan: _Scan) -> None:
    """Exactly the manifest's files, with its hashes, below one folder of its name."""
    if scan.manifest_bytes is None:
        scan.problems.append(f"no {MANIFEST} (or a far too large one)")
        return
    try:
        scan.manifest = parse_manifest(scan.manifest_bytes)
    except ArchiveError as error:
        scan.problems += error.problems
        return
    top = scan.manifest["name"]
    wanted = {f"{top}/{file}": digest for file, digest in scan.manifest["files"].items()}
    wanted[f"{top}/{MANIFEST}"] = None
    for name in sorted(scan.digests.keys() - wanted.keys()):
        scan.problems.append(f"{name}: not in the manifest of {top}")
    for name in sorted(wanted.keys() - scan.digests.keys()):
        scan.problems.append(f"{name}: in the manifest but not in the archive")
    for name in sorted(wanted.keys() & scan.digests.keys()):
        if wanted[name] not in (None, scan.digests[name]):
            scan.problems.append(f"{name}: SHA-256 differs from the manifest's")
    useful = {str(parent) for name in wanted for parent in PurePosixPath(name).parents}
    for folder in sorted(scan.folders - useful):
        scan.problems.append(f"{folder}/: a folder without files of the manifest")


def _scan(archive: Path, sink: Sink | None = None) -> _Scan:
    scan = _Scan()
    try:
        if archive.is_symlink() or not archive.is_file():
            raise Damaged("no regular file")
        limit = SIZE_ALLOWANCE + EXPANSION_LIMIT * archive.stat().st_size
        with gzip.open(archive, "rb") as packed:
            for entry, content in entries(BoundedStream(packed, limit), scan.problems):
                if entry.is_folder:
                    scan.folders.add(entry.name)
                else:
                    _take_file(scan, entry, content, sink)
        _compare_with_manifest(scan)
    except Damaged as error:
        scan.problems.append(str(error))
    except OSError as error:
        scan.problems.append(f"cannot be read ({error.strerror or error})")
    return scan


def check_archive(archive: Path) -> list[str]:
    """Everything that is wrong with an archive, each with the file's name and the reason; [] = good."""
    archive = Path(archive)
    return [f"{archive.name}: {problem}" for problem in _scan(archive).problems]


def matches_export(archive: Path, model_dir: Path) -> bool:
    """True when the archive is good and holds exactly the export in `model_dir`."""
    try:
        manifest = (Path(model_dir) / MANIFEST).read_bytes()
    except OSError:
        return False
    scan = _scan(Path(archive))
    return not scan.problems and scan.manifest_bytes == manifest


def read_checksums(path: Path) -> dict[str, str]:
    """Archive name -> SHA-256 from a file in the format of `sha256sum`."""
    try:
        lines = read_regular(path).decode("utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    pairs = (re.fullmatch(r"([0-9a-f]{64}) [ *](\S+)", line) for line in lines)
    return {pair[2]: pair[1] for pair in pairs if pair}


def extract_archive(archive: Path, destination: Path) -> Path:
    """Check an archive, then unpack it below `destination`; returns the top folder.

    Nothing is written before the whole archive was found good; the second pass checks again while it writes
    into a temporary folder, so an archive swapped in between is refused too. Raises ArchiveError.
    """
    archive, destination = Path(archive), Path(destination)
    first = _scan(archive)
    if first.problems:
        raise ArchiveError([f"{archive.name}: {problem}" for problem in first.problems])
    top = destination / first.manifest["name"]
    if top.exists() or top.is_symlink():
        raise ArchiveError(f"{top}: already there; nothing was unpacked")
    destination.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".extracting-", dir=destination))

    def write(name: str, chunks: Iterator[bytes]) -> None:
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            for data in chunks:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())

    try:
        second = _scan(archive, write)
        if second.problems or second.manifest_bytes != first.manifest_bytes:
            raise ArchiveError([f"{archive.name}: {p}" for p in second.problems or ["changed while it was read"]])
        os.rename(partial / first.manifest["name"], top)
        fsync_path(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return top
