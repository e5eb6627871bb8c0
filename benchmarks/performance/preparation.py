#!/usr/bin/env python3
"""Corpus to tokens: how long it takes and how much memory, as the corpus grows, and what a second run costs.

The train text of the corpus is laid out once, four times and sixteen times (its files under other names; tokenizer and
tokens are made as for any other text). Each size is prepared in a process of its own from an empty cache: the
tokenizer is trained, all text is encoded and written. Then again, from the cache; and once more after one byte of one
file has changed, which must be noticed. Memory is what all processes of a preparation hold alone (USS), sampled.

Exit codes: 0 done, 1 a preparation failed or a change went unnoticed, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from mvlm_core.data.corpus import load_corpus
from mvlm_core.errors import UserError, run_main
from mvlm_core.files import write_json_atomic
from mvlm_core.settings import DEFAULT_DATA_DIR, REPOSITORY_ROOT

SAMPLE_SECONDS = 0.05


def lay_out(data_dir: Path, only: str | None, copies: int, folder: Path) -> int:
    """``copies`` of the train text below ``folder``, a folder each, and the validation text; returns train bytes."""
    corpus, size = load_corpus(data_dir, only=only), 0
    jobs = [("validation", "held-out")] + [("train", f"copy{copy:02}") for copy in range(copies)]
    for split, place in jobs:
        for document in corpus.split(split):
            target = folder / place / document.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(corpus.root / document.path, target)
            target.with_suffix(".json").write_text(json.dumps({"split": split}), encoding="utf-8")
            size += document.size if split == "train" else 0
    return size


def prepare(data_dir: str, cache_dir: str, vocab_size: str) -> None:
    """In a process of its own: what a trainer does before its first step; prints seconds and tokens."""
    import mvlm_core.training.run as training_run
    from mvlm_core.hardware import set_process_environment
    from prioritary_mvlm.config import PrioritaryConfig
    from prioritary_mvlm.enhanced_trainer import RECIPE

    set_process_environment()
    settings = PrioritaryConfig(
        preset="h200", data_dir=data_dir, cache_dir=cache_dir, vocab_size=int(vocab_size), quiet=True
    )
    marks = {"start": time.perf_counter()}
    plain = training_run.build_token_store

    def timed(*arguments: Any, **named: Any) -> Any:
        marks["tokenizer"] = time.perf_counter()
        return plain(*arguments, **named)

    training_run.build_token_store = timed
    text = training_run.prepare_text(settings, RECIPE.tokenizer_class)
    end = time.perf_counter()
    answer = {
        "tokenizer_seconds": marks["tokenizer"] - marks["start"],
        "token_seconds": end - marks["tokenizer"],
        "tokens": len(text.store.tokens),
    }
    print(json.dumps(answer), flush=True)


def run(data_dir: Path, cache_dir: Path, vocab_size: int) -> dict[str, Any]:
    """One preparation: its own figures, the wall time of the whole process, and its peak memory."""
    command = [sys.executable, "-m", "benchmarks.performance.preparation", "--prepare", str(data_dir), str(cache_dir)]
    started, peak = time.perf_counter(), 0
    process = psutil.Popen(
        [*command, str(vocab_size)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY_ROOT
    )
    while process.poll() is None:
        peak = max(peak, _alone(process))
        time.sleep(SAMPLE_SECONDS)
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors[-2000:])
    return json.loads(output.splitlines()[-1]) | {"seconds": time.perf_counter() - started, "peak": peak}


def _alone(process: psutil.Process) -> int:
    """Bytes that the process and its children hold and share with nobody."""
    total, left = 0, [process]
    while left:
        one = left.pop()
        try:
            total += one.memory_full_info().uss
            left += one.children()
        except psutil.Error:  # it has just ended
            continue
    return total


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for copies in options.copies:
            data_dir, cache_dir = Path(scratch) / f"text{copies}", Path(scratch) / f"cache{copies}"
            size = lay_out(options.data_dir, options.data_subset, copies, data_dir)
            first, second = (run(data_dir, cache_dir, options.vocab_size) for _ in range(2))
            one = next((data_dir / "copy00").rglob("*.txt"))
            text = one.read_bytes()
            one.write_bytes(text.replace(b"e", b"a", 1))
            stores = {path.name for path in (cache_dir / "tokens").iterdir()}
            run(data_dir, cache_dir, options.vocab_size)
            noticed = {path.name for path in (cache_dir / "tokens").iterdir()} > stores
            found.append({"copies": copies, "bytes": size, "first": first, "second": second, "noticed": noticed})
            print(f"{copies} times: {first['seconds']:.0f} s", file=sys.stderr, flush=True)
            shutil.rmtree(data_dir)
            shutil.rmtree(cache_dir)
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| text, MB | tokenizer, s | tokens, s | MB/s | peak memory, MB | again, s | one byte changed |"]
    lines.append("| ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for one in found:
        first, second = one["first"], one["second"]
        again = second["tokenizer_seconds"] + second["token_seconds"]
        lines.append(
            f"| {one['bytes'] / 1e6:.1f} | {first['tokenizer_seconds']:.1f} | {first['token_seconds']:.1f} "
            f"| {one['bytes'] / 1e6 / first['token_seconds']:.1f} | {first['peak'] / 1e6:.0f} | {again:.2f} "
            f"| {'noticed' if one['noticed'] else 'NOT NOTICED'} |"
        )
    return "\n".join(lines)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=DEFAULT_DATA_DIR)
    parser.add_argument("--data_subset", help="only this folder of it, such as bible/kjv")
    parser.add_argument("--copies", default="1,4,16", help="times the text is laid out [default 1,4,16]")
    parser.add_argument("--vocab_size", type=int, default=32000, help="tokenizer entries [default 32000]")
    parser.add_argument("--scratch", type=Path, help="where text and caches go meanwhile [default: the system's place]")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    options = parser.parse_args(arguments)
    numbers = options.copies.split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise UserError([f"--copies {options.copies}: whole numbers above 0, with commas between"])
    options.copies = [int(number) for number in numbers]
    return options


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--prepare"]:
        prepare(*given[1:])
        return 0
    options = parse_options(given)
    found = measure(options)
    print(table(found))
    if options.json:
        write_json_atomic(options.json, found)
    return 0 if all(one["noticed"] for one in found) else 1


if __name__ == "__main__":
    run_main(main)
