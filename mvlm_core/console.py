"""Console output of a run: logging to the console and a file, and progress bars."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import stat
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TextIO

from tqdm import tqdm

WAITING_PIECES = 1000  # of output: a line, a progress bar, or up to 64 KiB from a child each
STALLED_SECONDS, FLUSH_SECONDS = 2.0, 30.0
log = logging.getLogger("mvlm")


class ConsoleWriter:
    """Writes to standard output or error without failing or being stopped by it: neither a closed terminal nor one that
    no longer reads (Ctrl-S, a laptop asleep during SSH) must stop a training run.

    Except for a file, a thread does the writing. Up to ``WAITING_PIECES`` of output wait for it. If there are more, a
    console that still reads is waited for; one that has read nothing for ``STALLED_SECONDS`` loses the oldest.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pieces: SimpleQueue[bytes | threading.Event] = SimpleQueue()  # usable in signal handlers
        self._read_at, self._dropped = time.monotonic(), 0
        self._is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if not self._is_file:
            threading.Thread(target=self._run, name="console", daemon=True).start()
            atexit.register(self.flush)

    def write(self, data: bytes) -> None:
        if self._is_file:
            self._write(data)
            return
        self._put(data)
        while self._pieces.qsize() > WAITING_PIECES:
            if not self._has_stalled():
                time.sleep(0.01)
                continue
            with suppress(Empty):
                piece = self._pieces.get_nowait()
                self._dropped += len(piece) if isinstance(piece, bytes) else 0

    def flush(self) -> None:
        """Wait until everything is written, at most ``FLUSH_SECONDS`` and only as long as the console reads."""
        if not self._is_file:
            deadline, written = time.monotonic() + FLUSH_SECONDS, threading.Event()
            self._put(written)
            while not (written.wait(0.05) or self._has_stalled() or time.monotonic() > deadline):
                pass

    def _put(self, piece: bytes | threading.Event) -> None:
        if self._pieces.empty():
            self._read_at = time.monotonic()
        self._pieces.put(piece)

    def _has_stalled(self) -> bool:
        return time.monotonic() - self._read_at > STALLED_SECONDS

    def _run(self) -> None:
        while True:
            piece = self._pieces.get()
            if isinstance(piece, threading.Event):
                piece.set()
                continue
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                self._write(b"\n[%d bytes not shown here: the console had stopped reading]\n" % dropped)
            self._write(piece)

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
                self._read_at = time.monotonic()
            except BlockingIOError:  # another program has made the console non-blocking
                time.sleep(0.05)
            except OSError:  # the reader is gone, or the disk full
                return


@cache
def console_writer(descriptor: int) -> ConsoleWriter:
    """The process's only writer for standard output (1) or error (2); one for both if they are the same, which keeps
    the order of what is written."""
    if descriptor == 2 and os.path.sameopenfile(1, 2):
        return console_writer(1)
    return ConsoleWriter(descriptor)


class UnbreakableStream:
    """A line-buffered standard stream that neither fails nor waits; see ``ConsoleWriter``."""

    def __init__(self, stream: TextIO) -> None:
        stream.flush()
        self._stream, self._line = stream, ""
        self._writer = console_writer(stream.fileno())
        atexit.register(self.flush)  # before the writer's own, which was registered first

    def write(self, text: str) -> int:
        self._line += text
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        line, self._line = self._line, ""
        if line:
            self._writer.write(line.encode(self._stream.encoding, "backslashreplace"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _keep_streams_open() -> None:
    """Reopen closed standard streams on /dev/null: the next file opened would take their file descriptor."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))


def outlive_terminal() -> None:
    """Ignore SIGHUP and make stdout and stderr unbreakable: the process keeps running and writing its log files."""
    _keep_streams_open()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number, name in enumerate(("stdout", "stderr"), 1):
        stream = getattr(sys, name)
        if not isinstance(stream, UnbreakableStream) and _descriptor(stream) == number:
            setattr(sys, name, UnbreakableStream(stream))


def _descriptor(stream: TextIO) -> int | None:
    """The stream's descriptor; None if it has none, for example because a test captures it."""
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


class _BarFriendlyHandler(logging.Handler):
    """Prints log lines above the progress bar instead of over it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _LateFileHandler(logging.FileHandler):
    """Creates the log file and its folder at the first record, so that a run refused before that writes nothing."""

    def __init__(self, path: Path | str) -> None:
        super().__init__(path, encoding="utf-8", delay=True)

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


def setup_logging(log_file: Path | str | None = None, *, quiet: bool = False) -> logging.Logger:
    """Send the ``mvlm`` log to stdout and optionally append it to a file.

    Per-step lines (level DEBUG) always go to the file. They go to the console only without ``quiet`` and if stderr is
    not a terminal, where the progress bar shows the same.
    """
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.handlers.clear()
    logging.raiseExceptions = False  # a log file on a full disk must not fill the console with tracebacks
    console = _BarFriendlyHandler(logging.INFO if quiet or sys.stderr.isatty() else logging.DEBUG)
    console.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    log.addHandler(console)
    if log_file is not None:
        file = _LateFileHandler(log_file)
        file.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(file)
    return log


def progress(total: int | None, desc: str, unit: str, *, initial: int = 0, quiet: bool = False, **bar: Any) -> tqdm:
    """Progress bar on stderr, disabled with ``quiet`` or if stderr is not a terminal."""
    hidden = quiet or not sys.stderr.isatty()
    return tqdm(total=total, desc=desc, unit=unit, initial=initial, disable=hidden, dynamic_ncols=True, **bar)


def silence_transformers() -> None:
    """Disable transformers' progress bars and warnings; this package logs what matters."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def text_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Format rows as text, first column left-aligned and others right-aligned, below a header with a rule."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    first, *others = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (header, *rows)
    ]
    return [first, "-" * len(first), *others]
