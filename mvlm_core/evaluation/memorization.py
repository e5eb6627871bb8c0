"""Exact completions: the last word of a verse (cloze), and second halves of verses (extractable memorization)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from mvlm_core.data.corpus import Corpus, Document
from mvlm_core.data.verses import WORD, Verse, matched_verses, sample_verses, verses_of
from mvlm_core.evaluation.bits_per_byte import context_of, encode
from mvlm_core.evaluation.generation import continuations, prompt_ids
from mvlm_core.evaluation.results import Mean, as_json, mean

MIN_WORDS = 8  # per verse, so that its second half has at least four
_LETTERS = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")


def cloze(model: Any, tokenizer: Any, verses: Iterable[Verse]) -> dict[str, Mean]:
    """Accuracy of predicting the last word of a verse, as in LAMBADA (Paperno et al. 2016, arXiv:1606.06031), given all
    the text before it ("full") or the verse alone ("alone").

    Greedy decoding must yield exactly this word (letters, case and apostrophes), not a longer one. Verses of one word
    are skipped, as are those whose last word with punctuation takes more than half the context.
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
        generated = continuations(model, tokenizer, prompts, lengths)
        return mean([_is_word(text, word) for text, (_, _, word, _) in zip(generated, items, strict=True)])

    return {"full": accuracy(alone=False), "alone": accuracy(alone=True)}


def _is_word(text: str, word: str) -> bool:
    return text.startswith(word) and not re.match(r"['\u2019]?[^\W\d_]", text[len(word) :])


def extraction(model: Any, tokenizer: Any, verses: Iterable[Verse]) -> dict[str, Mean]:
    """Extractable memorization (Carlini et al. 2023, arXiv:2202.07646): given the first half of a verse's words, the
    greedy continuation, with as many tokens as the second half, is compared with that half.

    Verses of fewer than two words, or longer than the context, are skipped.

    Returns:
        "exact": share of verses whose second half is reproduced word for word; "prefix" and "longest": the common
        prefix and the longest common run of words, as shares of that half.
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
    generated = continuations(model, tokenizer, prompts, lengths)
    shares = [overlap(text.split(), words) for text, words in zip(generated, references, strict=True)]
    return {name: mean([share[n] for share in shares]) for n, name in enumerate(("exact", "prefix", "longest"))}


def overlap(words: Sequence[str], reference: Sequence[str]) -> tuple[float, float, float]:
    """Whether ``words`` begins with ``reference`` (0 or 1), and the common prefix and the longest common run as shares
    of ``reference``."""
    pairs = zip(words, reference, strict=False)
    prefix = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(words), len(reference)))
    run = SequenceMatcher(None, words, reference, autojunk=False).find_longest_match().size
    return float(prefix == len(reference)), prefix / len(reference), run / len(reference)


def mean_coverage(verses: Sequence[Verse], documents: Iterable[Document], read: Mapping[str, float]) -> float:
    """Mean over verses of the share of their document that was read; NaN without verses.

    Args:
        documents: those of the verses, and any others.
        read: ``document_coverage``.
    """
    by_text = {document.read(): read[document.path] for document in documents}
    return mean([by_text[verse.document] for verse in verses]).value


def extractable_memorization(
    model: Any, tokenizer: Any, corpus: Corpus, read: Mapping[str, float], *, verses: int = 100, seed: int = 0
) -> dict[str, Any]:
    """``extraction``, as JSON, for "train" verses and, as a control, "held_out" validation verses of the same lengths.

    Limited to the primary translation if it has validation text: it is read most often and so memorized first. "read"
    is the share of the train verses that training is expected to have seen; documents it never reads are excluded.

    Args:
        read: ``document_coverage`` of the train documents.
    """
    split = corpus.primary_part if corpus.primary_part("validation") else corpus.split
    control = sample_verses(verses_of(split("validation"), MIN_WORDS), verses, seed)
    documents = [document for document in split("train") if read[document.path]]
    train = matched_verses(control, verses_of(documents), seed)
    found = {"train": extraction(model, tokenizer, train), "held_out": extraction(model, tokenizer, control)}
    return as_json(found | {"read": mean_coverage(train, documents, read)})
