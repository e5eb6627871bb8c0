"""Paths of a run's files, and reading its records; damaged records count as missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mvlm_core.files import read_regular


class Layout:
    """Paths of a run's files below ``root``, set by ``--work_dir``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models, self.logs, self.downloads = root / "models", root / "logs", root / "models_for_download"
        self.summary = self.models / "training_summary.json"
        self.evaluation_suite = self.models / "evaluation_suite.json"
        self.comparison_plot = self.models / "comparison.png"
        self.validation_report = self.models / "validation_report.json"
        self.report = self.models / "report.html"
        self.checksums = self.downloads / "SHA256SUMS"

    def export(self, name: str) -> Path:
        return self.models / name

    def log_file(self, name: str) -> Path:
        return self.logs / f"{name}_training.log"

    def archive(self, name: str) -> Path:
        return self.downloads / f"{name}_model.tar.gz"

    def formats(self, name: str) -> Path:
        return self.models / f"{name}_formats"

    def formats_archive(self, name: str) -> Path:
        return self.downloads / f"{name}_formats.tar.gz"


def finite_number(value: Any) -> Any:
    """Return ``value`` if it is a finite number of plausible size, else None (a damaged record)."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e18 else None


def training_history(export: Path) -> list[dict[str, Any]]:
    """Read the records of ``training_history.json`` that have what a plot needs, skipping damaged ones."""
    try:
        records = json.loads(read_regular(export / "training_history.json"))
    except (OSError, ValueError, RecursionError):
        return []
    objects = [record for record in records if isinstance(record, dict)] if isinstance(records, list) else []
    return [
        record
        for record in objects
        if all(finite_number(record.get(key)) is not None for key in ("bytes", "seconds"))
        and finite_number(record.get("validation_bpb", 0.0)) is not None
    ]
