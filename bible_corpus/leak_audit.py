"""How much of the held-out text is also in the train text: the audit that every build of the corpus prints."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from bible_corpus.books import BOOKS, HELD_OUT, PRIMARY_TRANSLATION
from bible_corpus.ngram_overlap import NgramHasher
from mvlm_core.console import progress


def leak_audit(bibles: Mapping[str, Mapping[int, str]], quiet: bool = True) -> dict[str, dict[str, Any]]:
    """How much of each held-out book is also in the train text, in n-grams of 13 words.

    For every held-out book: `share` of its n-grams, over all translations, that some train book of some translation
    has; `share_kjv` the same for the primary translation's text alone (against the train text of all translations);
    `train_books` that hold most of them, with the number each holds.
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
    found: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(len(held_ngrams), bool))  # in a train book's n-grams?
    train = {key: texts for key, texts in books.items() if key not in held}
    with progress(len(train), "leak audit", "book", quiet=quiet) as bar:
        for (number, _), texts in train.items():
            ngrams = hasher(texts)
            places = np.searchsorted(held_ngrams[:-1], ngrams)
            found[number][places[held_ngrams[places] == ngrams]] = True
            bar.update()
    seen = np.logical_or.reduce([np.zeros(len(held_ngrams), bool), *found.values()])
    audit = {}
    for number in sorted({number for number, _ in held}):
        by_translation = {
            name: np.searchsorted(held_ngrams, ngrams) for (n, name), ngrams in held.items() if n == number
        }
        every = np.concatenate(list(by_translation.values()))
        primary = by_translation.get(PRIMARY_TRANSLATION, every[:0])
        counts = Counter({BOOKS[n - 1]: int(mask[np.unique(every)].sum()) for n, mask in found.items()})
        audit[BOOKS[number - 1]] = {
            "split": HELD_OUT[BOOKS[number - 1]],
            "sequences": len(every),
            "share": round(float(seen[every].mean()), 5),
            "share_kjv": round(float(seen[primary].mean()), 5) if len(primary) else None,
            "train_books": {name: count for name, count in counts.most_common(4) if count},
        }
    return audit
