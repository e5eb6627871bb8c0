"""Measure time and memory of data preparation, from corpus to tokens, as the corpus grows.

    python -m benchmarks.performance.preparation --copies 1,4,16

The train text is copied under new file names to reach each size. Each size runs in a new process with an empty cache,
which trains the tokenizer and encodes and writes all text. Memory is the sampled USS of all its processes.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from benchmarks import command
from mvlm_core.data.corpus import load_corpus
from mvlm_core.errors import TrainingError, run_main
from mvlm_core.hardware import set_process_environment
from mvlm_core.settings import DEFAULT_DATA_DIR

SAMPLE_SECONDS = 0.05
CONTEXT = multiprocessing.get_context("spawn")


def lay_out(data_dir: Path, copies: int, folder: Path) -> int:
    """Write ``copies`` copies of the train text, and the validation text, to ``folder``; return the train bytes."""
    corpus, size = load_corpus(data_dir), 0
    for split, place in [("validation", "held-out")] + [("train", f"copy{copy:02}") for copy in range(copies)]:
        for document in corpus.split(split):
            target = folder / place / document.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(corpus.root / document.path, target)
            target.with_suffix(".json").write_text(json.dumps({"split": split}), encoding="utf-8")
            size += document.size if split == "train" else 0
    return size


def prepare(sender: Connection, data_dir: Path, cache_dir: Path, vocab_size: int) -> None:
    """Child process: prepare data as a trainer does before its first step; send seconds and tokens."""
    set_process_environment()
    import mvlm_core.training.preparation as preparation
    from prioritary_mvlm.config import PrioritaryConfig
    from prioritary_mvlm.enhanced_trainer import RECIPE

    places = {"data_dir": str(data_dir), "cache_dir": str(cache_dir)}
    settings = PrioritaryConfig(preset="h200", vocab_size=vocab_size, quiet=True, **places)
    plain, marks = preparation.build_token_store, [time.perf_counter()]

    def timed(*arguments: Any, **named: Any) -> Any:
        marks.append(time.perf_counter())
        return plain(*arguments, **named)

    preparation.build_token_store = timed
    tokens = len(preparation.prepare_text(settings, RECIPE.tokenizer_class).store.tokens)
    start, encoding, end = *marks, time.perf_counter()
    sender.send({"tokenizer_seconds": encoding - start, "token_seconds": end - encoding, "tokens": tokens})


def run(data_dir: Path, cache_dir: Path, vocab_size: int) -> dict[str, Any]:
    """Run one preparation; return its figures, the wall time of the whole process, and its peak memory."""
    receiver, sender = CONTEXT.Pipe()
    process = CONTEXT.Process(target=prepare, args=(sender, data_dir, cache_dir, vocab_size))
    started, peak = time.perf_counter(), 0
    process.start()
    while process.is_alive():
        peak = max(peak, unshared_memory(process.pid))
        time.sleep(SAMPLE_SECONDS)
    if process.exitcode:
        raise TrainingError(f"a preparation ended with exit code {process.exitcode}")
    return receiver.recv() | {"seconds": time.perf_counter() - started, "peak": peak}


def unshared_memory(pid: int) -> int:
    """Return the unshared memory (USS) of the process and its descendants, in bytes."""
    total = 0
    with suppress(psutil.Error):  # a process has just ended
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            total += one.memory_full_info().uss
    return total


def main(arguments: list[str] | None = None) -> int:
    parser = command.new_parser(__doc__)
    parser.add_argument("--data_dir", type=Path, default=DEFAULT_DATA_DIR)
    add = parser.add_argument
    add("--copies", type=command.whole_numbers, default=[1, 4, 16], help="copies of the text [default 1,4,16]")
    parser.add_argument("--vocab_size", type=int, default=32000, help="tokenizer entries [default 32000]")
    parser.add_argument("--scratch", type=Path, help="temporary folder for text and caches [default: the system's]")
    options = parser.parse_args(arguments)
    columns = ("text, MB", "tokenizer, s", "tokens, s", "MB/s", "total, s", "peak memory, MB")
    print(command.head(columns, left=0), flush=True)
    results = []
    for copies in options.copies:
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            size = lay_out(options.data_dir, copies, Path(scratch) / "text")
            one = run(Path(scratch) / "text", Path(scratch) / "cache", options.vocab_size)
        results.append(one | {"copies": copies, "bytes": size})
        figures = (size / 1e6, one["tokenizer_seconds"], one["token_seconds"], size / 1e6 / one["token_seconds"])
        cells = [f"{figure:.1f}" for figure in (*figures, one["seconds"])]
        print(command.row([*cells, f"{one['peak'] / 1e6:.0f}"]), flush=True)
    command.save_json(results, options)
    return 0


if __name__ == "__main__":
    run_main(main)
