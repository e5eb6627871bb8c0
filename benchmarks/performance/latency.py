"""Measure latency: --help, time to the first step, generation with and without KV cache, scoring of the test text.

    python -m benchmarks.performance.latency

Generation (256 tokens after the first one, batch size 1) and scoring use random weights, which does not affect speed.
Reports median, minimum and maximum of --rounds. --checkpoint instead measures how long saving a 124M-parameter
checkpoint blocks the training loop, synchronously and with the background writer.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.experiments.runner import SETTINGS, recipe_of
from mvlm_core.data.corpus import named_texts
from mvlm_core.errors import UserError, run_main
from mvlm_core.hardware import set_process_environment
from mvlm_core.settings import CACHE_DIR, DEFAULT_DATA_DIR, REPOSITORY_ROOT

TRAINERS = {"mvlm_gpt2": "mvlm_trainer.py", "simone_enhanced": "SIM-ONE Training/enhanced_train.py"}
ENTRY_POINTS = sorted({*TRAINERS.values(), *(path.name for path in REPOSITORY_ROOT.glob("*.py"))})
NEW_TOKENS = 256
SHAPES = {
    "cpu preset": {},
    "124M": {"hidden_dim": 768, "num_layers": 12, "num_heads": 12, "ff_dim": 3072, "vocab_size": 32000},
}


def timed(work: Callable[[], Any], rounds: int) -> list[float]:
    """Return the seconds of each of ``rounds`` calls."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds


def first_step(script: str, data_dir: Path) -> None:
    """Run a trainer from launch to the end of its first step, with tokenizer and tokens cached."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--preset", "cpu", "--data_dir", data_dir, "--output_dir", f"{folder}/out", "--log_interval", "1"]
        child = [sys.executable, REPOSITORY_ROOT / script, *arguments]
        with subprocess.Popen(child, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            if not any("step 1/" in line for line in process.stdout):
                raise RuntimeError(f"{script} ended with exit code {process.wait()} before its first step")
            process.kill()


def build(model: str, shape: dict[str, int]) -> Any:
    """Build a randomly initialized model of the cpu preset's shape, or of ``shape``, with its optimizers."""
    import torch

    from mvlm_core.hardware import choose_hardware
    from mvlm_core.training.cost import StubTokenizer

    settings = SETTINGS[model](**{"preset": "cpu", "max_length": NEW_TOKENS + 1} | shape)
    hardware = choose_hardware(device="cpu", precision="fp32", no_compile=True)
    torch.manual_seed(0)
    return recipe_of(model).build(settings, StubTokenizer(settings.vocab_size), hardware)


def generate(model: Any, cached: bool) -> None:
    import torch

    start = torch.tensor([[0]])
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(start, attention_mask=torch.ones_like(start), use_cache=cached, **options)
    assert tokens.shape[1] == NEW_TOKENS + 1


def score(model: str, data_dir: Path) -> None:
    """Score the whole test text with random weights of the cpu preset's shape."""
    from mvlm_core.evaluation.bits_per_byte import score_documents
    from mvlm_core.training.preparation import prepare_text

    settings = SETTINGS[model](preset="cpu", data_dir=str(data_dir), cache_dir=str(CACHE_DIR), quiet=True)
    text = prepare_text(settings, recipe_of(model).tokenizer_class)
    documents = [*named_texts(text.corpus.split("test"))]
    built, context = build(model, {}).model.eval(), settings.max_length
    score_documents(built, text.tokenizer.encode, documents, start_id=text.tokenizer.start_id, context=context)


def state_tensors(model: str, shape: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Return the tensors of a checkpoint, after one step with zero gradients."""
    import torch

    built = build(model, shape)
    for parameter in built.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    built.optimizers.step()
    return {"model": dict(built.model.named_parameters()), "optimizer": built.optimizers.state_tensors()}


def measure_saves(options: argparse.Namespace) -> Iterator[tuple[str, list[float]]]:
    """Measure how long a save blocks the loop; waits for each background write before the next save."""
    from mvlm_core.training.checkpoint import rotate_checkpoints, save_checkpoint
    from mvlm_core.training.checkpointer import CheckpointWriter

    for model in TRAINERS:
        tensors = state_tensors(model, SHAPES["124M"])
        size = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            root, steps, writer = Path(folder), itertools.count(), CheckpointWriter()

            def write(copied: Any, root: Path = root, steps: Iterator[int] = steps) -> None:
                save_checkpoint(root, next(steps), copied, {})
                rotate_checkpoints(root, 2)

            label = f"save of {size / 1e9:.2f} GB, {model}"
            yield f"{label}: synchronous", timed(partial(write, tensors), options.rounds)
            blocked = []
            for _ in range(options.rounds + 1):
                blocked += timed(partial(writer.start, tensors, write), 1)
                writer.wait()
            yield f"{label}: asynchronous, first copy (allocates)", blocked[:1]
            yield f"{label}: asynchronous, later copies", blocked[1:]


def measure(options: argparse.Namespace) -> Iterator[tuple[str, list[float]]]:
    """Yield the label and the seconds of each measurement."""
    from mvlm_core.hardware import choose_hardware

    for script in ENTRY_POINTS:
        child = [sys.executable, REPOSITORY_ROOT / script, "--help"]
        show_help = partial(subprocess.run, child, check=True, stdout=subprocess.DEVNULL)
        yield f"--help of {script}", timed(show_help, options.rounds)
    for model, script in TRAINERS.items():
        first_step(script, options.data_dir)  # fills the cache
        yield f"launch to first step, {model}", timed(partial(first_step, script, options.data_dir), options.rounds)
    choose_hardware(device="cpu").apply()
    for model in TRAINERS:
        for name, shape in SHAPES.items():
            built = build(model, shape).model.eval()
            for cached in (True, False):
                words = f"{NEW_TOKENS} tokens {'with' if cached else 'without'} KV cache, {model}, {name}"
                yield words, timed(partial(generate, built, cached), options.rounds)
        yield f"scoring the whole test text, {model}", timed(partial(score, model, options.data_dir), 1)


def main(arguments: list[str] | None = None) -> int:
    parser = command.new_parser(__doc__)
    parser.add_argument("--data_dir", type=Path, default=DEFAULT_DATA_DIR)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions, except for scoring [default 5]")
    parser.add_argument("--checkpoint", action="store_true", help="measure checkpoint saves only")
    parser.add_argument("--folder", type=Path, help="where to save checkpoints [default: system temporary folder]")
    options = parser.parse_args(arguments)
    if problems := command.at_least_one(options, "rounds"):
        raise UserError(problems)
    options.data_dir = options.data_dir.absolute()
    set_process_environment()
    results = {}
    print(command.head(("measurement", "seconds (min … max)")), flush=True)
    for words, times in (measure_saves if options.checkpoint else measure)(options):
        print(command.row((words, command.spread(times, "{:.2f}", statistics.median))), flush=True)
        results[words] = times
    command.save_json(results, options)
    return 0


if __name__ == "__main__":
    run_main(main)
