"""SIGINT and SIGTERM: the step in progress is finished and a checkpoint written before the run ends."""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from typing import Any

from mvlm_core.errors import Stopped

PARENT_VARIABLE = "MVLM_PARENT_PID"
log = logging.getLogger("mvlm")


def parent_is_gone() -> bool:
    """Whether the environment names the process that started this one and that process has ended."""
    parent = int(os.environ.get(PARENT_VARIABLE) or 0)
    return bool(parent) and os.getppid() != parent


def end_on_sigterm() -> None:
    """SIGTERM ends a program without checkpoints with 143, after all ``with`` and ``finally`` blocks."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


class StopRequest:
    """A signal is recorded after ``defer`` and raises ``Stopped`` after ``raise_at_once``.

    A second SIGINT exits immediately: checkpoints are written atomically, so nothing is lost. Where the environment
    names a parent process, its end counts as SIGTERM, so that no trainer outlives its pipeline.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def defer(self) -> None:
        """From now on a signal is only recorded."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._record)

    def raise_at_once(self) -> None:
        """From now on a signal raises ``Stopped`` where it arrives; raises now for one already recorded."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._raise)
        if self.signal_number is not None:
            raise Stopped(self.signal_number)

    @property
    def number(self) -> int:
        """The signal received here, or SIGTERM where another process of the run received it."""
        return self.signal_number or signal.SIGTERM

    def wanted(self) -> bool:
        if self.signal_number is None and parent_is_gone():
            log.warning("the process that started this run has ended: stopping after a checkpoint")
            self.signal_number = signal.SIGTERM
        return self.signal_number is not None

    def _record(self, number: int, _frame: Any) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            os._exit(128 + number)
        self.signal_number = number
        with suppress(OSError):  # logging is not reentrant; a plain write is safe in a handler
            os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then a checkpoint\n".encode())

    def _raise(self, number: int, _frame: Any) -> None:
        raise Stopped(number)
