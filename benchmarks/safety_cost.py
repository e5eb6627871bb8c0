#!/usr/bin/env python3
"""What safety costs in training time: the guard against broken numbers in each step, a checkpoint every 100 steps.

A whole step varies by more than the guard takes, so what the guard adds is timed by itself: the optimizers' update with
and without it, in turns on the same gradients. The table gives the difference of the medians of each block as a share
of a whole step: the median of the blocks, the least and the most.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]


def measure(model: str, data_dir: str, blocks: int, pairs: int, checkpoint_every: int) -> str:
    """One line of the table for ``model`` at the cpu preset."""
    from runs import make_loop

    import mvlm_trainer
    from mvlm_core.stop_request import StopRequest
    from prioritary_mvlm import PrioritaryConfig

    cls = mvlm_trainer.GPT2Settings if model == "mvlm_gpt2" else PrioritaryConfig
    with tempfile.TemporaryDirectory() as folder:
        loop = make_loop(model, cls(preset="cpu", data_dir=data_dir, output_dir=folder, quiet=True))
        stop, steps = StopRequest(), []
        for _ in range(10):
            started = time.perf_counter()
            loop._step(stop)
            steps.append(time.perf_counter() - started)
        figures, _ = loop._accumulate(0.0)
        norm = figures["train_loss"] * 1
        added = [_added_by_guard(loop.task.optimizers, norm, figures["train_loss"], pairs) for _ in range(blocks)]
        loop._pending.clear()
        saves = []
        for _ in range(blocks):
            loop.state.step += 1
            started = time.perf_counter()
            loop._save()
            saves.append(time.perf_counter() - started)
    step, save = statistics.median(steps), statistics.median(saves)
    shares = [seconds / step for seconds in added]
    spread = f"{statistics.median(shares):+.2%} ({min(shares):+.2%} … {max(shares):+.2%})"
    share = save / (checkpoint_every * step)
    return f"| {model} | {step * 1e3:.0f} ms | {spread} | {save * 1e3:.0f} ms | {share:.2%} |"


def _added_by_guard(optimizers: Any, norm: Any, loss: Any, pairs: int) -> float:
    """Seconds a step that the guard adds: the difference of two medians."""

    def guarded() -> None:
        optimizers.step(found_inf=(~(norm.isfinite() & loss.isfinite())).float())

    variants = (guarded, lambda: optimizers.step(None))
    seconds: list[list[float]] = [[], []]
    for pair in range(pairs):
        for number in (0, 1) if pair % 2 else (1, 0):
            started = time.perf_counter()
            variants[number]()
            seconds[number].append(time.perf_counter() - started)
    return statistics.median(seconds[0]) - statistics.median(seconds[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default=str(REPOSITORY / "mvlm_training_dataset_complete"))
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=50, help="pairs of updates a block")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    print("| model | step | guard (least … most) | a checkpoint | one every 100 steps |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for model in ("mvlm_gpt2", "simone_enhanced"):
        print(measure(model, options.data_dir, options.blocks, options.pairs, 100), flush=True)


if __name__ == "__main__":
    main()
