"""Run child processes: relay their output to the console, forward signals once, keep the last lines."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pty
import re
import signal
import subprocess
import termios
import threading
from collections import deque
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from mvlm_core.console import console_writer
from mvlm_core.errors import Stopped
from mvlm_core.signals import PARENT_VARIABLE

TAIL_LINES = 40
log = logging.getLogger("mvlm")


class SignalForwarder:
    """Context manager that forwards SIGINT and SIGTERM once to the running children, or stops the job if none runs.

    A second SIGINT kills the children's whole process groups and stops the job.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._starting = self._logged = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        # No logging here: a handler may interrupt a half-written log line.
        if self.number is None:
            self.number = number
            self.send(number)
            if not self._children and not self._starting:
                raise Stopped(number)
        elif number == signal.SIGINT:
            for child in self._children:
                # Not `child.kill()`: this handler may interrupt `child.wait()`, which holds the lock that `kill` needs.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            raise Stopped(number)

    def send(self, number: int) -> None:
        """Send a signal to every running child."""
        for child in self._children:
            child.send_signal(number)

    def check(self, code: int = 0) -> None:
        """Raise Stopped if a signal has arrived or a child's exit ``code`` shows that it was stopped by one."""
        if self.number is not None:
            raise Stopped(self.number)
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise Stopped(code - 128)

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a child in its own session, so that Ctrl-C reaches it only once, forwarded from here."""
        self.check()
        self._starting = True
        try:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
            self._children.append(child)
        finally:
            self._starting = False
        if self.number is not None:
            child.send_signal(self.number)
        return child

    def ended(self, child: subprocess.Popen[bytes]) -> int | None:
        """Wait half a second for the child; return its exit code, 128 + n for signal n, or None if it still runs."""
        try:
            code = child.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            if self.number is not None and not self._logged:
                self._logged = True
                name = signal.Signals(self.number).name
                log.info("%s: forwarded; waiting for the running stage to stop (Ctrl-C again stops immediately)", name)
            return None
        self._children.remove(child)
        return 128 - code if code < 0 else code

    def wait(self, child: subprocess.Popen[bytes]) -> int:
        """Wait for the child; return its exit code, 128 + n for signal n."""
        while (code := self.ended(child)) is None:
            pass
        return code


class Relay:
    """Relays a child's output to the console and keeps its last lines.

    If the console is a terminal, the child gets a pseudo-terminal, so that it draws progress bars; otherwise a pipe.
    Output is read even if the console is gone or has stopped reading, so that the child never blocks or fails.
    """

    def __init__(self) -> None:
        self._console = console_writer(2 if os.isatty(2) else 1)
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._rest = b""
        if os.isatty(2):
            self._reader, self.child_end = pty.openpty()
            settings = termios.tcgetattr(self.child_end)
            settings[1] &= ~termios.OPOST  # the real terminal translates line endings
            termios.tcsetattr(self.child_end, termios.TCSANOW, settings)
            try:
                size = fcntl.ioctl(2, termios.TIOCGWINSZ, bytes(8))
                fcntl.ioctl(self.child_end, termios.TIOCSWINSZ, size)
            except OSError:
                pass  # a terminal without a size: bars use their default width
        else:
            self._reader, self.child_end = os.pipe()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def start(self) -> None:
        """Call after the child has inherited its end."""
        os.close(self.child_end)
        self._thread.start()

    def finish(self) -> list[str]:
        """Write the rest to the console and return the last lines.

        A grandchild may keep the pipe open forever, hence the timeout.
        """
        self._thread.join(timeout=5)
        self._console.flush()
        if self._rest:
            self._keep(self._rest + b"\n")
        return list(self.tail)

    def _run(self) -> None:
        while True:
            try:
                data = os.read(self._reader, 1 << 16)
            except OSError:  # a pseudo-terminal signals its end with EIO
                data = b""
            if not data:
                os.close(self._reader)
                return
            self._keep(data)
            self._console.write(data)

    def _keep(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-4096:]
        for line in lines:
            text = line.rstrip(b"\r").rsplit(b"\r", 1)[-1].decode("utf-8", "replace")
            text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).rstrip()
            if text:
                self.tail.append(text)


def run_child(command: list[str], signals: SignalForwarder) -> tuple[int, list[str]]:
    """Run a command to completion with its output on the console; return its exit code and last lines."""
    environment = os.environ | {PARENT_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    relay = Relay()
    try:
        child = signals.start(command, env=environment, stdout=relay.child_end, stderr=relay.child_end)
    finally:
        relay.start()
    return signals.wait(child), relay.finish()


def run_optional(label: str, command: list[str], signals: SignalForwarder) -> bool:
    """Run an optional script; log a failure and continue. Returns whether it succeeded."""
    code, tail = run_child(command, signals)
    signals.check()
    if code:
        log.error("%s failed with exit code %d: %s", label, code, tail[-1] if tail else "no output")
    return code == 0


def log_to_file(log_file: Path, line: str) -> None:
    """Append a line to the run's log file only."""
    with log_file.open("a", encoding="utf-8") as file:
        file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}\n")
