"""``training_history.jsonl``: one JSON record per step, each step exactly once even after interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mvlm_core.files import fsync_path, write_atomic

HISTORY_NAME = "training_history.jsonl"


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
