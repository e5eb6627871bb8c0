"""Archives of exported models: reproducible to the byte, self-checking, safe to open.

An archive is a `.tar.gz` with one top folder (the model's name) that holds `manifest.json` and exactly the files this
manifest lists with their SHA-256. The reader below is deliberately small and strict instead of `tarfile`: it knows regular
files and folders only, so links, devices, sparse files and extended headers have no code path here at all, and the tar
parsing faults of the standard library (CVE-2024-6232, CVE-2025-4517, CVE-2025-8194) cannot be reached. What it does
not accept it names, with the reason; hostile bytes never end in a traceback.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from mvlm_core.errors import UserError
from mvlm_core.files import fsync_path, sha256_file

__all__ = ["ArchiveError", "MANIFEST", "check_archive", "extract_archive", "matches_export", "read_manifest",
           "sha256_file", "verify_folder", "write_archive"]

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
MANIFEST_LIMIT = 1 << 20            # bytes; a real one has a few kilobytes
ENTRY_LIMIT = 10_000
PROBLEM_LIMIT = 50                  # a hostile archive may hold millions of bad entries: naming some is enough
# Weights hardly compress (about 0.9), texts and tokenizers 5- to 10-fold; gzip's own limit is about 1,030-fold. What
# unpacks to more than this is a bomb, and reading stops there.
SIZE_ALLOWANCE = 64 << 20
EXPANSION_LIMIT = 50
BLOCK = 512
CHUNK = 1 << 20

SAFE_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._+-]*[A-Za-z0-9_+-])?", re.ASCII)
WINDOWS_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
ENTRY_KINDS = {b"1": "hard link", b"2": "symbolic link", b"3": "character device", b"4": "block device", b"6": "named pipe",
               b"7": "contiguous file", b"S": "sparse file", b"L": "GNU long name", b"K": "GNU long link",
               b"x": "PAX extended header", b"g": "PAX global header", b"X": "extended header", b"D": "GNU dump folder",
               b"M": "continued file", b"V": "volume label"}


class ArchiveError(UserError):
    """An archive or an export folder that must not be used; `.problems` says why."""


# --- manifest -------------------------------------------------------------------------------------------------------

def name_problem(name: str) -> str | None:
    """Why `name` cannot be a path inside an archive, on any system; None when it can."""
    shown = ascii(name if len(name) <= 80 else name[:80] + "...")
    if not name or name.startswith("/"):
        return f"{shown}: empty or absolute name"
    if "\\" in name or ":" in name:
        return f"{shown}: backslash or drive name"
    parts = name.split("/")
    if ".." in parts:
        return f"{shown}: name leads out of the archive ('..')"
    for part in parts:
        if not SAFE_PART.fullmatch(part) or part.split(".")[0].lower() in WINDOWS_DEVICES:
            return f"{shown}: name holds something else than plain letters, digits and . _ + -"
    return None


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
    folded = {}
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
    """What differs between an export folder and its manifest; [] = every listed file is there with its hash."""
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


# --- writing --------------------------------------------------------------------------------------------------------

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
    info = tarfile.TarInfo(name)        # owner, group, times: 0 and empty, so that equal models give equal bytes
    info.mode = 0o644
    with path.open("rb") as file:
        info.size = os.fstat(file.fileno()).st_size
        source = _Hashing(file)
        tar.addfile(info, source)
    if digest is not None and source.hash.hexdigest() != digest:
        raise ArchiveError(f"{path}: SHA-256 differs from the manifest's")


def write_archive(model_dir: Path, archive: Path) -> str:
    """Pack the files of `model_dir`'s manifest; returns the archive's SHA-256.

    The same files give the same bytes (with the same zlib). Written under a temporary name and renamed when whole, so a
    crash leaves the old archive or none. Raises ArchiveError when a file is not what the manifest says.
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


# --- reading --------------------------------------------------------------------------------------------------------

class _Damaged(Exception):
    """The archive cannot be read any further."""


class _Bounded:
    """The unpacked bytes of an archive, never more than `limit` of them."""

    def __init__(self, file, limit: int):
        self.file, self.limit, self.seen = file, limit, 0

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        data = b""
        while len(data) < size:
            try:
                more = self.file.read(size - len(data))
            except (EOFError, OSError, zlib.error, ValueError) as error:
                raise _Damaged(f"damaged or cut off ({error})") from None
            if not more:
                break
            data += more
            self.seen += len(more)
            if self.seen > self.limit:
                raise _Damaged(f"unpacks to more than {self.limit:,} bytes: refused as a bomb")
        return data


@dataclass
class _Entry:
    name: str
    kind: bytes
    size: int
    mode: int


def _number(raw: bytes) -> int:
    """A number of a tar header: octal text, or GNU's binary form for large sizes."""
    if raw[0] == 0x80:
        return int.from_bytes(raw[1:], "big")
    text = raw.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", text):
        raise _Damaged("damaged entry header (bad number)")
    return int(text or b"0", 8)


