"""The results of a training run, once: name, label, unit and direction of each, for every record, table and plot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# The name is fixed by the file format. Which translation it is, the corpus manifest says.
PRIMARY_TEST_BPB = "test_bpb_kjv"


@dataclass(frozen=True)
class Metric:
    """One result.

    Attributes:
        name: its key in `training_config.json` and `training_summary.json`.
        label: for people, without the unit.
        unit: what the value is counted in, "" for a plain number.
        form: how the value is written, as in `str.format`.
        better: which direction is better; None where neither is.
    """

    name: str
    label: str
    unit: str
    form: str = "{:,.0f}"
    better: Literal["lower", "higher"] | None = None

    @property
    def title(self) -> str:
        """Label and unit, as a table's row is headed."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def text(self, value: Any) -> str:
        """The value as it is shown; a dash where there is none."""
        return "-" if value is None else self.form.format(value)


_BPB = "bits per byte"
METRICS = (
    Metric("parameters", "parameters", ""),
    Metric("bytes", "training text", "bytes"),
    Metric("tokens", "training text", "tokens"),
    Metric("seconds", "training time", "seconds", better="lower"),
    Metric("tokens_per_second", "training speed", "tokens/s", better="higher"),
    Metric("peak_memory_bytes", "peak memory", "bytes", better="lower"),
    Metric("size_bytes", "model files", "bytes", better="lower"),  # known once the export is written
    Metric("validation_bpb", "validation", _BPB, "{:.4f}", "lower"),
    Metric("test_bpb", "test", _BPB, "{:.4f}", "lower"),
    Metric(PRIMARY_TEST_BPB, "test, primary translation", _BPB, "{:.4f}", "lower"),
)
# Of a model that was trained further: what it had before, and what of the old text it has forgotten since.
CONTINUED = (
    Metric("validation_bpb_before", "validation, before further training", _BPB, "{:.4f}", "lower"),
    Metric("test_bpb_before", "test, before further training", _BPB, "{:.4f}", "lower"),
    Metric("old_test_bpb_before", "old text's test, before further training", _BPB, "{:.4f}", "lower"),
    Metric("old_test_bpb", "old text's test", _BPB, "{:.4f}", "lower"),
)
BY_NAME = {metric.name: metric for metric in (*METRICS, *CONTINUED)}
