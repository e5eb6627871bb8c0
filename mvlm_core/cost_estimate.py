"""Itemized estimate of a run in minutes and dollars."""

from __future__ import annotations

from dataclasses import dataclass

PRICE_PER_HOUR = 4.0  # US dollars, for a rented H200
PRICE = f"{PRICE_PER_HOUR:.2f} dollars an hour"
# Stages of the main job other than training.
PACKAGES_SECONDS = 150.0  # three gigabytes of wheels on a fresh machine
CORPUS_SECONDS = 60.0
SUITE_SECONDS = 60.0  # per model
REPORT_SECONDS = 20.0
PACKING_BYTES_PER_SECOND = 30e6  # weights, compressed into an archive on one core
RESCORED_SHARE = 1 / 8  # of the test split's windows, during validation
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


def format_costs(items: list[Item], *, rented: bool) -> list[str]:
    """Format the items and their total as lines of text.

    Args:
        rented: whether the machine is rented, so that each line includes its cost.
    """
    total = Item("total", sum(item.seconds for item in items))
    width = max(len(item.name) for item in [*items, total])
    lines = []
    for item in [*items, total]:
        dollars = f"{item.seconds / 3600 * PRICE_PER_HOUR:7.2f} dollars" if rented else ""
        lines.append(f"{item.name:<{width}}  {item.seconds / 60:7.1f} min{dollars}  {item.detail}".rstrip())
    return lines
