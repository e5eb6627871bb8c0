"""How surprising each token of a text is to a model: of text that is given, and of text as the model writes it.

Surprise is the negative log-likelihood in bits, by the model's own probabilities: at temperature 1, nothing cut off.
Token ids are of the text alone; every function puts the start token before them.
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

# A sentence ends with its closing quotes and line breaks; the blank after it is the next one's, as tokenizers have it.
_END = re.compile(r"[.!?]+[\"')\u2019\u201d]*(?:\s*\n|(?=[ \t]))|\n+")


@dataclass(frozen=True)
class Token:
    """A token's id, the text it adds ("" before a character is complete), and its surprise in bits."""

    id: int
    text: str
    bits: float


def tokens_of(tokenizer: Any, scored: Iterable[tuple[int, float]]) -> Iterator[Token]:
    """Tokens of ids and bits as they come; their texts joined are the text, without what special tokens stand for."""
    stream = DecodeStream(skip_special_tokens=True)
    for number, bits in scored:
        yield Token(number, stream.step(tokenizer.backend_tokenizer, number) or "", bits)


@torch.inference_mode()
def read(model: Any, tokenizer: Any, ids: Sequence[int], *, batch_size: int = 8) -> list[Token]:
    """The tokens of a text of any length, each scored once and in the same windows as bits per byte."""
    cut = list(windows("", list(ids), tokenizer.bos_token_id, context_of(model)))
    bits: list[float] = []
    for start in range(0, len(cut), batch_size):
        logits, targets, new = window_logits(model, cut[start : start + batch_size], str(model.device))
        bits += (token_nll(logits, targets).double().cpu()[new] / math.log(2)).tolist()
    return list(tokens_of(tokenizer, zip(ids, bits, strict=True)))


def fitting(model: Any, tokenizer: Any, prompt: str, length: int) -> tuple[list[int], int]:
    """The prompt's ids and a length that fit the context together.

    A continuation is cut to what the prompt leaves, but not below half the context: there the prompt loses its start.
    """
    room = context_of(model) - 1  # the start token's place
    ids = encode(tokenizer, prompt)
    length = min(length, max(room - len(ids), room // 2))
    return ids[max(0, len(ids) - (room - length)) :], length


@torch.inference_mode()
def write(
    model: Any, tokenizer: Any, ids: list[int], length: int, *, temperature: float, top_p: float, seed: int
) -> Iterator[Token]:
    """At most ``length`` tokens that continue ``ids``, as they are drawn; the end token is the last where it comes.

    Args:
        temperature: 0 decodes greedily.
        top_p: draw from the most likely tokens of this total probability.
    """

    def drawn() -> Iterator[tuple[int, float]]:
        chances = torch.rand(length, 1, generator=torch.Generator().manual_seed(seed)).to(model.device)
        inputs, cache = torch.tensor([[tokenizer.bos_token_id, *ids]], device=model.device), None
        for chance in chances:
            output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = output.past_key_values, output.logits[:, -1].float()
            inputs = nucleus(logits / temperature, chance, top_p) if temperature else logits.argmax(1, keepdim=True)
            yield int(inputs), float(token_nll(logits, inputs[0])) / math.log(2)
            if int(inputs) == tokenizer.eos_token_id:
                return

    yield from tokens_of(tokenizer, drawn())


# --- sentences and words ------------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    """The text cut after ``.``, ``!``, ``?`` and line breaks; joined they are the text."""
    cuts = sorted({0, *(end.end() for end in _END.finditer(text)), len(text)})
    found: list[str] = []
    for begin, end in pairwise(cuts):
        if found and not text[begin:end].strip():
            found[-1] += text[begin:end]
        else:
            found.append(text[begin:end])
    return found


def bits_by_part(tokens: Iterable[Token], parts: Sequence[str]) -> list[float]:
    """The bits of each of the parts of a text; a token counts where it begins."""
    ends, total = [], 0
    for part in parts:
        ends.append(total := total + len(part))
    found, place, number = [0.0] * len(parts), 0, 0
    for token in tokens:
        while place >= ends[number] and number + 1 < len(parts):
            number += 1
        found[number] += token.bits
        place += len(token.text)
    return found


def words(texts: Sequence[str]) -> list[list[int]]:
    """Which of the tokens with these texts make up each word; blanks stand before the word that follows."""
    found: list[list[int]] = []
    word = ""
    for number, text in enumerate(texts):
        if not found or (word.strip() and (text[:1].isspace() or word[-1:].isspace())):
            found.append([])
            word = ""
        found[-1].append(number)
        word += text
    return found


# --- governance heads ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """What a model's governance heads did: by field its meaning and ``[layer][word]`` values, means over the word's
    tokens and the layer's heads."""

    words: list[str]
    layers: list[str]
    fields: dict[str, tuple[str, list[list[float]]]]


@torch.inference_mode()
def governance(model: Any, tokenizer: Any, tokens: Sequence[Token]) -> Heads | None:
    """The traces over a text that fits the context; None where the model reports none."""
    if not tokens or not getattr(model, "trace_fields", None):
        return None
    ids = torch.tensor([[tokenizer.bos_token_id, *(token.id for token in tokens)]], device=model.device)
    traces = torch.stack(model(ids, output_traces=True, use_cache=False).traces).float().mean(dim=3)[:, 0, 1:]
    grouped = words([token.text for token in tokens])
    means = torch.stack([traces[:, places].mean(dim=1) for places in grouped], dim=1)  # layer, word, field
    layers = [f"layer {number}" for number in range(1, len(means) + 1)]
    fields = enumerate(model.trace_fields.items())
    return Heads(
        ["".join(tokens[place].text for place in places) for places in grouped],
        layers,
        {name: (meaning, means[:, :, number].tolist()) for number, (name, meaning) in fields},
    )
