"""Verses: the non-empty lines of documents, with the text around them, and random samples of them."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from mvlm_core.data.corpus import Document

LINE = re.compile(r"[^\n]*\S[^\n]*")
WORD = re.compile(r"\S+")


@dataclass(frozen=True, slots=True)
class Verse:
    """A line of a document, from ``begin`` to ``end`` of its text. ``place`` is the same in every translation."""

    document: str
    begin: int
    end: int
    place: str
    translation: str | None

    @property
    def text(self) -> str:
        return self.document[self.begin : self.end]

    @property
    def before(self) -> str:
        """All of the document before the verse, line break included."""
        return self.document[: self.begin]


def verses_of(documents: Iterable[Document], least_words: int = 1) -> Iterator[Verse]:
    """All lines of at least ``least_words``. Without a verse list in the metadata, a place is path and line number."""
    for document in documents:
        text, names = document.read(), document.metadata.get("verses")
        lines = list(LINE.finditer(text))
        places = [f"{document.path}:{number}" for number in range(1, len(lines) + 1)]
        if document.book is not None and isinstance(names, list) and len(names) == len(lines):
            places = [f"{document.book} {name}" for name in names]
        for line, place in zip(lines, places, strict=True):
            if len(line[0].split()) >= least_words:
                yield Verse(text, line.start(), line.end(), place, document.translation)


def sample_verses(verses: Iterable[Verse], count: int, seed: int) -> list[Verse]:
    """At most ``count``, drawn at random, one per place: translations of the same verse are not independent."""
    pool = list(verses)
    chosen: dict[str, Verse] = {}
    random.Random(seed).shuffle(pool)
    for verse in pool:
        chosen.setdefault(verse.place, verse)
    return list(islice(chosen.values(), count))


def matched_verses(verses: Iterable[Verse], pool: Iterable[Verse], seed: int) -> list[Verse]:
    """For each verse one from the pool, of the same translation and the nearest number of words.

    Verses whose translation the pool lacks are left out; a verse of the pool may be drawn more than once.
    """
    by_length: dict[str | None, dict[int, list[Verse]]] = defaultdict(lambda: defaultdict(list))
    for verse in pool:
        by_length[verse.translation][len(verse.text.split())].append(verse)
    rng, found = random.Random(seed), []
    for verse in verses:
        if lengths := by_length.get(verse.translation):
            words = len(verse.text.split())
            nearest = min(lengths, key=lambda length: (abs(length - words), length))
            found.append(rng.choice(lengths[nearest]))
    return found


def followed_by(verse: Verse, words: int) -> str | None:
    """The document's next ``words`` words, from the verse on; None if there are fewer, or no text before the verse."""
    found = list(islice(WORD.finditer(verse.document, verse.begin), words))
    enough = len(found) == words and verse.begin > 0
    return verse.document[verse.begin : found[-1].end()] if enough else None
