"""Console output of a run: logging to the console and a file, and progress bars."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

log = logging.getLogger("mvlm")


class UnbreakableStream:
    """A stream that ignores write errors once its reader is gone: a closed terminal must not end a training run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._broken = False

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], Any]) -> None:
        if not self._broken:
            try:
                action()
            except (OSError, ValueError):
                self._broken = True

    def isatty(self) -> bool:
        return not self._broken and self._stream.isatty()

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
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, UnbreakableStream):
            setattr(sys, name, UnbreakableStream(stream))


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
