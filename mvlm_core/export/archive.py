"""Archives of exported models: bitwise reproducible, self-checking, safe to open.

An archive is a `.tar.gz` with one top folder (the model's name) that holds `manifest.json` and exactly the files listed
there with their SHA-256. It is read with `strict_tar`, never with `tarfile`; every rejected entry is reported with the
reason, and malicious input never causes a traceback.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mvlm_core.errors import UserError
from mvlm_core.export.manifest import (
    MANIFEST,
    MANIFEST_LIMIT,
    ArchiveError,
    parse_manifest,
    read_manifest,
    verify_folder,
)
from mvlm_core.export.strict_tar import BoundedStream, Entry, TarError, entries
from mvlm_core.files import fsync_path, read_regular, sha256_file

# Weights hardly compress (about 0.9), texts and tokenizers 5- to 10-fold; gzip's maximum is about 1,030-fold. An
# archive that expands beyond this limit is treated as a decompression bomb.
SIZE_ALLOWANCE = 64 << 20
EXPANSION_LIMIT = 50


# --- writing ------------------------------------------------------------------------------------------------


def write_archive(model_dir: Path, archive: Path) -> str:
    """Pack the files of `model_dir`'s manifest; return the archive's SHA-256.

    Identical files give identical archives (with the same zlib). The archive is written under a temporary name,
    verified and then renamed, so a crash leaves the old archive or none.

    Raises:
        ArchiveError: a file does not match the manifest.
    """
    if problems := verify_folder(model_dir):
        raise ArchiveError(problems)
    manifest = read_manifest(model_dir)
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(f".{archive.name}.partial")
    try:
        with (
            partial.open("wb") as raw,
            gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar,
        ):
            _add_files(tar, model_dir, manifest)
        partial.chmod(0o644)
        fsync_path(partial)
        scan = _scan(partial)  # a file may have changed between verification and packing
        if scan.problems or scan.manifest != manifest:
            raise ArchiveError([f"{model_dir}: {p}" for p in scan.problems or ["changed while it was packed"]])
        digest = sha256_file(partial)
        os.replace(partial, archive)
    finally:
        partial.unlink(missing_ok=True)
    fsync_path(archive.parent)
    return digest


def _add_files(tar: tarfile.TarFile, model_dir: Path, manifest: dict[str, Any]) -> None:
    """Add folders, the manifest, then its files, with owner, group and times 0 or empty for reproducibility."""
    top = PurePosixPath(manifest["name"])
    folders = {parent for file in manifest["files"] for parent in (top / file).parents}
    for folder in sorted(map(str, folders - {PurePosixPath(".")})):
        info = tarfile.TarInfo(folder)
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(info)
    for name in (MANIFEST, *sorted(manifest["files"])):
        info = tarfile.TarInfo(str(top / name))
        info.mode = 0o644
        with (model_dir / name).open("rb") as file:
            info.size = os.fstat(file.fileno()).st_size
            tar.addfile(info, file)


# --- reading ------------------------------------------------------------------------------------------------


@dataclass
class _Scan:
    """Result of one pass over an archive."""

    problems: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)  # SHA-256 by name including the top folder
    folders: set[str] = field(default_factory=set)
    manifest_bytes: bytes | None = None
    manifest: dict[str, Any] = field(default_factory=dict)


def _scan(archive: Path, destination: Path | None = None) -> _Scan:
    """Read and check an archive; with a ``destination`` also extract its files there."""
    scan = _Scan()
    try:
        if archive.is_symlink() or not archive.is_file():
            raise TarError("not a regular file")
        limit = SIZE_ALLOWANCE + EXPANSION_LIMIT * archive.stat().st_size
        with gzip.open(archive, "rb") as packed:
            for entry, content in entries(BoundedStream(packed, limit), scan.problems):
                if entry.is_folder:
                    scan.folders.add(entry.name)
                else:
                    _read_file(scan, entry, content, destination)
        _compare_with_manifest(scan)
    except TarError as error:
        scan.problems.append(str(error))
    except OSError as error:
        scan.problems.append(f"cannot be read ({error.strerror or error})")
    return scan


def _read_file(scan: _Scan, entry: Entry, content: Iterator[bytes], destination: Path | None) -> None:
    digest, manifest = hashlib.sha256(), bytearray()
    is_manifest = entry.name.count("/") == 1 and entry.name.endswith("/" + MANIFEST) and entry.size <= MANIFEST_LIMIT
    path = destination and destination / entry.name
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") if path else nullcontext() as file:
        for data in content:
            digest.update(data)
            if is_manifest:
                manifest += data
            if file:
                file.write(data)
    scan.digests[entry.name] = digest.hexdigest()
    if is_manifest and scan.manifest_bytes is None:
        scan.manifest_bytes = bytes(manifest)


def _compare_with_manifest(scan: _Scan) -> None:
    """Require exactly the manifest's files, with matching checksums, in a top folder with the manifest's name."""
    if scan.manifest_bytes is None:
        scan.problems.append(f"{MANIFEST}: missing, or larger than {MANIFEST_LIMIT:,} bytes")
        return
    try:
        scan.manifest = parse_manifest(scan.manifest_bytes)
    except ArchiveError as error:
        scan.problems += error.problems
        return
    top = scan.manifest["name"]
    expected: dict[str, str | None] = {f"{top}/{file}": digest for file, digest in scan.manifest["files"].items()}
    expected[f"{top}/{MANIFEST}"] = None
    for name in sorted(scan.digests.keys() - expected.keys()):
        scan.problems.append(f"{name}: not in the manifest of {top}")
    for name in sorted(expected.keys() - scan.digests.keys()):
        scan.problems.append(f"{name}: in the manifest but not in the archive")
    for name in sorted(expected.keys() & scan.digests.keys()):
        if expected[name] not in (None, scan.digests[name]):
            scan.problems.append(f"{name}: SHA-256 differs from the manifest's")
    useful = {str(parent) for name in expected for parent in PurePosixPath(name).parents}
    for folder in sorted(scan.folders - useful):
        scan.problems.append(f"{folder}/: contains none of the manifest's files")


def check_archive(archive: Path, model_dir: Path | None = None) -> list[str]:
    """Return all problems with an archive, each with file name and reason; [] if it is valid.

    Args:
        model_dir: the export of which it must hold exactly the files.
    """
    scan = _scan(archive)
    if model_dir is not None and not scan.problems:
        try:
            equal = scan.manifest_bytes == (model_dir / MANIFEST).read_bytes()
        except OSError:
            equal = False
        if not equal:
            scan.problems.append(f"differs from {model_dir}")
    return [f"{archive.name}: {problem}" for problem in scan.problems]


def read_checksums(path: Path) -> dict[str, str]:
    """Read SHA-256 by archive name from a file in `sha256sum` format."""
    try:
        lines = read_regular(path).decode("utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    pairs = (re.fullmatch(r"([0-9a-f]{64}) [ *](\S+)", line) for line in lines)
    return {pair[2]: pair[1] for pair in pairs if pair}


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """Open an export folder, or check a ``.tar.gz`` and extract it to a temporary folder while the context is open.

    Nothing is written before the whole archive has been checked. The second pass checks again while extracting, so that
    an archive replaced in between is also rejected.

    Raises:
        UserError: no such folder or archive, or an invalid archive.
    """
    if not path.exists():
        raise UserError(f"{path}: no such folder or archive; train a model first, or give the path of one")
    if path.is_dir():
        yield path
        return
    first = _scan(path)
    if first.problems:
        raise ArchiveError([f"{path.name}: {problem}" for problem in first.problems])
    with tempfile.TemporaryDirectory(prefix="mvlm-open-") as scratch:
        second = _scan(path, Path(scratch))
        if second.problems or second.manifest_bytes != first.manifest_bytes:
            raise ArchiveError([f"{path.name}: {p}" for p in second.problems or ["changed while it was read"]])
        yield Path(scratch, first.manifest["name"])
