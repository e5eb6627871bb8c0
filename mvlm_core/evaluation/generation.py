"""Text from a model for evaluation: prompts that fit its context, continuations in batches, how much they repeat."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mvlm_core.data.verses import Verse, followed_by
from mvlm_core.evaluation.bits_per_byte import context_of, encode
from mvlm_core.evaluation.estimate import Mean, mean

_CHARACTERS = 16  # a token never has more in the mean; text further back is not encoded only to be cut off


def prompt_ids(tokenizer: Any, text: str, room: int) -> list[int]:
    """The start token and the text, or the last ``room`` tokens of them."""
    start = max(0, len(text) - _CHARACTERS * room)
    text = text[text.rfind("\n", 0, start) + 1 :] if start else text
    return [tokenizer.bos_token_id, *encode(tokenizer, text)][-room:]


@torch.inference_mode()
def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    lengths: Sequence[int],
    *,
    sample: bool = False,
    seed: int = 0,
    batch_size: int = 32,
) -> list[str]:
    """The text of ``lengths[i]`` tokens after ``prompts[i]``; special tokens are barred, so none ends early.

    Args:
        sample: draw from the nucleus of 0.95 (Holtzman et al. 2020, arXiv:1904.09751) at temperature 1 instead of
            taking the likeliest token. The same seed and batch size give the same text.

    Raises:
        ValueError: a prompt and its continuation do not fit into the model's context.
    """
    context, texts = context_of(model), [""] * len(prompts)
    if any(len(prompt) + length > context for prompt, length in zip(prompts, lengths, strict=True)):
        raise ValueError(f"a prompt and its continuation are longer than the context of {context} tokens")
    choice = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0} if sample else {"do_sample": False}
    device = next(model.parameters()).device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in _batches(prompts, lengths, context, batch_size):
            longest = max(len(prompts[i]) for i in batch)
            ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):  # padding on the left: what is new follows the prompt at once
                ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, longest - len(prompts[i]) :] = 1
            made = model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max(lengths[i] for i in batch),
                suppress_tokens=sorted(set(tokenizer.all_special_ids)),
                pad_token_id=tokenizer.pad_token_id,
                **choice,
            )
            for i, new in zip(batch, made[:, longest:].tolist(), strict=True):
                texts[i] = tokenizer.decode(new[: lengths[i]], skip_special_tokens=True)
    return texts


def _batches(
    prompts: Sequence[list[int]], lengths: Sequence[int], context: int, batch_size: int
) -> Iterator[list[int]]:
    """Numbers of prompts that fit into the context together, the longest prompt with the longest continuation."""
    batch: list[int] = []
    for i in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (lengths[i], len(prompts[i]))):
        both = [*batch, i]
        if len(both) > batch_size or max(len(prompts[j]) for j in both) + max(lengths[j] for j in both) > context:
            yield batch
            both = [i]
        batch = both
    if batch:
        yield batch


# --- repetition ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diversity:
    """How much some texts repeat themselves.

    Attributes:
        rep_4: mean share of a text's runs of four words that stood in it before (Welleck et al. 2020,
            arXiv:1908.04319, seq-rep-4).
        distinct_2: different pairs of neighbouring words over all such pairs, of all texts together (Li et al. 2016,
            arXiv:1510.03055); it falls with the number of words.
        words: mean words of a text.
    """

    rep_4: Mean
    distinct_2: float
    words: float


@dataclass(frozen=True)
class Repetition:
    """Diversity of the likeliest and of sampled continuations, and of the text's own ones as reference."""

    greedy: Diversity
    sampled: Diversity
    reference: Diversity


def repetition(
    model: Any, tokenizer: Any, verses: Sequence[Verse], *, words: int = 64, seed: int = 0, batch_size: int = 32
) -> Repetition:
    """Continue the text before each verse by ``words`` words, or as many as half the context holds.

    Verses with less text after them, or none before them, are left out.
    """
    room, prompts, lengths, references = context_of(model), [], [], []
    for verse in verses:
        if (text := followed_by(verse, words)) is not None:
            # A quarter more tokens than the text has: the model's own words may be longer.
            length = min(len(encode(tokenizer, text)) * 5 // 4 + 8, room // 2)
            prompts.append(prompt_ids(tokenizer, verse.before, room - length))
            lengths.append(length)
            references.append(text)
    greedy, sampled = (
        continuations(model, tokenizer, prompts, lengths, sample=sample, seed=seed, batch_size=batch_size)
        for sample in (False, True)
    )
    return Repetition(*(diversity([text.split()[:words] for text in texts]) for texts in (greedy, sampled, references)))


def diversity(texts: Sequence[list[str]]) -> Diversity:
    """Diversity of texts given as words. A text of fewer than four words repeats nothing."""
    pairs = [pair for words in texts for pair in _runs(words, 2)]
    repeated = [1 - len(set(runs)) / len(runs) if (runs := _runs(words, 4)) else 0.0 for words in texts]
    distinct = len(set(pairs)) / len(pairs) if pairs else math.nan
    return Diversity(mean(repeated), distinct, mean([len(words) for words in texts]).value)


def _runs(words: list[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[n : n + size]) for n in range(len(words) - size + 1)]
