"""Helpers shared by all benchmark commands: argument parser, Markdown tables with spreads, and ``--json``."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mvlm_core.command_line import CommandLine
from mvlm_core.errors import UserError
from mvlm_core.files import write_json_atomic

EXIT_CODES = "Exit codes: 0 done, 1 something failed, 2 bad arguments, 130/143 stopped by a signal."


def new_parser(description: str | None, epilog: str = EXIT_CODES, *, json: bool = True) -> argparse.ArgumentParser:
    """Create a parser that shows the module docstring as help, with a ``--json`` option unless disabled."""
    parser = CommandLine(description, epilog)
    if json:
        parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser


def whole_numbers(text: str) -> list[int]:
    """Parse an option with comma-separated whole numbers above 0."""
    if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: whole numbers above 0, separated by commas")
    return [int(part) for part in text.split(",")]


def at_least_one(options: argparse.Namespace, *names: str) -> list[str]:
    """Return a problem for each of these options that is given and below 1."""
    too_low = [name for name in names if (value := vars(options)[name]) is not None and value < 1]
    return [f"--{name} {vars(options)[name]}: must be at least 1" for name in too_low]


def parse_only(only: str | None, known: Iterable[str], default: Iterable[str] | None = None) -> list[str]:
    """Return the comma-separated names given to ``--only``; otherwise ``default``, otherwise all.

    Raises:
        UserError: unknown names.
    """
    known = list(known)
    names = [name.strip() for name in only.split(",")] if only else list(known if default is None else default)
    if unknown := [name for name in names if name not in known]:
        raise UserError([f"--only {name!r}: choose from {', '.join(known)}" for name in unknown])
    return names


def row(cells: Iterable[object]) -> str:
    """Format a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(columns: Sequence[str], left: int = 1) -> str:
    """Format the header of a Markdown table; all columns but the first ``left`` are right-aligned."""
    return row(columns) + "\n" + row("---" if number < left else "---:" for number in range(len(columns)))


def table(columns: Sequence[str], rows: Iterable[Iterable[object]], left: int = 1) -> str:
    """Format a Markdown table."""
    return "\n".join([head(columns, left), *map(row, rows)])


def spread(
    values: Sequence[float], form: str = "{:.4f}", center: Callable[[Sequence[float]], float] = statistics.mean
) -> str:
    """Format ``center (min … max)``, or only the center if minimum and maximum format identically."""
    shown = [form.format(statistic(values)).replace("-", "−") for statistic in (center, min, max)]
    return shown[0] if shown[1] == shown[2] else "{} ({} … {})".format(*shown)


def deviation(values: Sequence[float]) -> str:
    """Format ``mean ± standard deviation``, or a single value alone."""
    error = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{error}"


def show(text: str, figures: Any, options: argparse.Namespace) -> None:
    """Print the tables and write their figures to the ``--json`` file, if given."""
    print(text)
    save_json(figures, options)


def save_json(figures: Any, options: argparse.Namespace) -> None:
    """Write the figures to the ``--json`` file, if given."""
    if options.json:
        write_json_atomic(options.json, figures)