def _parse_header(header: bytes) -> _Entry:
    checksum = sum(header) - sum(header[148:156]) + 8 * 0x20
    if _number(header[148:156]) != checksum:
        raise _Damaged("damaged entry header (checksum)")
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    return _Entry(name.decode("utf-8", "backslashreplace"), header[156:157], _number(header[124:136]), _number(header[100:108]))


@dataclass
class _Scan:
    """What one pass over an archive found."""
    problems: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)      # name with the top folder -> SHA-256
    folders: set[str] = field(default_factory=set)
    manifest_bytes: bytes | None = None
    manifest: dict | None = None


Sink = Callable[[str, Iterator[bytes]], None]


def _entry_problem(entry: _Entry, seen: dict[str, str]) -> str | None:
    name = entry.name.removesuffix("/") if entry.kind == b"5" else entry.name
    if entry.kind not in (b"0", b"\0", b"5"):
        return f"{ascii(name[:80])}: {ENTRY_KINDS.get(entry.kind, 'unknown kind of entry')}; only files and folders are accepted"
    if reason := name_problem(name):
        return reason
    earlier = seen.get(name.lower())
    if earlier is not None:
        return f"{name}: stands there twice" if earlier == name else f"{name}: differs from {earlier} only in capital letters"
    if entry.mode & 0o7000:
        return f"{name}: set-uid, set-gid or sticky bit"
    if entry.kind == b"5" and entry.size:
        return f"{name}: a folder with a size"
    return None


def _content(stream: _Bounded, entry: _Entry) -> Iterator[bytes]:
    left = entry.size
    while left:
        data = stream.read(min(left, CHUNK))
        if not data:
            raise _Damaged(f"cut off inside {ascii(entry.name[:80])}")
        left -= len(data)
        yield data
    padding = -entry.size % BLOCK
    if len(stream.read(padding)) != padding:
        raise _Damaged(f"cut off after {ascii(entry.name[:80])}")


def _take_file(scan: _Scan, stream: _Bounded, entry: _Entry, sink: Sink | None) -> None:
    digest, kept = hashlib.sha256(), []
    is_manifest = entry.name.count("/") == 1 and entry.name.endswith("/" + MANIFEST)

    def chunks():
        for data in _content(stream, entry):
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


def _walk(scan: _Scan, stream: _Bounded, sink: Sink | None) -> None:
    seen: dict[str, str] = {}
    for count in range(ENTRY_LIMIT + 2):
        header = stream.read(BLOCK)
        if len(header) != BLOCK:
            raise _Damaged("cut off: no end mark")
        if header == bytes(BLOCK):
            break
        entry = _parse_header(header)
        if problem := _entry_problem(entry, seen):
            scan.problems.append(problem)
            for _ in _content(stream, entry):
                pass
        else:
            name = entry.name.removesuffix("/") if entry.kind == b"5" else entry.name
            seen[name.lower()] = name
            if entry.kind == b"5":
                scan.folders.add(name)
            else:
                _take_file(scan, stream, entry, sink)
        if count >= ENTRY_LIMIT or len(scan.problems) >= PROBLEM_LIMIT:
            raise _Damaged("too many entries or problems: reading stopped")
    while rest := stream.read(CHUNK):
        if rest.strip(b"\0"):
            raise _Damaged("data after the end mark")


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
    wanted = {f"{top}/{file}": digest for file, digest in scan.manifest["files"].items()} | {f"{top}/{MANIFEST}": None}
    for name in sorted(scan.digests.keys() - wanted.keys()):
        scan.problems.append(f"{name}: not in the manifest of {top}")
    for name in sorted(wanted.keys() - scan.digests.keys()):
        scan.problems.append(f"{name}: in the manifest but not in the archive")
    for name in sorted(wanted.keys() & scan.digests.keys()):
        if wanted[name] not in (None, scan.digests[name]):
            scan.problems.append(f"{name}: SHA-256 differs from the manifest's")
    useful = {str(parent) for name in wanted for parent in PurePosixPath(name).parents}
    scan.problems += [f"{folder}/: a folder without files of the manifest" for folder in sorted(scan.folders - useful)]


def _scan(archive: Path, sink: Sink | None = None) -> _Scan:
    scan = _Scan()
    try:
        if archive.is_symlink() or not archive.is_file():
            raise _Damaged("no regular file")
        limit = SIZE_ALLOWANCE + EXPANSION_LIMIT * archive.stat().st_size
        with gzip.open(archive, "rb") as packed:
            _walk(scan, _Bounded(packed, limit), sink)
        _compare_with_manifest(scan)
    except _Damaged as error:
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


def extract_archive(archive: Path, destination: Path) -> Path:
    """Check an archive, then unpack it below `destination`; returns the top folder.

    Nothing is written before the whole archive was found good; the second pass checks again while it writes into a
    temporary folder, so an archive swapped in between is refused too. Raises ArchiveError.
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
