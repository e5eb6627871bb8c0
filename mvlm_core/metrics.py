"""Metrics of a training run, defined once for all records, tables and plots: name, label, unit and direction."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
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
        lower_is_better: None if neither direction is better.
    """

    name: str
    label: str
    unit: str
    form: str = "{:,.0f}"
    lower_is_better: bool | None = None

    @property
    def title(self) -> str:
        """Label and unit, as a row heading."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def direction(self) -> str:
        """Which values are better, for a note; "" if neither."""
        return {True: "lower is better", False: "higher is better", None: ""}[self.lower_is_better]

    def text(self, value: Any) -> str:
        """Format the value; a dash for None."""
        return "-" if value is None else self.form.format(value)


_bits_per_byte = partial(Metric, unit="bits per byte", form="{:.4f}", lower_is_better=True)
METRICS = (
    Metric("parameters", "parameters", ""),
    Metric("bytes", "training text", "bytes"),
    Metric("tokens", "training text", "tokens"),
    Metric("seconds", "training time", "seconds", lower_is_better=True),
    Metric("tokens_per_second", "training speed", "tokens/s", lower_is_better=False),
    Metric("peak_memory_bytes", "peak memory", "bytes", lower_is_better=True),
    Metric("size_bytes", "model files", "bytes", lower_is_better=True),  # known once the export is written
    _bits_per_byte("validation_bpb", "validation"),
    _bits_per_byte("test_bpb", "test"),
    _bits_per_byte(PRIMARY_TEST_BPB, "test, primary translation"),
)
# For fine-tuning: scores before it, and forgetting on the old corpus's test text.
FINE_TUNING_METRICS = (
    _bits_per_byte("validation_bpb_before", "validation, before fine-tuning"),
    _bits_per_byte("test_bpb_before", "test, before fine-tuning"),
    _bits_per_byte("old_test_bpb_before", "test, old corpus, before fine-tuning"),
    _bits_per_byte("old_test_bpb", "test, old corpus"),
)
BY_NAME = {metric.name: metric for metric in (*METRICS, *FINE_TUNING_METRICS)}
