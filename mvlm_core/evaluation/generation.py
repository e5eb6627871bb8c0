"""Text generation for evaluation: prompts that fit the context, batched continuations, and their repetitiveness."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from mvlm_core.data.verses import Verse, next_words
from mvlm_core.evaluation.bits_per_byte import context_of, encode
from mvlm_core.evaluation.results import SAMPLING, Mean, mean
from mvlm_core.settings import Sampling

_CHARACTERS = 16  # per token, well above average: text further back would be encoded only to be truncated


def prompt_ids(tokenizer: Any, text: str, room: int | None = None) -> list[int]:
    """Start token and tokens of ``text``, truncated on the left to ``room`` if given."""
    if room is None:
        return [tokenizer.bos_token_id, *encode(tokenizer, text)]
    start = max(0, len(text) - _CHARACTERS * room)
    return prompt_ids(tokenizer, text[text.rfind("\n", 0, start) + 1 :] if start else text)[-room:]


class PreallocatedLayer(DynamicLayer):
    """KV cache layer that writes into buffers of ``room`` tokens, instead of copying all tokens at each step."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._buffers = [x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in (key_states, value_states)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values


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
    """Continue ``prompts[i]`` by ``lengths[i]`` tokens; special tokens are suppressed, so none ends early.

    Args:
        sample: sampling parameters; None decodes greedily. The same seed gives the same text regardless of batching.

    Raises:
        ValueError: a prompt and its continuation do not fit into the model's context.
    """
    context, texts = context_of(model), [""] * len(prompts)
    if any(len(prompt) + length > context for prompt, length in zip(prompts, lengths, strict=True)):
        raise ValueError(f"a prompt and its continuation are longer than the context of {context} tokens")
    uniform = torch.rand(len(prompts), max(lengths, default=0), generator=torch.Generator().manual_seed(seed))
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (lengths[i], len(prompts[i])))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        generated = _continue(model, tokenizer, [prompts[i] for i in batch], lengths[batch[-1]], uniform[batch], sample)
        for i, new in zip(batch, generated, strict=True):
            texts[i] = tokenizer.decode(new[: lengths[i]], skip_special_tokens=True)
    return texts


def _continue(
    model: Any, tokenizer: Any, prompts: list[list[int]], length: int, uniform: Tensor, sample: Sampling | None
) -> list[list[int]]:
    """Generate ``length`` new tokens after each prompt.

    ``generate`` cannot be used: it does not support rows that reach the end of the context while others continue, so
    prompts of different lengths that fill the context could not share a batch.
    """
    device, longest = next(model.parameters()).device, max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    mask = torch.ones(len(prompts), longest + length, dtype=torch.long)
    for row, prompt in enumerate(prompts):  # left padding, so that new tokens directly follow each prompt
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, : longest - len(prompt)] = 0
    positions = (mask[:, :longest].cumsum(dim=1) - 1).clamp(min=0).to(device)
    ids, mask, uniform = ids.to(device), mask.to(device), uniform.to(device)
    suppressed = torch.tensor(sorted(set(tokenizer.all_special_ids)), device=device)
    generated = []
    cache = Cache([PreallocatedLayer(longest + length) for _ in range(model.config.num_hidden_layers)])
    for step in range(length):
        output = model(
            input_ids=ids,
            attention_mask=mask[:, : longest + step],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1].float().index_fill(1, suppressed, -math.inf)
        if sample is None:
            ids = logits.argmax(dim=1, keepdim=True)
        else:
            ids = nucleus(logits / sample.temperature, uniform[:, step], sample.top_p)
        generated.append(ids)
        # Tokens that a row generates beyond the context are discarded, but need a valid position id.
        positions = (positions[:, -1:] + 1).clamp(max=context_of(model) - 1)
    return torch.cat(generated, dim=1).tolist()


def nucleus(logits: Tensor, uniform: Tensor, p: float, likely: int = 256) -> Tensor:
    """Top-p sampling: draw a token ``[batch, 1]`` for each row of ``logits [batch, vocab]`` by inverse transform.

    Args:
        uniform: a random number from 0 to 1 for each row, ``[batch]``.
        p: total probability of the most likely tokens to draw from.
        likely: number of tokens to sort initially; sorting all takes longer than the rest of a small model's step.
    """
    count = min(likely, logits.shape[1])
    probabilities, tokens = logits.softmax(dim=1).topk(count, dim=1)
    cumulative = probabilities.cumsum(dim=1)
    last = (cumulative < p).sum(dim=1, keepdim=True).clamp(max=count - 1)
    index = torch.searchsorted(cumulative, uniform[:, None] * cumulative.gather(1, last), right=True)
    drawn = tokens.gather(1, torch.minimum(index, last))
    wide = cumulative[:, -1] < p
    if count < logits.shape[1] and wide.any():
        drawn[wide] = nucleus(logits[wide], uniform[wide], p, 4 * likely)
    return drawn


@dataclass(frozen=True)
class Diversity:
    """Repetitiveness of a set of texts.

    Attributes:
        rep_4: mean share of a text's word 4-grams that are repeats within it (Welleck et al. 2020, arXiv:1908.04319,
            seq-rep-4).
        distinct_2: distinct word bigrams over all bigrams, pooled over texts (Li et al. 2016, arXiv:1510.03055); it
            falls with the number of words.
        words: mean words per text.
    """

    rep_4: Mean
    distinct_2: float
    words: float


def continuation_prompts(
    model: Any, tokenizer: Any, verses: Iterable[Verse], words: int
) -> tuple[list[list[int]], list[int], list[str]]:
    """Prompts before verses, the tokens to continue each by, and the ``words`` words that follow it in the text.

    Lengths are limited to half the context. Verses with nothing before or too little text after them are skipped.
    """
    context, prompts, lengths, references = context_of(model), [], [], []
    for verse in verses:
        if (text := next_words(verse, words)) is not None:
            # A quarter more tokens than the reference, as the model's words may need more tokens.
            length = min(len(encode(tokenizer, text)) * 5 // 4 + 8, context // 2)
            prompts.append(prompt_ids(tokenizer, verse.before, context - length))
            lengths.append(length)
            references.append(text)
    return prompts, lengths, references


def repetition(
    model: Any, tokenizer: Any, verses: Iterable[Verse], *, words: int, seed: int = 0
) -> dict[str, Diversity]:
    """Diversity of "greedy" and "sampled" continuations of the text before each verse, and of the true "reference".

    Texts are up to ``words`` words long. Prompts, lengths and skipped verses: ``continuation_prompts``.
    """
    prompts, lengths, references = continuation_prompts(model, tokenizer, verses, words)
    greedy, sampled = (
        continuations(model, tokenizer, prompts, lengths, sample=sample, seed=seed) for sample in (None, SAMPLING)
    )
    by_name = {"greedy": greedy, "sampled": sampled, "reference": references}
    return {name: diversity([text.split()[:words] for text in texts]) for name, texts in by_name.items()}


def diversity(texts: Sequence[list[str]]) -> Diversity:
    """Diversity of texts given as lists of words. A text of fewer than four words has no repeats."""
    bigrams = [pair for words in texts for pair in _ngrams(words, 2)]
    repeated = [1 - len(set(ngrams)) / len(ngrams) if (ngrams := _ngrams(words, 4)) else 0.0 for words in texts]
    distinct = len(set(bigrams)) / len(bigrams) if bigrams else math.nan
    return Diversity(mean(repeated), distinct, mean([len(words) for words in texts]).value)


def _ngrams(words: list[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[n : n + size]) for n in range(len(words) - size + 1)]
