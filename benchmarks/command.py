"""What the commands of all benchmarks share: the parser, Markdown tables with their spreads, and ``--json``."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mvlm_core.errors import UserError
from mvlm_core.files import write_json_atomic

EXIT_CODES = "Exit codes: 0 done, 1 something failed, 2 bad arguments, 130/143 stopped by a signal."


def new_parser(description: str | None, epilog: str = EXIT_CODES, *, json: bool = True) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring, with ``--json`` where there are figures to keep."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=formatter)
    if json:
        parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser


def whole_numbers(text: str) -> list[int]:
    """The type of an option that takes whole numbers above 0, separated by commas."""
    if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: whole numbers above 0, separated by commas")
    return [int(part) for part in text.split(",")]


def below_one(options: argparse.Namespace, *names: str) -> list[str]:
    """A problem for each of these options that is below 1."""
    return [f"--{name} {vars(options)[name]}: at least 1" for name in names if vars(options)[name] < 1]


def chosen(only: str | None, known: Iterable[str], default: Iterable[str] | None = None) -> list[str]:
    """The names given to ``--only``, separated by commas; without any, ``default`` or all.

    Raises:
        UserError: names that are unknown.
    """
    known = list(known)
    names = [name.strip() for name in only.split(",")] if only else list(known if default is None else default)
    if unknown := [name for name in names if name not in known]:
        raise UserError([f"--only {name!r}: choose from {', '.join(known)}" for name in unknown])
    return names


def row(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(columns: Sequence[str], left: int = 1) -> str:
    """The first two lines of a Markdown table; all columns but the first ``left`` are aligned to the right."""
    return row(columns) + "\n" + row("---" if number < left else "---:" for number in range(len(columns)))


def table(columns: Sequence[str], rows: Iterable[Iterable[object]], left: int = 1) -> str:
    """A Markdown table."""
    return "\n".join([head(columns, left), *map(row, rows)])


def spread(
    values: Sequence[float], form: str = "{:.4f}", middle: Callable[[Sequence[float]], float] = statistics.mean
) -> str:
    """``mean (least … most)``; the mean alone where all are shown alike."""
    shown = [form.format(of(values)).replace("-", "−") for of in (middle, min, max)]
    return shown[0] if shown[1] == shown[2] else "{} ({} … {})".format(*shown)


def deviation(values: Sequence[float]) -> str:
    """``mean ± standard deviation``; the value alone where there is one."""
    error = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{error}"


def show(text: str, found: Any, options: argparse.Namespace) -> None:
    """Print the tables, and write their figures to ``--json``."""
    print(text)
    keep(found, options)


def keep(found: Any, options: argparse.Namespace) -> None:
    """Write the figures to ``--json``, where that is given."""
    if options.json:
        write_json_atomic(options.json, found)
