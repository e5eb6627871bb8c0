"""Compare speed and outputs of an export in PyTorch, ONNX Runtime and llama.cpp.

    python export_formats.py models/mvlm_gpt2 --onnx --gguf --output gpt2_formats
    python -m benchmarks.performance.other_engines models/mvlm_gpt2 gpt2_formats

Each runtime decodes greedily from the same prompt with its KV cache; rounds are interleaved, and the table gives the
median, minimum and maximum of --rounds. CPU time (all threads) is reported in addition to wall time, because other load
on the machine does not affect it. llama.cpp requires llama-cpp-python. Threads: OMP_NUM_THREADS, otherwise all cores.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import command
from mvlm_core.errors import UserError, run_main
from mvlm_core.export.file_checks import check_export
from prioritary_mvlm.config import MODELING_FILES

PROMPT = "In the beginning God created the heaven and the earth. And the"
Reader = Callable[[Sequence[int]], np.ndarray]
"""Appends tokens to the sequence read so far and returns their logits ``[tokens, vocab]``."""


def torch_reader(model: Any) -> Reader:
    import torch

    past = None

    def read(ids: Sequence[int]) -> np.ndarray:
        nonlocal past
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([list(ids)]), past_key_values=past, use_cache=True)
        past = output.past_key_values
        return output.logits[0].numpy()

    return read


def onnx_reader(graph: Any) -> Reader:
    """Return a reader of a ``CachedGraph``, with an empty cache."""
    graph.reset()
    return lambda ids: graph.read(np.array([list(ids)]))[0]


def gguf_reader(llama: Any) -> Reader:
    """Return a reader of a ``llama_cpp.Llama`` created with ``logits_all``, with an empty cache."""
    llama.reset()

    def read(ids: Sequence[int]) -> np.ndarray:
        before = llama.n_tokens
        llama.eval(list(ids))
        return llama.scores[before : llama.n_tokens].copy()

    return read


def greedy(read: Reader, prompt: Sequence[int], count: int) -> tuple[list[int], np.ndarray]:
    """Decode ``count`` tokens after ``prompt``; return them and their logits ``[tokens, vocab]``."""
    new, text, logits = list(prompt), [], []
    for _ in range(count):
        logits.append(read(new)[-1])
        new = [int(logits[-1].argmax())]
        text += new
    return text, np.stack(logits)


def open_llama(path: Path, context: int, threads: int) -> Any:
    from llama_cpp import Llama

    options = {"n_ctx": context, "logits_all": True, "verbose": False, "n_threads": threads, "n_threads_batch": threads}
    return Llama(str(path), **options)


def engines(export: Path, formats: Path) -> tuple[dict[str, Callable[[], Reader]], Any]:
    """Return a reader factory for each available engine, and the tokenizer."""
    from mvlm_core.evaluation.bits_per_byte import context_of, load_export
    from mvlm_core.export.onnx_format import CachedGraph

    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    model, tokenizer = load_export(export)
    makers: dict[str, Callable[[], Reader]] = {"PyTorch": partial(torch_reader, model)}
    if (path := formats / "onnx" / "model.onnx").is_file():
        makers["ONNX Runtime"] = partial(onnx_reader, CachedGraph(path, threads=threads))
    for path in (formats / "gguf").glob("*.gguf"):
        makers["llama.cpp"] = partial(gguf_reader, open_llama(path, context_of(model), threads))
    return makers, tokenizer


def main(arguments: list[str] | None = None) -> int:
    parser = command.new_parser(__doc__)
    parser.add_argument("model", metavar="MODEL", type=Path, help="export folder")
    parser.add_argument("formats", metavar="FORMATS", type=Path, help="output folder of export_formats.py for it")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate [default 64]")
    parser.add_argument("--rounds", type=int, default=5, help="[default 5]")
    options = parser.parse_args(arguments)
    problems = command.at_least_one(options, "tokens", "rounds")
    problems += [f"{place}: no such folder" for place in (options.model, options.formats) if not place.is_dir()]
    if problems:
        raise UserError(problems)
    check_export(options.model, MODELING_FILES)
    makers, tokenizer = engines(options.model, options.formats)
    from mvlm_core.evaluation.generation import prompt_ids

    prompt = prompt_ids(tokenizer, PROMPT)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    generated = {}
    for _ in range(options.rounds):
        for name, new_reader in makers.items():
            read = new_reader()
            wall, cpu = time.perf_counter(), time.process_time()
            generated[name] = greedy(read, prompt, options.tokens)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    expected, logits = generated["PyTorch"]
    rows, figures = [], {}
    for name, (text, engine_logits) in generated.items():
        same = next((n for n, pair in enumerate(zip(expected, text, strict=True)) if len({*pair}) > 1), len(text))
        difference = float(np.abs(engine_logits - logits)[: same + 1].max())
        speeds = [[options.tokens / each for each in times] for times in zip(*seconds[name], strict=True)]
        figures[name] = {"tokens_per_second": speeds, "largest_difference": difference, "same_tokens": same}
        shown = (command.spread(values, "{:,.1f}", statistics.median) for values in speeds)
        rows.append((name, *shown, f"{difference:.1e}", same))
    columns = ("engine", "tokens/s (min … max)", "tokens/s of CPU time", "largest logit difference", "same tokens")
    command.show(command.table(columns, rows), figures, options)
    return 0


if __name__ == "__main__":
    run_main(main)
