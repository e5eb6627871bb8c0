"""Training history as TensorBoard scalars. TensorBoard errors never stop a run."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

NOT_PLOTTED = {"step", "tokens", "bytes", "seconds", "epoch", "skipped"}
log = logging.getLogger("mvlm")


class TensorBoardWriter:
    """Writes the values of history records to ``folder`` as scalars."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._last_step = 0
        self._broken = importlib.util.find_spec("tensorboard") is None
        if self._broken:
            log.warning("--tensorboard: not installed (pip install tensorboard); training continues without it")

    def add(self, records: list[dict[str, Any]]) -> None:
        """Write records; after a resume or a rollback, repeated steps replace the earlier ones."""
        if self._broken or not records:
            return
        try:
            for record in records:
                self._open_at(record["step"])
                for name in record.keys() - NOT_PLOTTED:
                    self._writer.add_scalar(name, record[name], record["step"])
            self._writer.flush()
        except Exception as error:  # must never stop a run
            log.warning("cannot write TensorBoard files, training continues without them: %s", error)
            self._broken = True

    def _open_at(self, step: int) -> None:
        if self._writer is None or step <= self._last_step:
            from torch.utils.tensorboard import SummaryWriter

            if self._writer is not None:
                self._writer.close()
            self._writer = SummaryWriter(str(self.folder), purge_step=step)
        self._last_step = step
