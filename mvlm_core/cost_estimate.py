"""Itemized estimate of a run in minutes and dollars."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field

PRICE_PER_HOUR = 4.0  # US dollars, for one rented H200; a machine with several costs a multiple
# Stages of the main job other than training.
PACKAGES_SECONDS = 150.0  # three gigabytes of wheels on a fresh machine
CORPUS_SECONDS = 60.0
SUITE_SECONDS = 60.0  # per model
REPORT_SECONDS = 20.0
PACKING_BYTES_PER_SECOND = 30e6  # weights, compressed into an archive on one core
RESCORED_SHARE = 1 / 8  # of the test split's documents, during validation
VERIFICATION_BYTES_PER_SECOND = 200e6  # archives, unpacked and hashed
# Environment variable that makes a trainer's dry run print its plan as JSON, for the main job to add up.
JSON_VARIABLE = "MVLM_PLAN_AS_JSON"
# Names of the items.
PREPARATION, COMPILATION, TEACHERS, STEPS = "tokenizer and tokens", "compilation", "teachers", "training steps"
EVALUATIONS, CHECKPOINTS, EXPORT = "evaluations", "checkpoints", "export and test scores"


@dataclass(frozen=True)
class Item:
    """One line of the estimate."""

    name: str
    seconds: float
    detail: str = ""


def format_costs(items: list[Item], *, gpus: int) -> list[str]:
    """Format the items and their total as lines of text.

    Args:
        gpus: GPUs of the rented machine, whose price is included; 0 if it is not rented.
    """
    price = f"at {PRICE_PER_HOUR:g} dollars per GPU-hour" + (f" × {gpus}" if gpus > 1 else "")
    total = Item("total", sum(item.seconds for item in items), price if gpus else "")
    width = max(len(item.name) for item in [*items, total])
    lines = []
    for item in [*items, total]:
        dollars = f"{item.seconds / 3600 * PRICE_PER_HOUR * gpus:7.2f} dollars" if gpus else ""
        lines.append(f"{item.name:<{width}}  {item.seconds / 60:7.1f} min{dollars}  {item.detail}".rstrip())
    return lines


@dataclass(frozen=True)
class Plan:
    """What a trainer's dry run found: a description of the run and its itemized estimate.

    Attributes:
        steps: estimated number without a time limit; None if only time limits the run, or if the dry run failed.
        by_time: whether time limits the run.
        gpus: GPUs of the rented machine, including those that the run does not use; 0 if it is not rented.
        exit_code: of the dry run; if it failed, ``lines`` has the reason and there are no items.
    """

    lines: list[str]
    items: list[Item] = field(default_factory=list)
    steps: int | None = None
    by_time: bool = False
    assumptions: list[str] = field(default_factory=list)
    gpus: int = 0
    export_bytes: int = 0
    exit_code: int = 0

    def costs(self) -> list[str]:
        """Format the items; empty without any."""
        return format_costs(self.items, gpus=self.gpus) if self.items else []

    def text(self) -> str:
        """Format the plan for the console, or as JSON when ``train_all_models.py`` asks for it."""
        if os.environ.get(JSON_VARIABLE):
            return json.dumps(asdict(self))
        return "\n".join([*self.lines, *self.costs(), "assumed: " + "; ".join(self.assumptions)])

    @classmethod
    def of_json(cls, text: str) -> Plan:
        """Read what ``text`` wrote as JSON."""
        values = json.loads(text)
        return cls(**values | {"items": [Item(**item) for item in values["items"]]})
