"""SIGINT and SIGTERM: finish the step in progress and write a checkpoint before the run ends."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import Any

from mvlm_core.errors import Stopped

PARENT_VARIABLE = "MVLM_PARENT_PID"
_STOPPING = (signal.SIGINT, signal.SIGTERM)
log = logging.getLogger("mvlm")


def parent_is_gone() -> bool:
    """Whether the parent process named in the environment has ended."""
    parent = int(os.environ.get(PARENT_VARIABLE) or 0)
    return bool(parent) and os.getppid() != parent


def signal_name(number: int) -> str:
    """Name of a signal; some real-time signals have none."""
    return next((known.name for known in signal.Signals if known == number), "an unknown signal")


def end_on_sigterm() -> None:
    """For programs without checkpoints: exit with 143 on SIGTERM, after all ``with`` and ``finally`` blocks."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _handle(number: int, handler: Any) -> None:
    """Install a signal handler; only the main thread can, and only it receives signals."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)


class StopRequest:
    """Context in which a signal raises ``Stopped`` immediately or, after ``defer``, is only recorded.

    A second SIGINT exits immediately: checkpoints are written atomically, so nothing is lost. If the environment names
    a parent process, its end counts as SIGTERM, so that no trainer outlives its pipeline.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __enter__(self) -> StopRequest:
        self._earlier = {number: signal.getsignal(number) for number in _STOPPING}
        self.raise_at_once()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            _handle(number, handler)

    def defer(self) -> None:
        """From now on a signal is only recorded."""
        for number in _STOPPING:
            _handle(number, self._record)

    def raise_at_once(self) -> None:
        """From now on a signal raises ``Stopped`` immediately; raises now if one is already recorded."""
        for number in _STOPPING:
            _handle(number, self._raise)
        if self.signal_number is not None:
            raise Stopped(self.signal_number)

    @property
    def number(self) -> int:
        """The signal received, or SIGTERM if another rank received it."""
        return self.signal_number or signal.SIGTERM

    def is_set(self) -> bool:
        if self.signal_number is None and parent_is_gone():
            log.warning("the process that started this run has ended: stopping after a checkpoint")
            self.signal_number = signal.SIGTERM
        return self.signal_number is not None

    def _record(self, number: int, _frame: Any) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            os._exit(128 + number)
        self.signal_number = number
        with suppress(OSError):  # logging is not reentrant; a plain write is safe in a handler
            os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then writing a checkpoint\n".encode())

    def _raise(self, number: int, _frame: Any) -> None:
        raise Stopped(number)
