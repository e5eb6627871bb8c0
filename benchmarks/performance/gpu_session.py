"""What the checks of ``gpu_check`` share: options, hardware, and results that later checks use."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvlm_core.hardware import Hardware

if TYPE_CHECKING:  # without torch, which is imported after the command line is parsed
    from torch import Tensor

NOT_HERE = "not on this machine"
Row = tuple[str, dict[str, Any], bool | None]  # case, figures, and whether they are correct (None: not checked)


@dataclass(frozen=True)
class FinishedRun:
    """A run of ``real_steps``, for ``resume``: its checkpoint folder, history, and weights on the CPU."""

    checkpoints: Path
    history: list[dict[str, Any]]
    weights: dict[str, Tensor]


@dataclass
class Session:
    """One run of ``gpu_check``.

    Attributes:
        options: the parsed command line.
        hardware: device, precision, attention and compilation of a training run on this machine.
        scratch: a temporary folder.
        remaining: the checks not yet completed, the current one first.
        cases: correctness cases by model and whether it is a student, created on first use.
        matmul_peak: measured FLOP/s of a large matrix product, by precision.
        finished: runs of ``real_steps`` by preset and model.
        rows: rows of the report: check, case, figures, passed.
        failed: exceptions by check.
    """

    options: argparse.Namespace
    hardware: Hardware
    scratch: Path
    remaining: list[str] = field(default_factory=list)
    cases: dict[tuple[str, bool], Any] = field(default_factory=dict)
    matmul_peak: dict[str, float] = field(default_factory=dict)
    finished: dict[tuple[str, str], FinishedRun] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def places(self) -> dict[str, str]:
        """Settings that locate the corpus and the cache."""
        return {name: str(vars(self.options)[name].absolute()) for name in ("data_dir", "cache_dir")}
