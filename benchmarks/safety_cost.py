#!/usr/bin/env python3
"""What safety costs in training time: the guard against broken numbers in each step, a checkpoint every 100 steps.

Blocks of steps with and without the guard alternate in one run, so that a machine that slows down slows both; the
figures are medians over the blocks, and ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]


def measure(model: str, data_dir: str, blocks: int, steps: int, checkpoint_every: int) -> str:
    """One line of the table for ``model`` at the cpu preset."""
    from runs import make_loop

    import mvlm_trainer
    from mvlm_core.stop_request import StopRequest
    from prioritary_mvlm import PrioritaryConfig

    cls = mvlm_trainer.GPT2Settings if model == "mvlm_gpt2" else PrioritaryConfig
    with tempfile.TemporaryDirectory() as folder:
        loop = make_loop(model, cls(preset="cpu", data_dir=data_dir, output_dir=folder, quiet=True))
        guarded, stop = loop.task.optimizers.step, StopRequest()
        variants = {"with": guarded, "without": lambda found_inf: guarded(None)}
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for block in range(-1, blocks):  # the first one warms up
            for name in sorted(variants, reverse=block % 2 == 0):
                loop.task.optimizers.step = variants[name]
                started = time.perf_counter()
                for _ in range(steps):
                    loop._step(stop)
                if block >= 0:
                    seconds[name].append((time.perf_counter() - started) / steps)
        loop._pending.clear()
        saves = []
        for _ in range(blocks):
            loop.state.step += 1
            started = time.perf_counter()
            loop._save()
            saves.append(time.perf_counter() - started)
    ratios = [a / b - 1 for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    step, save = statistics.median(seconds["with"]), statistics.median(saves)
    spread = f"{statistics.median(ratios):+.2%} ({min(ratios):+.2%} … {max(ratios):+.2%})"
    share = save / (checkpoint_every * step)
    return f"| {model} | {step * 1e3:.0f} ms | {spread} | {save * 1e3:.0f} ms | {share:.2%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default=str(REPOSITORY / "mvlm_training_dataset_complete"))
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="steps a block")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    print("| model | step | guard (least … most) | a checkpoint | one every 100 steps |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for model in ("mvlm_gpt2", "simone_enhanced"):
        print(measure(model, options.data_dir, options.blocks, options.steps, 100), flush=True)


if __name__ == "__main__":
    main()
