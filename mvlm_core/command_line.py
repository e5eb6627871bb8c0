"""Command lines: the scripts' argument parser, a trainer's settings, and checks of arguments that scripts share."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mvlm_core.console import outlive_terminal, setup_logging
from mvlm_core.errors import UserError
from mvlm_core.hardware import DEVICES, set_process_environment
from mvlm_core.settings import TrainingSettings, add_options

Settings = TypeVar("Settings", bound=TrainingSettings)


class CommandLine(argparse.ArgumentParser):
    """Argument parser whose help shows ``description`` verbatim. Its errors are ``UserError``, without the usage text,
    and list all unknown options and malformed numbers at once."""

    def __init__(self, description: str | None, epilog: str | None = None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, epilog=epilog, formatter_class=formatter, allow_abbrev=False)
        for number, expected in ((int, "a whole number"), (float, "a number")):
            self.register("type", number, partial(_parse_number, number, expected))

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        options, unknown = self.parse_known_args(args, namespace)
        values = ((name, part) for name, value in vars(options).items() for part in _parts(value))
        problems = [f"--{name} {part}: not {part.expected}" for name, part in values if isinstance(part, _Malformed)]
        if unknown_options := [argument.split("=")[0] for argument in unknown if argument.startswith("--")]:
            known = re.findall(r"--\w+", self.format_usage())
            for name in unknown_options:
                close = difflib.get_close_matches("--" + name.lstrip("-").replace("-", "_"), known, 1)
                advice = f"did you mean {close[0]}?" if close else "--help lists the options"
                problems.append(f"{name}: no such option; {advice}")
        elif unknown:
            problems.append(f"unexpected: {' '.join(unknown)}; --help lists the options")
        if problems:
            raise UserError(problems)
        return options

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; --help lists the options")


class _Malformed(str):
    """An argument that should have been a number, and what was expected."""

    expected: str


def _parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _parse_number(number: type, expected: str, text: str) -> Any:
    try:
        return number(text)
    except ValueError:
        malformed = _Malformed(text)
        malformed.expected = expected
        return malformed


def trainer_settings(
    cls: type[Settings], arguments: list[str] | None, *, description: str | None, epilog: str, output_dir: Path
) -> Settings:
    """Parse a trainer's command line and prepare the process for training: signals, environment, logging.

    Raises:
        UserError: lists every problem.
    """
    parser = CommandLine(description, epilog)
    add_options(parser, cls)
    given = vars(parser.parse_args(arguments))
    if given["output_dir"] is None:
        given["output_dir"] = str(output_dir)
    settings = cls(**given).check()
    outlive_terminal()
    set_process_environment()
    writes = not settings.dry_run and os.environ.get("RANK", "0") == "0"  # only the main rank
    setup_logging(settings.log_file if writes else None, quiet=settings.quiet)
    return settings


def seed_problems(seed: int) -> list[str]:
    """Problems with the value of ``--seed``."""
    return [] if 0 <= seed < 2**63 else [f"--seed {seed}: must be from 0 to 2**63 - 1"]


def device_problems(device: str) -> list[str]:
    """Problems with the value of ``--device``."""
    return [] if device in DEVICES else [f"--device {device}: unknown; choose one of {', '.join(DEVICES)}"]
