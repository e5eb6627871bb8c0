"""The history as TensorBoard event files, for who wants to watch a run there. It never stops a run."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

EVENTS_NAME = "tensorboard"
NOT_DRAWN = {"step", "tokens", "bytes", "seconds", "epoch", "skipped"}
log = logging.getLogger("mvlm")


class EventFiles:
    """Writes every number of a history record as a scalar of its step, below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._last_step = 0
        self._broken = importlib.util.find_spec("tensorboard") is None
        if self._broken:
            log.warning("--tensorboard: it is not installed (pip install tensorboard); training goes on without it")

    def add(self, records: list[dict[str, Any]]) -> None:
        """Write records; the first one says where an interrupted or rolled back run goes on from."""
        if self._broken:
            return
        try:
            for record in records:
                self._open_at(record["step"])
                for name, value in record.items():
                    if name not in NOT_DRAWN:
                        self._writer.add_scalar(name, value, record["step"])
            if self._writer is not None:
                self._writer.flush()
        except Exception as error:  # whatever it is, the run is worth more
            log.warning("TensorBoard's files cannot be written, training goes on without: %s", error)
            self._broken = True

    def _open_at(self, step: int) -> None:
        if self._writer is None or step <= self._last_step:
            from torch.utils.tensorboard import SummaryWriter

            if self._writer is not None:
                self._writer.close()
            self._writer = SummaryWriter(str(self.folder), purge_step=step)
        self._last_step = step
