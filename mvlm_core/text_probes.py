"""What bits per byte does not say of a model: where it is good, whether it knows when it is right, what it can repeat.

Each probe takes a transformers causal language model and its tokenizer, as ``evaluation.load_export`` gives them, and
verses (``verses.Verse``). Every model gets the same text and the same rules; a prompt begins with the tokenizer's start
token and, where it would not fit, keeps its end. Words are what stands between blanks, punctuation included, unless
said otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch

from mvlm_core.evaluation import context_of, encode
from mvlm_core.verses import BETWEEN_BLANKS, Verse, followed_by

_LETTERS = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_CHARACTERS = 16  # a token never has more in the mean; text further back is not encoded only to be cut off


@dataclass(frozen=True)
class Mean:
    """A mean of ``count`` values and its standard error (NaN for fewer than two), as if they were independent."""

    value: float
    error: float
    count: int

    def __sub__(self, other: Mean) -> Mean:
        """The difference of two means of independent samples; ``count`` is the smaller one."""
        return Mean(self.value - other.value, math.hypot(self.error, other.error), min(self.count, other.count))


def mean(values: Sequence[float]) -> Mean:
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return Mean(float(array.mean()) if len(array) else math.nan, error, len(array))


# --- tokens in, text out ------------------------------------------------------------------------------------


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


# --- calibration ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """How well the model's probabilities fit how often it is right, over ``tokens`` predictions.

    Attributes:
        error: expected calibration error, 0 to 1.
        confidence: mean probability of the likeliest token.
        accuracy: share of tokens that are the likeliest one.
    """

    error: float
    confidence: float
    accuracy: float
    tokens: int


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> Calibration:
    """Expected calibration error with ``bins`` bins of equal width (Guo et al. 2017, arXiv:1706.04599, equation 3).

    Predictions are sorted into bins ((b - 1) / bins, b / bins] by the probability of their likeliest answer; the error
    is the mean over predictions of abs(accuracy - mean confidence) of their bin.
    """
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if not len(confidence):
        return Calibration(math.nan, math.nan, math.nan, 0)
    number = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(number, weights=correct - confidence, minlength=bins)
    error = float(np.abs(gaps).sum()) / len(confidence)
    return Calibration(error, float(confidence.mean()), float(correct.mean()), len(confidence))


@torch.inference_mode()
def calibration(
    model: Any, tokenizer: Any, verses: Sequence[Verse], *, bins: int = 15, batch_size: int = 16
) -> Calibration:
    """Calibration of the next-token probabilities: the tokens of the verses, each after all the text before it."""
    context, device = context_of(model), next(model.parameters()).device
    rows = []
    for verse in verses:
        new = encode(tokenizer, verse.text + "\n")
        ids = (prompt_ids(tokenizer, verse.before, context + 1) + new)[-context - 1 :]
        rows.append((ids, max(1, len(ids) - len(new))))  # a target's place in ``ids`` is one more than its logits'
    rows.sort(key=lambda row: len(row[0]))
    confidence, correct = [], []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        length, first = max(len(ids) for ids, _ in batch), min(first for _, first in batch)
        padded = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in batch], device=device)
        output = model(input_ids=padded[:, :-1], use_cache=False, logits_to_keep=length - first)
        top, answer = output.logits.float().softmax(dim=-1).max(dim=-1)
        right = answer == padded[:, first:]
        for row, (ids, begin) in enumerate(batch):
            confidence.append(top[row, begin - first : len(ids) - first].cpu().numpy())
            correct.append(right[row, begin - first : len(ids) - first].cpu().numpy())
    return calibration_error(np.concatenate(confidence or [[]]), np.concatenate(correct or [[]]), bins)


# --- the last word, and verses by heart ---------------------------------------------------------------------


@dataclass(frozen=True)
class Cloze:
    """Share of verses whose last word the model names: after all the text before it, and after the verse alone."""

    full: Mean
    alone: Mean


def cloze(model: Any, tokenizer: Any, verses: Sequence[Verse], *, batch_size: int = 32) -> Cloze:
    """Last word of a verse, after LAMBADA (Paperno et al. 2016, arXiv:1606.06031).

    The likeliest tokens, one by one, must spell the word exactly (letters, case and apostrophes) and no longer one.
    Verses of one word are left out, and so are those of which half the context does not hold the end to be guessed.
    """
    room, asked = context_of(model), []
    for verse in verses:
        words = list(_LETTERS.finditer(verse.text))
        head = verse.text[: words[-1].start()].rstrip() if words else ""
        length = len(encode(tokenizer, verse.text[len(head) :] + "\n"))
        if head and length <= room // 2:
            asked.append((verse, head, verse.text[len(head) : words[-1].end()], length))
    lengths = [length for *_, length in asked]

    def share(before: Sequence[str]) -> Mean:
        prompts = [
            prompt_ids(tokenizer, text + head, room - length)
            for text, (_, head, _, length) in zip(before, asked, strict=True)
        ]
        said = continuations(model, tokenizer, prompts, lengths, batch_size=batch_size)
        return mean([_says(text, word) for text, (_, _, word, _) in zip(said, asked, strict=True)])

    return Cloze(share([verse.before for verse, *_ in asked]), share([""] * len(asked)))


def _says(text: str, word: str) -> bool:
    return text.startswith(word) and not re.match(r"['\u2019]?[^\W\d_]", text[len(word) :])


@dataclass(frozen=True)
class Recall:
    """What the model gives back of the second halves of verses, as shares from 0 to 1.

    Attributes:
        exact: share of verses whose second half comes word for word.
        prefix: words that are right from the first one on, of those of the second half.
        longest: the longest run of words that stands in both, of those of the second half.
    """

    exact: Mean
    prefix: Mean
    longest: Mean

    def __sub__(self, other: Recall) -> Recall:
        """Of train text minus that of held-out text: what is known by heart, not guessed from the language."""
        return Recall(self.exact - other.exact, self.prefix - other.prefix, self.longest - other.longest)


def recall(model: Any, tokenizer: Any, verses: Sequence[Verse], *, batch_size: int = 32) -> Recall:
    """Extractable memorisation (Carlini et al. 2023, arXiv:2202.07646): the first half of a verse's words is the
    prompt, and the likeliest continuation, of as many tokens as the second half has, is compared with it.

    Verses of fewer than two words, or longer than the context, are left out.
    """
    prompts, lengths, wanted = [], [], []
    for verse in verses:
        words = list(BETWEEN_BLANKS.finditer(verse.text))
        if len(words) < 2:
            continue
        cut = words[len(words) // 2 - 1].end()
        prompt = [tokenizer.bos_token_id, *encode(tokenizer, verse.text[:cut])]
        length = len(encode(tokenizer, verse.text[cut:] + "\n"))
        if len(prompt) + length <= context_of(model):
            prompts.append(prompt)
            lengths.append(length)
            wanted.append(verse.text[cut:].split())
    said = continuations(model, tokenizer, prompts, lengths, batch_size=batch_size)
    shares = [overlap(text.split(), words) for text, words in zip(said, wanted, strict=True)]
    exact, prefix, longest = ([share[n] for share in shares] for n in range(3))
    return Recall(mean(exact), mean(prefix), mean(longest))


def overlap(said: list[str], wanted: list[str]) -> tuple[float, float, float]:
    """Whether ``said`` begins with ``wanted`` (0 or 1), the common prefix and the longest common run, as shares of
    ``wanted``."""
    prefix = next(
        (n for n, (a, b) in enumerate(zip(said, wanted, strict=False)) if a != b), min(len(said), len(wanted))
    )
    run = SequenceMatcher(None, said, wanted, autojunk=False).find_longest_match().size
    return float(prefix == len(wanted)), prefix / len(wanted), run / len(wanted)


# --- repetition ---------------------------------------------------------------------------------------------


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
