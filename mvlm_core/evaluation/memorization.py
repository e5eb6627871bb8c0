"""What a model completes word for word: a verse's last word (cloze), and verses by heart (extractable memorization)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from mvlm_core.data.verses import BETWEEN_BLANKS, Verse
from mvlm_core.evaluation.bits_per_byte import context_of, encode
from mvlm_core.evaluation.estimate import Mean, mean
from mvlm_core.evaluation.generation import continuations, prompt_ids

_LETTERS = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")


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
