"""Atomic writes, checksums, safe reads, and a lock that prevents two runs from using one folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from mvlm_core.errors import UserError

LOCK_NAME = "run.lock"
log = logging.getLogger("mvlm")


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_regular(path: Path | str, limit: int | None = None) -> bytes:
    """Read a regular file. Unlike ``read_bytes`` it never blocks, for example on a named pipe.

    Raises:
        OSError: missing, a folder, no permission.
        ValueError: not a regular file, or more than ``limit`` bytes.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if limit is not None and status.st_size > limit:
            raise ValueError(f"{status.st_size:,} bytes, over the limit of {limit:,}")
        return file.read()


def load_json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a UTF-8 file.

    Raises:
        OSError: missing, a folder, no permission.
        ValueError: not a regular file, or not a JSON object.
    """
    try:
        value = json.loads(read_regular(path).decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; {} if the file is missing or damaged."""
    try:
        return load_json_object(path)
    except (OSError, ValueError):
        return {}


def fsync_path(path: Path | str) -> None:
    """Flush a file or a folder's entries to disk; a rename is durable only once its folder is flushed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and its parents durably, so that they survive a power failure."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_path(folder.parent)


def temporary_folder(parent: Path, name: str) -> Path:
    """Create ``.NAME.HOST.PID.RANDOM`` in ``parent``: if this process is killed, ``leftovers`` finds it.

    Args:
        name: without dots.
    """
    return Path(tempfile.mkdtemp(prefix=f".{name}.{_host()}.{os.getpid()}.", dir=parent))


def leftovers(parent: Path, name: str) -> list[Path]:
    """Folders that ``temporary_folder`` made on this machine for processes that have ended.

    Args:
        name: "*" for any.
    """
    found = [(folder, folder.name.split(".")[3]) for folder in parent.glob(f".{name}.{_host()}.*.*")]
    return [folder for folder, pid in found if pid.isdecimal() and not psutil.pid_exists(int(pid))]


def _host() -> str:
    return socket.gethostname().replace(".", "-")


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write a file atomically: a reader sees the old or the new content, never a partial file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # see unfinished_writes
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def unfinished_writes(folder: Path) -> list[Path]:
    """Files that ``write_atomic`` leaves in a folder if the process is killed."""
    return [path for path in folder.glob(".*.tmp") if re.fullmatch(r"\..+\.\d+\.tmp", path.name)]


def write_json_atomic(path: Path | str, value: Any) -> None:
    """Write indented JSON atomically. NaN and infinity, which are not JSON, raise ValueError."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def template(path: Path) -> Any:
    """Load a Jinja template. Undefined variables are errors; values are escaped in an .html template."""
    from jinja2 import Environment, StrictUndefined

    is_html = path.suffix == ".html"
    environment = Environment(
        autoescape=is_html, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(path.read_text(encoding="utf-8"))


def empty_path_problems(paths: Mapping[str, Any]) -> list[str]:
    """Check that no path, or none of several, is empty: that would mean the current folder, or a default one.

    Args:
        paths: as given on the command line, by flag.
    """
    empty = [flag for flag, given in paths.items() if "" in (given if isinstance(given, list | tuple) else (given,))]
    return [f"{flag}: an empty path; is a shell variable unset?" for flag in empty]


def output_folder_problems(folder: Path | str, flag: str = "--output_dir") -> list[str]:
    """Check that ``folder``, which need not exist yet, can be written to; return the problems."""
    folder = Path(folder).absolute()
    if not str(folder).isprintable():
        return [f"{flag} {str(folder)!a}: non-printable characters in the path; choose another folder"]
    for part in [folder, *folder.parents]:
        if part.is_dir():
            return [] if os.access(part, os.W_OK | os.X_OK) else [f"{flag} {folder}: {part} is not writable"]
        if part.exists() or part.is_symlink():
            where = "is a file" if part == folder else f"is below {part}, which is not a folder"
            return [f"{flag} {folder} {where}; choose a folder"]
    return [f"{flag} {folder}: no such path"]


def output_file_problems(file: Path | str, flag: str) -> list[str]:
    """Check that ``file``, which need not exist yet, can be written; return the problems."""
    if Path(file).is_dir():
        return [f"{flag} {file} is a folder; name a file"]
    if Path(file).exists():
        return [] if os.access(file, os.W_OK) else [f"{flag} {file} is not writable"]
    return output_folder_problems(Path(file).parent, flag)


class RunLock:
    """Context manager that allows one run per folder.

    The lock file records the process id, host and start time of its holder. A kernel advisory lock on it resolves races
    and is released when the process ends, also on another host if the file system supports that; the recorded process
    covers file systems without such locks.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.path = Path(folder) / LOCK_NAME
        self.name = name or str(folder)
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        make_folder(self.path.parent)
        while self._descriptor is None:
            self._descriptor = self._try_acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def _try_acquire(self) -> int | None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            held = os.pread(descriptor, 4096, 0)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                raise self._refusal(_parse_lock(held)) from None
            if not os.path.exists(self.path) or os.fstat(descriptor).st_ino != os.stat(self.path).st_ino:
                os.close(descriptor)  # the holder removed the file between our open and our lock
                return None
            if holder := _parse_lock(held):
                if _is_alive(holder):
                    raise self._refusal(holder)
                log.info("took over the stale lock %s of process %s, which has ended", self.path, holder.get("pid"))
            me = {"pid": os.getpid(), "host": socket.gethostname(), "process_started": psutil.Process().create_time()}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(me).encode(), 0)
            os.fsync(descriptor)
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise

    def problems(self) -> list[str]:
        """Name the process on this machine that holds the lock, if any, without changing anything."""
        try:
            holder = _parse_lock(read_regular(self.path))
        except (OSError, ValueError):
            return []
        return self._refusal(holder).problems if _is_alive(holder) else []

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        return UserError(
            f"{self.name} is in use by process {holder.get('pid', 'unknown')} on {holder.get('host', 'this machine')}; "
            f"wait for it or stop it first (if no such run exists, delete {self.path})"
        )


def _parse_lock(held: bytes) -> dict[str, Any]:
    try:
        value = json.loads(held)
    except ValueError:  # another program's, such as "pid 8575"
        number = re.search(rb"\d{1,18}", held)
        value = int(number[0]) if number else None
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"pid": value}
    return value if isinstance(value, dict) else {}


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the holder is a running process of this host, on which a restarted container has another name."""
    pid = holder.get("pid")
    if holder.get("host", socket.gethostname()) != socket.gethostname():
        return False
    if not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return False
    try:
        process = psutil.Process(pid)
        started = holder.get("process_started")
        # Process ids are reused; the start time tells whether this is the same process.
        return not isinstance(started, int | float) or abs(process.create_time() - started) < 2.0
    except (psutil.NoSuchProcess, OverflowError):
        return False
    except psutil.AccessDenied:
        return True
