"""The text probes' results (``text_probe_run.measure``) as rows of words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def share(mean: dict[str, Any], sign: str = "") -> str:
    """A mean as a percentage with its standard error."""
    if mean["value"] is None:
        return "–"
    error = "" if mean["error"] is None else f" ± {mean['error']:.1%}"
    return f"{mean['value']:{sign}.1%}{error}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}%}"


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """The table: what was asked, the held-out text's own value, and each model's."""
    if not results:
        return []
    table: list[list[str]] = []

    def row(what: str, value: Callable[[dict[str, Any]], str], text: str = "") -> None:
        table.append([what, text, *(value(result) for result in results)])

    if all("bits_per_byte" in result for result in results):
        row("bits per byte", lambda r: f"{r['bits_per_byte']['all']:.4f}")
        for part in ("books", "translations"):
            for name in results[0]["bits_per_byte"][part]:
                row(f"· {name}", lambda r, part=part, name=name: f"{r['bits_per_byte'][part][name]:.4f}")
    row("calibration error (ECE)", lambda r: _percent(r["calibration"]["error"], 2))
    row("· mean confidence", lambda r: _percent(r["calibration"]["confidence"], 2))
    row("· accuracy, next token", lambda r: _percent(r["calibration"]["accuracy"], 2))
    row("last word, all text before it", lambda r: share(r["cloze"]["full"]))
    row("last word, the verse alone", lambda r: share(r["cloze"]["alone"]))
    for key, words in (("exact", "second half exact"), ("prefix", "common prefix"), ("longest", "longest match")):
        row(f"{words}, train", lambda r, key=key: share(r["recall_train"][key]))
        row(f"{words}, held out", lambda r, key=key: share(r["recall_held_out"][key]))
        row("· memorised (difference)", lambda r, key=key: share(r["memorised"][key], "+"))
    text = results[0]["repetition"]["reference"]
    for kind in ("greedy", "sampled"):
        row(f"rep-4, {kind}", lambda r, kind=kind: share(r["repetition"][kind]["rep_4"]), share(text["rep_4"]))
        row(
            f"distinct-2, {kind}",
            lambda r, kind=kind: _percent(r["repetition"][kind]["distinct_2"]),
            _percent(text["distinct_2"]),
        )
    for rule, found in results[0]["pairs"].items():
        row(f"{rule} ({found['count']} pairs)", lambda r, rule=rule: share(r["pairs"][rule]))
    return table
