"""How much held-out text also stands in train text: the audit that every build of the corpus prints."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np

from bible_corpus.books import BOOKS, HELD_OUT
from bible_corpus.ngram_overlap import WordSequences
from mvlm_core.console import progress


def leak_audit(bibles: Mapping[str, Mapping[int, str]], quiet: bool = True) -> dict[str, dict]:
    """How much of each held-out book also stands in train text, in sequences of 13 words.

    Words are compared in lower case without punctuation. For every held-out book: `share` of its sequences, over all
    translations, that some train book of some translation has; `share_kjv` the same for the King James text alone
    (against the train text of all translations); `train_books` that hold most of them, with the number each holds.
    """
    sequences = WordSequences()
    books: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, verses in bibles.items():
        for verse_id, text in sorted(verses.items()):
            books[name, verse_id // 10**6].append(text)
    held = {key: sequences(texts) for key, texts in books.items() if BOOKS[key[1] - 1] in HELD_OUT}
    if not held:
        return {}
    all_held = np.unique(np.concatenate(list(held.values())))
    by_number: dict[int, list[np.ndarray]] = defaultdict(list)
    train = {key: texts for key, texts in books.items() if key not in held}
    with progress(len(train), "leak audit", "book", quiet=quiet) as bar:
        for (_, number), texts in train.items():
            values = sequences(texts)
            places = np.minimum(np.searchsorted(all_held, values), len(all_held) - 1)
            by_number[number].append(np.unique(places[all_held[places] == values]))
            bar.update()
    seen = np.zeros(len(all_held), bool)
    hits: dict[int, np.ndarray] = {}
    for number, found in by_number.items():
        hits[number] = np.zeros(len(all_held), bool)
        hits[number][np.concatenate(found)] = True
        seen |= hits[number]
    audit = {}
    for number, book in enumerate(BOOKS, 1):
        own = {name: values for (name, n), values in held.items() if n == number}
        if not own:
            continue
        places = np.searchsorted(all_held, np.concatenate(list(own.values())))
        by_book = Counter({BOOKS[n - 1]: int(mask[np.unique(places)].sum()) for n, mask in hits.items()})
        kjv = seen[np.searchsorted(all_held, own["kjv"])] if "kjv" in own else np.zeros(0, bool)
        audit[book] = {
            "split": HELD_OUT[book],
            "sequences": len(places),
            "share": round(float(seen[places].mean()), 5),
            "share_kjv": round(float(kjv.mean()), 5) if len(kjv) else None,
            "train_books": {name: count for name, count in by_book.most_common(4) if count},
        }
    return audit
