#!/usr/bin/env python3
"""Generate text with a trained model, streamed to the terminal.

    python generate.py models/simone_enhanced "In the beginning"
    python generate.py simone_enhanced_model.tar.gz "The LORD is" --temperature 0.7

MODEL is an export folder, an unpacked archive or a .tar.gz. Before loading, its files are verified: checksums against
its manifest, modeling code against this repository's. The same seed gives the same text.

Exit codes: 0 done, 2 bad arguments or an unusable model, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from mvlm_core.command_line import CommandLine, device_problems, seed_problems
from mvlm_core.errors import UserError, printable, run_main
from mvlm_core.export.file_checks import checked_exports
from mvlm_core.hardware import set_process_environment
from mvlm_core.settings import DEFAULT_SAMPLING
from mvlm_core.signals import end_on_sigterm
from prioritary_mvlm.config import MODELING_FILES


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="export folder, unpacked archive or .tar.gz")
    add("prompt", nargs="?", default="", help="text to continue [default: the start of a document]")
    add("--max_new_tokens", type=int, default=100, help="maximum number of tokens to generate [default 100]")
    add(
        "--temperature",
        type=float,
        default=DEFAULT_SAMPLING.temperature,
        help="sampling temperature; 0: greedy decoding [%(default)s]",
    )
    add(
        "--top_p",
        type=float,
        default=DEFAULT_SAMPLING.top_p,
        help="nucleus sampling: keep the most likely tokens up to this total probability [%(default)s]",
    )
    add("--seed", type=int, default=0, help="random seed [default 0]")
    add("--device", default="auto", help="auto, cpu or cuda [default auto]")
    add(
        "--trace",
        action="store_true",
        help="afterwards print model 2's governance traces per token, averaged over layers and heads: policy gate, "
        "memory share, attention entropy in nats, attention distance in tokens, and the share that was copied",
    )
    return parser.parse_args(arguments)


def option_problems(options: argparse.Namespace) -> list[str]:
    problems = [
        f"--{name} {getattr(options, name)}: must be {rule}"
        for name, rule, holds in (
            ("max_new_tokens", "at least 1", options.max_new_tokens >= 1),
            ("temperature", "0 or more", 0 <= options.temperature < math.inf),
            ("top_p", "above 0 and at most 1", 0 < options.top_p <= 1),
        )
        if not holds
    ]
    problems += seed_problems(options.seed) + device_problems(options.device)
    if any("\ud800" <= character <= "\udfff" for character in options.prompt):  # surrogates: undecodable bytes
        problems.append("the prompt is not valid UTF-8")
    return problems


def show(text: str) -> None:
    """Print text with control sequences escaped, so that no prompt or model output can control the terminal."""
    print(printable(text, "\n\t", limit=len(text)), end="", flush=True)


def generate(model: Any, tokenizer: Any, ids: list[int], options: argparse.Namespace) -> list[int]:
    """Generate and print one continuation of ``ids``, which begin with the start token; return all tokens."""
    from mvlm_core.evaluation.bits_per_byte import context_of
    from mvlm_core.evaluation.surprisal import stream_tokens

    sampling = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
    length = min(options.max_new_tokens, context_of(model) - len(ids))
    tokens = list(ids)
    show(options.prompt)
    for token in stream_tokens(model, tokenizer, ids[1:], length, **sampling):
        show(token.text)
        tokens.append(token.id)
    print(flush=True)
    if len(tokens) - len(ids) == length < options.max_new_tokens:
        print(f"stopped after {length} tokens: the model's context is full", file=sys.stderr)
    return tokens


def trace_table(model: Any, tokenizer: Any, ids: list[int]) -> str:
    """Format the governance traces of each token, averaged over layers and heads."""
    import torch

    traces = model.token_traces(torch.tensor([ids], device=model.device))
    lines = [f"{'token':20}" + "".join(f"{name:>10}" for name in traces)]
    rows = zip(*(values for _, values in traces.values()), strict=True)
    for token, values in zip(ids, rows, strict=True):
        lines.append(f"{repr(tokenizer.decode([token]))[1:-1]:20}" + "".join(f"{value:10.3f}" for value in values))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    set_process_environment()
    with checked_exports([options.model], MODELING_FILES, option_problems(options)) as (folder,):
        from mvlm_core.evaluation.bits_per_byte import context_of, load_export
        from mvlm_core.evaluation.generation import prompt_ids
        from mvlm_core.hardware import choose_hardware, limit_decoding_threads

        hardware = choose_hardware(device=options.device)
        hardware.apply()
        model, tokenizer = load_export(folder, hardware.device)
        limit_decoding_threads([model])
        if options.trace and not getattr(model, "trace_fields", None):
            raise UserError(f"--trace: {options.model} has no trace head (GPT-2, or trained with --no_trace_head)")
        ids, context = prompt_ids(tokenizer, options.prompt), context_of(model)
        if len(ids) >= context:
            raise UserError(
                f"the prompt has {len(ids):,} tokens including the start token; the model's context is {context:,}: "
                "use a shorter prompt"
            )
        tokens = generate(model, tokenizer, ids, options)
        if options.trace:
            print(trace_table(model, tokenizer, tokens))
    return 0


if __name__ == "__main__":
    end_on_sigterm()  # cleans up an unpacked archive
    run_main(main)
