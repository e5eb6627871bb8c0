#!/usr/bin/env python3
"""Let a trained model write: its text appears as it is made.

    python generate.py models/simone_enhanced "In the beginning"
    python generate.py simone_enhanced_model.tar.gz "The LORD is" --temperature 0.7 --samples 3

MODEL is a trained folder, an unpacked archive or the .tar.gz itself. Its files are checked before anything is loaded:
hashes against its manifest, modelling code against this repository's. The same seed gives the same text.

Exit codes: 0 done, 2 bad arguments or a model that cannot be used, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvlm_core.errors import UserError, printable, run_main
from mvlm_core.export.opening import checked_export
from mvlm_core.hardware import DEVICES, set_process_environment
from mvlm_core.settings import MODELLING_SOURCES

if TYPE_CHECKING:
    from torch import Tensor


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: every problem with it.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="trained folder, unpacked archive or .tar.gz")
    parser.add_argument("prompt", nargs="?", default="", help="what to go on from [default: the start of a text]")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="longest continuation in tokens [default 100]")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="below 1 safer, above 1 wilder; 0 takes the likeliest [0.8]"
    )
    parser.add_argument("--top_p", type=float, default=0.95, help="draw from the likeliest that make up this [0.95]")
    parser.add_argument("--top_k", type=int, default=0, help="draw from this many likeliest; 0: no such limit [0]")
    parser.add_argument("--samples", type=int, default=1, help="continuations, by seed, seed + 1, … [default 1]")
    parser.add_argument("--seed", type=int, default=0, help="of the draws [default 0]")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda [default auto]")
    parser.add_argument(
        "--trace",
        action="store_true",
        help="afterwards, a table of what the governance heads did at each token (model 2): the mean over layers and "
        "heads of the policy's gate, the memory's share, the attention's entropy in nats and its distance in tokens",
    )
    options = parser.parse_args(arguments)
    problems = [
        f"--{name} {value}: {rule}"
        for name, rule, holds in (
            ("max_new_tokens", "at least 1", lambda value: value >= 1),
            ("temperature", "0 or more", lambda value: 0 <= value < math.inf),
            ("top_p", "above 0 and at most 1", lambda value: 0 < value <= 1),
            ("top_k", "0 or more", lambda value: value >= 0),
            ("samples", "at least 1", lambda value: value >= 1),
            ("seed", "from 0 to 2**63 - 1 - samples", lambda value: 0 <= value < 2**63 - max(1, options.samples)),
            ("device", f"one of {', '.join(DEVICES)}", DEVICES.__contains__),
        )
        if not holds(value := getattr(options, name))
    ]
    if problems:
        raise UserError(problems)
    return options


def prompt_ids(model: Any, tokenizer: Any, prompt: str) -> Tensor:
    """``[1, seq]``: the start token and the prompt.

    Raises:
        UserError: it leaves no room in the context, or holds no text that can be encoded.
    """
    import torch

    from mvlm_core.evaluation.bits_per_byte import context_of, encode

    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is no valid UTF-8 text") from None
    ids = [tokenizer.bos_token_id, *encode(tokenizer, prompt)]
    if len(ids) >= context_of(model):
        raise UserError(
            f"the prompt has {len(ids):,} tokens with the start token; the model reads {context_of(model):,} at once, "
            "so use a shorter one"
        )
    return torch.tensor([ids], device=model.device)


def show(text: str, end: str = "") -> None:
    """Print text that a terminal must not obey: control sequences of a prompt or a model are shown, not sent."""
    print(printable(text, "\n\t", limit=len(text)), end=end, flush=True)


def write(model: Any, tokenizer: Any, ids: Tensor, options: argparse.Namespace, seed: int) -> Tensor:
    """One continuation, printed as it is made; returns all its tokens ``[1, seq]``."""
    import torch
    from transformers import TextStreamer

    from mvlm_core.evaluation.bits_per_byte import context_of

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text, end="\n" if stream_end else "")

    if options.temperature == 0:
        choice: dict[str, Any] = {"do_sample": False}
    else:
        limits = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
        choice = {"do_sample": True, **limits}
    torch.manual_seed(seed)
    show(options.prompt)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(options.max_new_tokens, context_of(model) - ids.shape[1]),
        streamer=Printer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id,
        **choice,
    )


def trace_table(model: Any, tokenizer: Any, ids: Tensor) -> str:
    """What the governance heads did at each token, as a table of text."""
    import torch

    with torch.inference_mode():
        output = model(ids, output_traces=True, use_cache=False)
    means = torch.stack(output.traces).mean(dim=(0, 3))[0]  # layers, batch, tokens, heads, fields → tokens, fields
    lines = [f"{'token':20}  policy  memory  entropy  distance"]
    for token, (policy, memory, entropy, distance) in zip(ids[0].tolist(), means.tolist(), strict=True):
        shown = repr(tokenizer.decode([token]))[1:-1]
        lines.append(f"{shown:20}  {policy:6.3f}  {memory:6.3f}  {entropy:7.3f}  {distance:8.1f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    set_process_environment()
    with checked_export(options.model, MODELLING_SOURCES) as folder:
        from mvlm_core.evaluation.bits_per_byte import load_export
        from mvlm_core.hardware import choose_hardware

        hardware = choose_hardware(device=options.device)
        hardware.apply()
        model, tokenizer = load_export(folder, hardware.device)
        if options.trace and not getattr(model.config, "trace_head", False):
            raise UserError(f"--trace: {options.model} reports no traces (a GPT-2, or trained with --no_trace_head)")
        ids = prompt_ids(model, tokenizer, options.prompt)
        for number in range(options.samples):
            if options.samples > 1:
                print(f"--- sample {number + 1} of {options.samples}, seed {options.seed + number}")
            written = write(model, tokenizer, ids, options, options.seed + number)
            if options.trace:
                print(trace_table(model, tokenizer, written))
    return 0


if __name__ == "__main__":
    run_main(main)
