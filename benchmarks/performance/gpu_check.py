"""Check a GPU's numerical correctness and speed within a time limit; print one table and write one JSON file.

    python -m benchmarks.performance.gpu_check --minutes 10 --json gpu_check.json

Checks run in order of priority: correctness (``gpu_correctness``), then speed (``gpu_speed``). Checks that do not fit
in the time limit are listed. On a CPU, checks that need a GPU are reported as such.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.performance.gpu_session import Session
from mvlm_core.errors import UserError, run_main
from mvlm_core.files import write_json_atomic
from mvlm_core.hardware import PRECISIONS, set_process_environment
from mvlm_core.settings import CACHE_DIR, DEFAULT_DATA_DIR, PRESET_NAMES

EXIT_CODES = "Exit codes: 0 all numbers correct, 1 wrong numbers or too little time to check them, 2 bad arguments."
# Names of the checks, in the modules' ``CHECKS``: their functions need torch, which is imported after parsing.
CORRECTNESS = ("loss_and_gradients", "compiled_gradients", "cached_decoding", "attention_backends")
SPEED = ("products_and_clock", "real_steps", "resume", "all_reduce", "compiled_or_not", "micro_batches")
MARKS = {None: "", True: "pass", False: "FAIL"}


class OutOfTime(BaseException):
    """The time limit was reached. A BaseException, so that no ``except Exception`` catches it."""


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line; add ``checks``, the names of the checks to run."""
    parser = command.new_parser(__doc__, EXIT_CODES)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="[default cuda]")
    add("--minutes", type=float, default=10.0, help="time limit [default 10]")
    add("--only", metavar="CHECKS", help=f"comma-separated checks to run, from: {', '.join(CORRECTNESS + SPEED)}")
    add("--presets", help="presets for real_steps; other checks use the first one's [default h200, on a CPU smoke]")
    add("--precision", choices=PRECISIONS[1:], help="checked besides fp32, emulated if necessary [default: a run's]")
    add("--deterministic", action="store_true", help="check runs with this training flag: cost and reproducibility")
    add("--layers", type=int, help="layers in correctness checks [default: the preset's, at most 4]")
    add("--tokens", type=int, help="context length in correctness checks [default: the preset's]")
    add("--steps", type=int, default=200, help="steps of real_steps per model [default 200]")
    add("--seconds", type=float, default=3.0, help="duration of each timing [default 3]")
    add("--data_dir", type=Path, default=DEFAULT_DATA_DIR)
    add("--cache_dir", type=Path, default=CACHE_DIR, help="cache of tokenizers and tokens")
    options = parser.parse_args(arguments)
    options.presets = (options.presets or {"cuda": "h200", "cpu": "smoke"}[options.device]).split(",")
    problems = [f"--presets {name}: unknown" for name in options.presets if name not in PRESET_NAMES[1:]]
    for name, min_ in {"minutes": 0.001, "layers": 1, "tokens": 16, "steps": 2}.items():
        if (value := vars(options)[name]) is not None and value < min_:
            problems.append(f"--{name} {value}: at least {min_}")
    if problems:
        raise UserError(problems)
    options.checks = command.parse_only(options.only, CORRECTNESS + SPEED)
    return options


def run_checks(session: Session) -> None:
    """Run the remaining checks; store and print each row as it is produced."""
    import torch

    from benchmarks.performance import gpu_correctness, gpu_speed

    checks = gpu_correctness.CHECKS | gpu_speed.CHECKS
    while session.remaining:
        name = session.remaining[0]
        session.hardware.apply()
        if name in CORRECTNESS:  # full fp32 precision: TF32 rounds to ten bits
            torch.set_float32_matmul_precision("highest")
        try:
            for case, figures, passed in checks[name](session):
                session.rows.append({"check": name, "case": case, "figures": figures, "passed": passed})
                shown = {key: value for key, value in figures.items() if not isinstance(value, dict)}
                cells = [f"{key} {v:,.4g}" if isinstance(v, float) else f"{key} {v}" for key, v in shown.items()]
                print(command.row((name, case, ", ".join(cells), MARKS[passed])), flush=True)
        except UserError:
            raise
        except Exception as error:  # continue with the remaining checks
            session.failed[name] = f"{type(error).__name__}: {error}"
        session.remaining.pop(0)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    set_process_environment()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silence the profiler's start and stop messages
    import torch

    from mvlm_core.console import silence_transformers
    from mvlm_core.hardware import choose_hardware, describe

    def end(*_: Any) -> None:
        raise OutOfTime

    hardware = choose_hardware(device=options.device, deterministic=options.deterministic)
    hardware.apply()
    silence_transformers()
    matmul = f"fp32 matmul precision: {torch.get_float32_matmul_precision()} (highest in correctness checks)"
    machine = [*describe(hardware), f"torch {torch.__version__}, {matmul}"]
    print("\n".join(machine) + "\n\n" + command.head(("check", "case", "measured", "result"), left=4), flush=True)
    before = signal.signal(signal.SIGALRM, end)
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(options, hardware, Path(scratch), list(options.checks))
        try:
            # Once a second from then on: Python drops an exception that is raised in a callback or a finalizer.
            signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes, 1.0)
            run_checks(session)
        except OutOfTime:
            pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    remaining, failed = session.remaining, session.failed
    print(f"\nNot reached: {', '.join(remaining)}." if remaining else "\nAll checks completed.")
    print(*(f"{name} failed with an exception: {error}" for name, error in failed.items()), sep="\n")
    if options.json:
        report = {"machine": machine, "rows": session.rows, "not_reached": remaining, "failed_with_exception": failed}
        write_json_atomic(options.json, json.loads(json.dumps(report), parse_constant=str))  # NaN is not valid JSON
    unchecked = {*failed, *remaining} & {*CORRECTNESS}
    return 1 if unchecked or any(row["passed"] is False for row in session.rows) else 0


if __name__ == "__main__":
    run_main(main)
