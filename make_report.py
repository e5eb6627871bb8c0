#!/usr/bin/env python3
"""Write models/report.html: a self-contained report of a finished run that opens from disk, offline.

train_all_models.py writes it at the end; run this to regenerate it. Samples and governance traces are computed from the
trained models, everything else comes from the run's records.

Exit codes: 0 done, 2 bad arguments or no finished run, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mvlm_core.command_line import CommandLine, device_problems, seed_problems
from mvlm_core.errors import UserError, run_main
from mvlm_core.files import output_folder_problems, read_json
from mvlm_core.hardware import set_process_environment
from mvlm_core.run_layout import Layout
from mvlm_core.settings import DEFAULT_DATA_DIR, REPOSITORY_ROOT
from mvlm_core.signals import end_on_sigterm


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line.

    Raises:
        UserError: with all problems at once.
    """
    parser = CommandLine(__doc__)
    parser.add_argument("--work_dir", type=Path, default=REPOSITORY_ROOT, help="parent of models/ [this repository]")
    parser.add_argument("--data_dir", default=str(DEFAULT_DATA_DIR), help="corpus to draw held-out verses from")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda [default auto]")
    parser.add_argument("--seed", type=int, default=0, help="random seed for verses and samples [default 0]")
    options = parser.parse_args(arguments)
    problems = output_folder_problems(options.work_dir / "models", "--work_dir:")
    problems += device_problems(options.device) + seed_problems(options.seed)
    if not Path(options.data_dir).is_dir():
        problems.append(f"--data_dir {options.data_dir}: no such folder")
    options.layout = Layout(options.work_dir.absolute())
    if not problems and not read_json(options.layout.summary):
        problems.append(f"{options.layout.summary}: no record of a run; run train_all_models.py first")
    if problems:
        raise UserError(problems)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    set_process_environment()
    from mvlm_core.pipeline.report import make_report
    from prioritary_mvlm.config import MODELING_FILES

    page = make_report(options.layout, options.data_dir, MODELING_FILES, device=options.device, seed=options.seed)
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    end_on_sigterm()  # cleans up unfinished output
    run_main(main)
