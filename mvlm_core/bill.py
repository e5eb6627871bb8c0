"""A bill: what a run takes, line by line, in minutes and money."""

from __future__ import annotations

from dataclasses import dataclass

PRICE_PER_HOUR = 4.0  # US dollars, of a rented H200
PRICE = f"{PRICE_PER_HOUR:.2f} dollars an hour"
# What the main job takes beside its trainers.
PACKAGES_SECONDS = 150.0  # three gigabytes of wheels, from a fresh machine
CORPUS_SECONDS = 60.0
SUITE_SECONDS = 60.0  # each model
REPORT_SECONDS = 20.0
PACKED_PER_SECOND = 30e6  # bytes of weights into an archive, by one core
RESCORED_SHARE = 1 / 8  # of the test text's windows, by validation
READ_PER_SECOND = 200e6  # bytes of an archive, unpacked and hashed
# In the environment of a trainer's dry run: it prints its plan as JSON, for the main job to add up.
JSON_VARIABLE = "MVLM_PLAN_AS_JSON"


@dataclass(frozen=True)
class Item:
    """One line: what it is, its seconds, and what they are for."""

    name: str
    seconds: float
    detail: str = ""


def bill(items: list[Item], *, paid: bool) -> list[str]:
    """The items and their sum as lines of text.

    Args:
        paid: whether the machine costs money, so that each line says how much.
    """
    together = Item("together", sum(item.seconds for item in items))
    width = max(len(item.name) for item in [*items, together])
    lines = []
    for item in [*items, together]:
        dollars = f"{item.seconds / 3600 * PRICE_PER_HOUR:7.2f} dollars" if paid else ""
        lines.append(f"{item.name:<{width}}  {item.seconds / 60:7.1f} min{dollars}  {item.detail}".rstrip())
    return lines
