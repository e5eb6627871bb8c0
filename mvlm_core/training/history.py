"""History of a run: metrics of each step, kept on the device for several steps, then shown and written to a file.

``training_history.jsonl`` has one JSON record per step, each step exactly once even after interruptions.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from mvlm_core.export.manifest import HISTORY_LOG, TENSORBOARD
from mvlm_core.files import fsync_path, write_atomic
from mvlm_core.monitor import gpu_load, memory_in_use
from mvlm_core.training.run_length import RunLength
from mvlm_core.training.state import LoopState
from mvlm_core.training.task import Run
from mvlm_core.training.tensorboard import TensorBoardWriter

log = logging.getLogger("mvlm")


class StepLog:
    """Collects a record of each step from its metrics on the device; the main rank writes it to the history file."""

    def __init__(self, run: Run, tokens_per_step: int) -> None:
        self.path: Path = run.output_dir / HISTORY_LOG
        self._device = run.hardware.device
        self._is_main = run.ranks.is_main
        self._tokens_per_step = tokens_per_step
        self._tensorboard: TensorBoardWriter | None = None
        if run.settings.tensorboard and run.ranks.is_main:
            self._tensorboard = TensorBoardWriter(run.output_dir / TENSORBOARD)
        # Steps whose metrics are on the device: record, metrics, start in the run's wall time, seconds
        self._pending: list[tuple[dict[str, Any], dict[str, Tensor], float, float]] = []
        self._records: list[dict[str, Any]] = []  # read from the device, not yet in the history file

    def add(self, record: dict[str, Any], metrics: dict[str, Tensor], since: float, seconds: float) -> None:
        """Add a step that started at ``since`` (the run's wall time) and took ``seconds``, without synchronizing."""
        self._pending.append((record, metrics, since, seconds))

    def read(self, state: LoopState, clock: Callable[[], float]) -> str | None:
        """Copy the pending steps' metrics from the device into records; the only method that synchronizes.

        Returns the reason for a rollback if the divergence guard requests one.
        """
        started = clock()
        records = [
            record | {name: float(value) for name, value in metrics.items()} for record, metrics, *_ in self._pending
        ]
        since, count = self._pending[0][2], len(records)
        seconds = sum(taken for *_, taken in self._pending) + clock() - started
        load = gpu_load(self._device)
        common = {"tokens_per_second": count * self._tokens_per_step / seconds}
        common |= {"memory_bytes": memory_in_use(self._device)} | ({} if load is None else {"gpu_load": load})
        reason = None
        for number, record in enumerate(records, 1):
            record |= {"seconds": since + seconds * number / count} | common
            skipped = bool(record.pop("skipped"))
            reason = reason or state.guard.observe(record["step"], record["train_loss"], skipped)
            if skipped:
                log.warning("step %s skipped: non-finite loss or gradient", record["step"])
                record = {name: value for name, value in record.items() if math.isfinite(value)} | {"skipped": True}
            self._records.append(record)
        state.step_seconds += seconds
        self._pending = []
        return reason

    def show(self, bar: Any, state: LoopState, length: RunLength) -> None:
        """Show the newest record on the progress bar and in the log."""
        record = self._records[-1]
        loss, learning_rate = record.get("train_loss", math.nan), record["learning_rate"]
        shown = {"loss": f"{loss:.3f}", "lr": f"{learning_rate:.2g}"}
        if state.best_bpb is not None:
            shown["bits/byte"] = f"{state.best_bpb:.4f}"
        shown["mem"] = f"{record['memory_bytes'] / 2**30:.1f}G"
        if "gpu_load" in record:
            shown["gpu"] = f"{record['gpu_load']}%"
        bar.set_postfix(shown, refresh=False)
        step, speed = record["step"], record["tokens_per_second"]
        left = ""
        if length.total is not None:
            left = f"{tqdm.format_interval((length.total - step) * self._tokens_per_step / speed)} left"
        log.debug(
            f"step {step}/{length}  epoch {record['epoch']:.2f}  loss {loss:.4f}  "
            f"grad norm {record.get('grad_norm', math.nan):.2f}  lr {learning_rate:.3g}  {speed:,.0f} tok/s  "
            f"{record['memory_bytes'] / 1e6:.0f} MB  {left}"
        )

    def note(self, **values: float) -> None:
        """Add values to the newest record."""
        self._records[-1] |= values

    def write(self) -> None:
        """Append the records to the history file.

        Raises:
            OSError: no record was written; all are kept for the next call.
        """
        if self._is_main:
            append_records(self.path, self._records)
            if self._tensorboard is not None:
                self._tensorboard.add(self._records)
        self._records = []

    def discard(self) -> None:
        """Discard everything that has not been written."""
        self._pending, self._records = [], []


# --- the file -----------------------------------------------------------------------------------------------


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read all records, ignoring a truncated last line."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                break
            records.append(record)
    return records


def append_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Append all records or none.

    Raises:
        OSError: for example, the disk is full.
    """
    is_new = not path.exists()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        data = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise
    if is_new:
        fsync_path(path.parent)  # otherwise a power failure may lose the file itself, even if its content is flushed


def truncate_history(path: Path, step: int) -> None:
    """Drop the records after ``step``; the resumed run writes them again."""
    kept = [json.dumps(record) + "\n" for record in read_history(path) if record["step"] <= step]
    write_atomic(path, "".join(kept))
