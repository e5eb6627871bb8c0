"""Is this GPU right, and how fast is it here? One command that ends in time, with one table and one JSON.

    python -m benchmarks.performance.gpu_check --minutes 10 --json gpu_check.json

The checks come in order of worth: what is right (``gpu_correctness``), then what is fast (``gpu_speed``). What the time
does not reach is named. On a CPU, what needs a GPU says so.
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
from mvlm_core.errors import UserError, run_main
from mvlm_core.files import write_json_atomic
from mvlm_core.hardware import PRECISIONS, set_process_environment
from mvlm_core.settings import CACHE_DIR, DEFAULT_DATA_DIR, PRESET_NAMES

EXIT_CODES = "Exit codes: 0 nothing wrong was found, 1 wrong numbers, 2 bad arguments."
JUDGING = ("loss_and_gradients", "cached_decoding", "attention_backends")
TIMING = ("products_and_clock", "real_steps", "resume", "all_reduce", "compiled_or_not", "micro_batches")
MARKS = {None: "", True: "right", False: "WRONG"}


class OutOfTime(BaseException):
    """The time is over; no ``except Exception`` on the way may hold it up."""


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, and what the checks share: judged cases, measured ceilings, finished runs, the table so far."""
    parser = command.new_parser(__doc__, EXIT_CODES)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="[default cuda]")
    add("--minutes", type=float, default=10.0, help="after which it ends [default 10]")
    add("--only", help=f"these checks, separated by commas, of: {', '.join(JUDGING + TIMING)}")
    add("--presets", help="of real_steps; all else has the first one's text and width [default h200, on a CPU smoke]")
    add("--precision", choices=PRECISIONS[1:], help="judged beside fp32, emulated if need be [default: a run's]")
    add("--deterministic", action="store_true", help="as a run with that flag: what it costs, and what it holds")
    add("--layers", type=int, help="of what is judged [default: the preset's, at most 4]")
    add("--tokens", type=int, help="of its context [default: the preset's]")
    add("--steps", type=int, default=200, help="of real_steps, for each model [default 200]")
    add("--seconds", type=float, default=3.0, help="of each timing [default 3]")
    add("--data_dir", type=Path, default=DEFAULT_DATA_DIR)
    add("--cache_dir", type=Path, default=CACHE_DIR, help="of tokenizers and tokens")
    o = parser.parse_args(arguments)
    o.presets = (o.presets or {"cuda": "h200", "cpu": "smoke"}[o.device]).split(",")
    problems = [f"--presets {name}: unknown" for name in o.presets if name not in PRESET_NAMES[1:]]
    for name, least in {"minutes": 0.001, "layers": 1, "tokens": 16, "steps": 2}.items():
        if (value := vars(o)[name]) is not None and value < least:
            problems.append(f"--{name} {value}: at least {least}")
    if problems:
        raise UserError(problems)
    o.left = command.chosen(o.only, JUDGING + TIMING)
    o.places = {"data_dir": str(o.data_dir.absolute()), "cache_dir": str(o.cache_dir.absolute())}
    o.cases, o.ceiling, o.finished, o.rows, o.broken = [], {}, {}, [], {}
    return o


def make(o: argparse.Namespace) -> None:
    """Make the checks that are left, and keep and print their rows as they come."""
    import torch

    from benchmarks.performance import gpu_correctness, gpu_speed

    while o.left:
        name = o.left[0]
        o.hardware.apply()
        if name in JUDGING:  # TF32 rounds to ten bits: what is judged as float32 is computed in it
            torch.set_float32_matmul_precision("highest")
        try:
            for of, figures, right in getattr(gpu_correctness if name in JUDGING else gpu_speed, name)(o):
                o.rows.append({"check": name, "of": of, "figures": figures, "right": right})
                shown = {key: value for key, value in figures.items() if not isinstance(value, dict)}
                cells = [f"{key} {v:,.4g}" if isinstance(v, float) else f"{key} {v}" for key, v in shown.items()]
                print(command.row((name, of, ", ".join(cells), MARKS[right])), flush=True)
        except UserError:
            raise
        except Exception as error:  # the checks after it are worth their time still
            o.broken[name] = f"{type(error).__name__}: {error}"
        o.left.pop(0)


def main(arguments: list[str] | None = None) -> int:
    o = parse_options(arguments)
    set_process_environment()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler says on stderr when it starts and stops
    import torch

    from mvlm_core.console import hush_transformers
    from mvlm_core.hardware import choose_hardware, describe

    def end(*_: Any) -> None:
        raise OutOfTime

    o.hardware = choose_hardware(device=o.device, deterministic=o.deterministic)
    o.hardware.apply()
    hush_transformers()
    products = f"products in fp32: {torch.get_float32_matmul_precision()}, where they are judged highest"
    machine = [*describe(o.hardware), f"torch {torch.__version__}, {products}"]
    print("\n".join(machine) + "\n\n" + command.head(("check", "of", "found", ""), left=4), flush=True)
    before = signal.signal(signal.SIGALRM, end)
    with tempfile.TemporaryDirectory() as folder:
        o.folder = Path(folder)
        try:
            signal.setitimer(signal.ITIMER_REAL, 60 * o.minutes)
            make(o)
        except OutOfTime:
            pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    print(f"\nNot reached: {', '.join(o.left)}." if o.left else "\nAll checks made.")
    print(*(f"{name} broke off: {error}" for name, error in o.broken.items()), sep="\n")
    if o.json:
        found = {"machine": machine, "rows": o.rows, "not_reached": o.left, "broke_off": o.broken}
        write_json_atomic(o.json, json.loads(json.dumps(found), parse_constant=str))  # NaN as a word: it is no JSON
    return 1 if any(row["right"] is False for row in o.rows) or o.broken.keys() & set(JUDGING) else 0


if __name__ == "__main__":
    run_main(main)
