"""Leak audit: how much held-out text also occurs in the train text, printed by every corpus build."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from bible_corpus.books import BOOKS, HELD_OUT, PRIMARY_TRANSLATION
from bible_corpus.ngram_overlap import NgramHasher
from mvlm_core.console import progress


def leak_audit(bibles: Mapping[str, Mapping[int, str]], quiet: bool = True) -> dict[str, dict[str, Any]]:
    """Measure the overlap of each held-out book with the train text, in word 13-grams.

    Returns, by held-out book: `share`, the fraction of its n-grams (all translations) found in any train book of any
    translation; `share_kjv`, the same for the primary translation's text only (against the train text of all
    translations); `train_books`, the train books with the most matches and their counts.
    """
    hasher = NgramHasher()
    books: dict[tuple[int, str], list[str]] = defaultdict(list)
    for name, verses in bibles.items():
        for verse_id, text in sorted(verses.items()):
            books[verse_id // 10**6, name].append(text)
    held = {key: hasher(texts) for key, texts in books.items() if BOOKS[key[0] - 1] in HELD_OUT}
    if not held:
        return {}
    held_ngrams = np.unique(np.concatenate(list(held.values())))
    matches: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(len(held_ngrams), bool))  # by train book
    train = {key: texts for key, texts in books.items() if key not in held}
    with progress(len(train), "leak audit", "book", quiet=quiet) as bar:
        for (number, _), texts in train.items():
            ngrams = hasher(texts)
            places = np.searchsorted(held_ngrams[:-1], ngrams)
            matches[number][places[held_ngrams[places] == ngrams]] = True
            bar.update()
    seen = np.logical_or.reduce([np.zeros(len(held_ngrams), bool), *matches.values()])
    audit = {}
    for number in sorted({number for number, _ in held}):
        by_translation = {
            name: np.searchsorted(held_ngrams, ngrams) for (n, name), ngrams in held.items() if n == number
        }
        every = np.concatenate(list(by_translation.values()))
        primary = by_translation.get(PRIMARY_TRANSLATION, every[:0])
        counts = Counter({BOOKS[n - 1]: int(mask[np.unique(every)].sum()) for n, mask in matches.items()})
        audit[BOOKS[number - 1]] = {
            "split": HELD_OUT[BOOKS[number - 1]],
            "sequences": len(every),
            "share": round(float(seen[every].mean()), 5),
            "share_kjv": round(float(seen[primary].mean()), 5) if len(primary) else None,
            "train_books": {name: count for name, count in counts.most_common(4) if count},
        }
    return audit
