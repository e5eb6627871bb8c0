"""Metrics of a training run, defined once for all records, tables and plots: name, label and unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# The file format fixes this name; the corpus manifest names the translation.
PRIMARY_TEST_BPB = "test_bpb_kjv"
# Bits per byte. Smaller differences between two single runs are noise: 95 % of the differences between two seeds of one
# model are below 2·√2·sd, with sd = 0.0076 (GPT-2, `cpu` preset, test text, three seeds; 2026-11-29 in LOG.md).
NOISE_BPB = 0.02


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: key in `training_config.json` and `training_summary.json`.
        label: display name without the unit.
        unit: "" for a plain number.
        form: format string for `str.format`.
    """

    name: str
    label: str
    unit: str
    form: str = "{:,.0f}"

    @property
    def title(self) -> str:
        """Label and unit, as a row heading."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def text(self, value: Any) -> str:
        """Format the value; a dash for None."""
        return "-" if value is None else self.form.format(value)


_BPB = "bits per byte"
METRICS = (
    Metric("parameters", "parameters", ""),
    Metric("bytes", "training text", "bytes"),
    Metric("tokens", "training text", "tokens"),
    Metric("seconds", "training time", "seconds"),
    Metric("tokens_per_second", "training speed", "tokens/s"),
    Metric("peak_memory_bytes", "peak memory", "bytes"),
    Metric("size_bytes", "model files", "bytes"),  # known once the export is written
    Metric("validation_bpb", "validation", _BPB, "{:.4f}"),
    Metric("test_bpb", "test", _BPB, "{:.4f}"),
    Metric(PRIMARY_TEST_BPB, "test, primary translation", _BPB, "{:.4f}"),
)
# For fine-tuning: scores before it, and forgetting on the old corpus's test text.
FINE_TUNING_METRICS = (
    Metric("validation_bpb_before", "validation, before fine-tuning", _BPB, "{:.4f}"),
    Metric("test_bpb_before", "test, before fine-tuning", _BPB, "{:.4f}"),
    Metric("old_test_bpb_before", "test, old corpus, before fine-tuning", _BPB, "{:.4f}"),
    Metric("old_test_bpb", "test, old corpus", _BPB, "{:.4f}"),
)
BY_NAME = {metric.name: metric for metric in (*METRICS, *FINE_TUNING_METRICS)}
