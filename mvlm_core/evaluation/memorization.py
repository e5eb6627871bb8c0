"""Words that a model completes exactly: the last word of a verse (cloze), and second halves of verses (extractable
memorization)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any

from mvlm_core.data.corpus import Corpus
from mvlm_core.data.verses import WORD, Verse, matched_verses, sample_verses, verses_of
from mvlm_core.evaluation.bits_per_byte import context_of, encode
from mvlm_core.evaluation.generation import continuations, prompt_ids
from mvlm_core.evaluation.results import Mean, as_json, mean

LEAST_WORDS = 8  # of a verse that is used: its second half has four at least
_LETTERS = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")


def cloze(model: Any, tokenizer: Any, verses: Iterable[Verse], *, batch_size: int = 32) -> dict[str, Mean]:
    """Share of verses whose last word is predicted, after LAMBADA (Paperno et al. 2016, arXiv:1606.06031): from all the
    text before it ("full"), and from the verse alone ("alone").

    Greedy decoding must give the word exactly (letters, case and apostrophes) and no longer one. Verses of one word
    are left out, and so are those whose last word with its punctuation takes more than half the context.
    """
    context, items = context_of(model), []
    for verse in verses:
        words = list(_LETTERS.finditer(verse.text))
        head = verse.text[: words[-1].start()].rstrip() if words else ""
        length = len(encode(tokenizer, verse.text[len(head) :] + "\n"))
        if head and length <= context // 2:
            items.append((verse.before, head, verse.text[len(head) : words[-1].end()], length))
    lengths = [length for *_, length in items]

    def accuracy(alone: bool) -> Mean:
        prompts = [
            prompt_ids(tokenizer, head if alone else before + head, context - length)
            for before, head, _, length in items
        ]
        generated = continuations(model, tokenizer, prompts, lengths, batch_size=batch_size)
        return mean([_is_word(text, word) for text, (_, _, word, _) in zip(generated, items, strict=True)])

    return {"full": accuracy(alone=False), "alone": accuracy(alone=True)}


def _is_word(text: str, word: str) -> bool:
    return text.startswith(word) and not re.match(r"['\u2019]?[^\W\d_]", text[len(word) :])


def extraction(model: Any, tokenizer: Any, verses: Iterable[Verse], *, batch_size: int = 32) -> dict[str, Mean]:
    """Extractable memorization (Carlini et al. 2023, arXiv:2202.07646): the prompt is the first half of a verse's
    words; the greedy continuation, of as many tokens as the second half has, is compared with that half.

    Verses of fewer than two words, or longer than the context, are left out.

    Returns:
        "exact": share of verses whose second half is reproduced word for word; and, over the words of that half,
        "prefix": correct words from the first one on, "longest": the longest run of words in both.
    """
    prompts, lengths, references = [], [], []
    for verse in verses:
        words = list(WORD.finditer(verse.text))
        if len(words) < 2:
            continue
        cut = words[len(words) // 2 - 1].end()
        prompt = prompt_ids(tokenizer, verse.text[:cut])
        length = len(encode(tokenizer, verse.text[cut:] + "\n"))
        if len(prompt) + length <= context_of(model):
            prompts.append(prompt)
            lengths.append(length)
            references.append(verse.text[cut:].split())
    generated = continuations(model, tokenizer, prompts, lengths, batch_size=batch_size)
    shares = [overlap(text.split(), words) for text, words in zip(generated, references, strict=True)]
    return {name: mean([share[n] for share in shares]) for n, name in enumerate(("exact", "prefix", "longest"))}


def overlap(words: Sequence[str], reference: Sequence[str]) -> tuple[float, float, float]:
    """Whether ``words`` begins with ``reference`` (0 or 1), and the common prefix and the longest common run as shares
    of ``reference``."""
    pairs = zip(words, reference, strict=False)
    prefix = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(words), len(reference)))
    run = SequenceMatcher(None, words, reference, autojunk=False).find_longest_match().size
    return float(prefix == len(reference)), prefix / len(reference), run / len(reference)


def extractable_memorization(
    model: Any, tokenizer: Any, corpus: Corpus, *, verses: int = 100, seed: int = 0
) -> dict[str, Any]:
    """``extraction`` as JSON of "train" verses and, as a control, of "held_out" validation verses of the same lengths.

    Only the primary translation's where it has validation text: it is read most often, so it is memorized first.
    """
    split = corpus.primary_part if corpus.primary_part("validation") else corpus.split
    control = sample_verses(verses_of(split("validation"), LEAST_WORDS), verses, seed)
    train = matched_verses(control, verses_of(split("train")), seed)
    return {
        name: as_json(extraction(model, tokenizer, some)) for name, some in (("train", train), ("held_out", control))
    }
