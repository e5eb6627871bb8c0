"""Command lines: the scripts' argument parser, a trainer's settings, and checks of arguments that scripts share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TypeVar

from mvlm_core.console import outlive_terminal, setup_logging
from mvlm_core.hardware import DEVICES, set_process_environment
from mvlm_core.settings import TrainingSettings, add_options

Settings = TypeVar("Settings", bound=TrainingSettings)


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Argument parser whose help shows a script's docstring verbatim."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def trainer_settings(
    cls: type[Settings], arguments: list[str] | None, *, description: str | None, epilog: str, output_dir: Path
) -> Settings:
    """Parse a trainer's command line and prepare the process for training: signals, environment, logging.

    Raises:
        UserError: lists every problem.
    """
    parser = command_line(description)
    parser.epilog = epilog
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
