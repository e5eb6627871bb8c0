"""Text generated for evaluation: prompts that fit the context, batched continuations, and how repetitive they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvlm_core.data.verses import Verse, followed_by
from mvlm_core.evaluation.bits_per_byte import context_of, encode
from mvlm_core.evaluation.results import Mean, mean
from mvlm_core.settings import Sampling

_CHARACTERS = 16  # more than an average token has: text further back would be encoded only to be cut off


def prompt_ids(tokenizer: Any, text: str, room: int | None = None) -> list[int]:
    """The start token and the tokens of ``text``; only the last ``room`` of them where that is given."""
    if room is None:
        return [tokenizer.bos_token_id, *encode(tokenizer, text)]
    start = max(0, len(text) - _CHARACTERS * room)
    return prompt_ids(tokenizer, text[text.rfind("\n", 0, start) + 1 :] if start else text)[-room:]


@torch.inference_mode()
def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    lengths: Sequence[int],
    *,
    sample: Sampling | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> list[str]:
    """The text of ``lengths[i]`` tokens after ``prompts[i]``; special tokens are suppressed, so none ends early.

    Args:
        sample: how to draw; None decodes greedily. The same seed gives the same text, whatever shares a batch with it.

    Raises:
        ValueError: a prompt and its continuation do not fit into the model's context.
    """
    context, texts = context_of(model), [""] * len(prompts)
    if any(len(prompt) + length > context for prompt, length in zip(prompts, lengths, strict=True)):
        raise ValueError(f"a prompt and its continuation are longer than the context of {context} tokens")
    chances = torch.rand(len(prompts), max(lengths, default=0), generator=torch.Generator().manual_seed(seed))
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (lengths[i], len(prompts[i])))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        generated = _continue(model, tokenizer, [prompts[i] for i in batch], lengths[batch[-1]], chances[batch], sample)
        for i, new in zip(batch, generated, strict=True):
            texts[i] = tokenizer.decode(new[: lengths[i]], skip_special_tokens=True)
    return texts


def _continue(
    model: Any, tokenizer: Any, prompts: list[list[int]], length: int, chances: Tensor, sample: Sampling | None
) -> list[list[int]]:
    """``length`` new tokens after each prompt.

    Not by ``generate``, which has no place for rows that reach the end of the context while others go on: prompts of
    different lengths that fill the context would each be a batch of their own.
    """
    device, longest = next(model.parameters()).device, max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    mask = torch.ones(len(prompts), longest + length, dtype=torch.long)
    for row, prompt in enumerate(prompts):  # padded on the left, so that new tokens directly follow each prompt
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, : longest - len(prompt)] = 0
    positions = (mask[:, :longest].cumsum(dim=1) - 1).clamp(min=0).to(device)
    ids, mask, chances = ids.to(device), mask.to(device), chances.to(device)
    suppressed = torch.tensor(sorted(set(tokenizer.all_special_ids)), device=device)
    cache, found = None, []
    for step in range(length):
        output = model(
            input_ids=ids,
            attention_mask=mask[:, : longest + step],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, logits = output.past_key_values, output.logits[:, -1].float().index_fill(1, suppressed, -math.inf)
        if sample is None:
            ids = logits.argmax(dim=1, keepdim=True)
        else:
            ids = nucleus(logits / sample.temperature, chances[:, step], sample.top_p)
        found.append(ids)
        # What a row writes beyond the context is not read, but it must have a position that the model knows.
        positions = (positions[:, -1:] + 1).clamp(max=context_of(model) - 1)
    return torch.cat(found, dim=1).tolist()


def nucleus(logits: Tensor, chances: Tensor, p: float = 0.95) -> Tensor:
    """A token ``[batch, 1]`` of each row of ``logits [batch, vocab]``, drawn by a number from 0 to 1 (``[batch]``) from
    the fewest most likely tokens that together have the probability ``p``."""
    probabilities, tokens = logits.softmax(dim=1).sort(dim=1, descending=True)
    cumulative = probabilities.cumsum(dim=1)
    last = (cumulative < p).sum(dim=1, keepdim=True).clamp(max=logits.shape[1] - 1)
    place = torch.searchsorted(cumulative, chances[:, None] * cumulative.gather(1, last), right=True)
    return tokens.gather(1, torch.minimum(place, last))


@dataclass(frozen=True)
class Diversity:
    """How repetitive some texts are.

    Attributes:
        rep_4: mean share of a text's word 4-grams that occurred in it before (Welleck et al. 2020, arXiv:1908.04319,
            seq-rep-4).
        distinct_2: distinct word bigrams over all bigrams, of all texts together (Li et al. 2016, arXiv:1510.03055);
            it falls with the number of words.
        words: mean words of a text.
    """

    rep_4: Mean
    distinct_2: float
    words: float


def repetition(
    model: Any, tokenizer: Any, verses: Iterable[Verse], *, words: int = 64, seed: int = 0, batch_size: int = 32
) -> dict[str, Diversity]:
    """Diversity of "greedy" and "sampled" continuations of the text before each verse, and of the true "reference".

    They are ``words`` words long, or as long as half the context. Verses without text before them, or with less than
    that after them, are left out.
    """
    context, prompts, lengths, references = context_of(model), [], [], []
    for verse in verses:
        if (text := followed_by(verse, words)) is not None:
            # A quarter more tokens than the true text has: the model's words may be longer.
            length = min(len(encode(tokenizer, text)) * 5 // 4 + 8, context // 2)
            prompts.append(prompt_ids(tokenizer, verse.before, context - length))
            lengths.append(length)
            references.append(text)
    greedy, sampled = (
        continuations(model, tokenizer, prompts, lengths, sample=sample, seed=seed, batch_size=batch_size)
        for sample in (None, Sampling())
    )
    found = {"greedy": greedy, "sampled": sampled, "reference": references}
    return {name: diversity([text.split()[:words] for text in texts]) for name, texts in found.items()}


def diversity(texts: Sequence[list[str]]) -> Diversity:
    """Diversity of texts given as words. A text of fewer than four words repeats nothing."""
    bigrams = [pair for words in texts for pair in _ngrams(words, 2)]
    repeated = [1 - len(set(ngrams)) / len(ngrams) if (ngrams := _ngrams(words, 4)) else 0.0 for words in texts]
    distinct = len(set(bigrams)) / len(bigrams) if bigrams else math.nan
    return Diversity(mean(repeated), distinct, mean([len(words) for words in texts]).value)


def _ngrams(words: list[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[n : n + size]) for n in range(len(words) - size + 1)]
