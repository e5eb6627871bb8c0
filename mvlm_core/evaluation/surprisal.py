"""Per-token surprisal of a given text, and of text that the model generates.

Surprisal is the negative log-likelihood in bits under the model's own distribution: temperature 1, no truncation. Token
ids exclude the start token, which every function prepends.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from tokenizers.decoders import DecodeStream

from mvlm_core.evaluation.bits_per_byte import context_of, encode, token_nll, window_logits, windows
from mvlm_core.evaluation.generation import nucleus

# A sentence includes its closing quotes and line breaks; the space after it belongs to the next, as in tokenizers.
# A run of marks is matched only as a whole: trying every part of a long one takes quadratic time.
_END = re.compile(r"(?<![.!?])[.!?]++[\"')\u2019\u201d]*(?:\s*\n|(?=[ \t]))|\n+")


@dataclass(frozen=True)
class Token:
    """A token's id, the text it adds ("" if a character is not yet complete), and its surprisal in bits."""

    id: int
    text: str
    bits: float


def tokens_of(tokenizer: Any, scored: Iterable[tuple[int, float]]) -> Iterator[Token]:
    """Stream tokens from (id, bits) pairs; their texts concatenate to the decoded text, without special tokens."""
    stream = DecodeStream(skip_special_tokens=True)
    for number, bits in scored:
        yield Token(number, stream.step(tokenizer.backend_tokenizer, number) or "", bits)


@torch.inference_mode()
def score_tokens(model: Any, tokenizer: Any, ids: Sequence[int], *, batch_size: int = 8) -> list[Token]:
    """Score the tokens of a text of any length, each once and in the same windows as bits per byte."""
    every = list(windows("", list(ids), tokenizer.bos_token_id, context_of(model)))
    bits: list[float] = []
    for start in range(0, len(every), batch_size):
        logits, targets, new = window_logits(model, every[start : start + batch_size], str(model.device))
        bits += (token_nll(logits, targets).double().cpu()[new] / math.log(2)).tolist()
    return list(tokens_of(tokenizer, zip(ids, bits, strict=True)))


def fit_to_context(model: Any, tokenizer: Any, prompt: str, length: int) -> tuple[list[int], int]:
    """Fit a prompt and a continuation into the context; return the prompt's ids and the continuation's length.

    The continuation is shortened to the space left by the prompt, but to no less than half the context; beyond that the
    prompt is truncated on the left.
    """
    room = context_of(model) - 1  # one position for the start token
    ids = encode(tokenizer, prompt)
    length = min(length, max(room - len(ids), room // 2))
    return ids[max(0, len(ids) - (room - length)) :], length


@torch.inference_mode()
def stream_tokens(
    model: Any, tokenizer: Any, ids: list[int], length: int, *, temperature: float, top_p: float, seed: int
) -> Iterator[Token]:
    """Stream up to ``length`` tokens that continue ``ids``; generation stops after the end token.

    Args:
        temperature: 0 decodes greedily.
        top_p: sample from the most likely tokens with this total probability.
    """

    def drawn() -> Iterator[tuple[int, float]]:
        uniform = torch.rand(length, 1, generator=torch.Generator().manual_seed(seed)).to(model.device)
        inputs, cache = torch.tensor([[tokenizer.bos_token_id, *ids]], device=model.device), None
        for number in uniform:
            output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = output.past_key_values, output.logits[:, -1].float()
            inputs = nucleus(logits / temperature, number, top_p) if temperature else logits.argmax(1, keepdim=True)
            yield int(inputs), float(token_nll(logits, inputs[0])) / math.log(2)
            if int(inputs) == tokenizer.eos_token_id:
                return

    yield from tokens_of(tokenizer, drawn())


# --- sentences and words ------------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    """Split text after ``.``, ``!``, ``?`` and line breaks; the parts concatenate to the text."""
    cuts = sorted({0, *(match.end() for match in _END.finditer(text)), len(text)})
    parts: list[str] = []
    for begin, end in pairwise(cuts):
        if parts and not text[begin:end].strip():
            parts[-1] += text[begin:end]
        else:
            parts.append(text[begin:end])
    return parts


def bits_by_part(tokens: Iterable[Token], parts: Sequence[str]) -> list[float]:
    """Sum the bits of each part of a text; a token counts toward the part in which it begins."""
    ends, total = [], 0
    for part in parts:
        ends.append(total := total + len(part))
    sums, position, number = [0.0] * len(parts), 0, 0
    for token in tokens:
        while position >= ends[number] and number + 1 < len(parts):
            number += 1
        sums[number] += token.bits
        position += len(token.text)
    return sums


def words(texts: Sequence[str]) -> list[list[int]]:
    """Group token indices into words, given the tokens' texts; whitespace belongs to the following word."""
    groups: list[list[int]] = []
    word = ""
    for number, text in enumerate(texts):
        if not groups or (word.strip() and (text[:1].isspace() or word[-1:].isspace())):
            groups.append([])
            word = ""
        groups[-1].append(number)
        word += text
    return groups


# --- governance heads ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GovernanceTraces:
    """Traces of a model's governance heads: field → meaning and ``[layer][word]`` values, averaged over the word's
    tokens and the layer's heads."""

    words: list[str]
    layers: list[str]
    fields: dict[str, tuple[str, list[list[float]]]]


@torch.inference_mode()
def governance_traces(model: Any, tokenizer: Any, tokens: Sequence[Token]) -> GovernanceTraces | None:
    """Compute governance traces over a text that fits the context; None if the model has none."""
    if not tokens or not getattr(model, "trace_fields", None):
        return None
    ids = torch.tensor([[tokenizer.bos_token_id, *(token.id for token in tokens)]], device=model.device)
    traces = torch.stack(model(ids, output_traces=True, use_cache=False).traces).float().mean(dim=3)[:, 0, 1:]
    groups = words([token.text for token in tokens])
    means = torch.stack([traces[:, indices].mean(dim=1) for indices in groups], dim=1)  # layer, word, field
    layers = [f"layer {number}" for number in range(1, len(means) + 1)]
    fields = enumerate(model.trace_fields.items())
    return GovernanceTraces(
        ["".join(tokens[index].text for index in indices) for indices in groups],
        layers,
        {name: (meaning, means[:, :, number].tolist()) for number, (name, meaning) in fields},
    )
