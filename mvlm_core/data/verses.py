"""Verses, the non-empty lines of documents, with the text around them: what the evaluation suite samples from."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from mvlm_core.data.corpus import Document

LINE = re.compile(r"[^\n]*\S[^\n]*")
BETWEEN_BLANKS = re.compile(r"\S+")


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
        """The document's text before it, including the line break."""
        return self.document[: self.begin]


def verses_of(documents: Iterable[Document]) -> Iterator[Verse]:
    """All non-empty lines. Without a list of verses in the metadata, a place is a path and a line's number."""
    for document in documents:
        text, names = document.read(), document.metadata.get("verses")
        lines = list(LINE.finditer(text))
        if document.book is not None and isinstance(names, list) and len(names) == len(lines):
            places = [f"{document.book} {name}" for name in names]
        else:
            places = [f"{document.path}:{number}" for number in range(1, len(lines) + 1)]
        for line, place in zip(lines, places, strict=True):
            yield Verse(text, line.start(), line.end(), place, document.translation)


def sample_verses(verses: Iterable[Verse], count: int, seed: int) -> list[Verse]:
    """At most ``count``, drawn at random, no two with the same place: translations of a verse are near duplicates."""
    pool = list(verses)
    chosen: dict[str, Verse] = {}
    random.Random(seed).shuffle(pool)
    for verse in pool:
        chosen.setdefault(verse.place, verse)
    return list(islice(chosen.values(), count))


def matched_verses(verses: Iterable[Verse], pool: Iterable[Verse], seed: int) -> list[Verse]:
    """For each verse one from the pool, of the same translation and of the nearest length in words.

    A verse whose translation is not in the pool gets none; a verse of the pool may be drawn twice.
    """
    by_length: dict[str | None, dict[int, list[Verse]]] = defaultdict(lambda: defaultdict(list))
    for verse in pool:
        by_length[verse.translation][len(verse.text.split())].append(verse)
    lengths = {translation: sorted(groups) for translation, groups in by_length.items()}
    chance, found = random.Random(seed), []
    for verse in verses:
        if there := lengths.get(verse.translation):
            words = len(verse.text.split())
            place = bisect_left(there, words)
            length = min(there[max(0, place - 1) : place + 1], key=lambda n: abs(n - words))
            found.append(chance.choice(by_length[verse.translation][length]))
    return found


def followed_by(verse: Verse, words: int) -> str | None:
    """``words`` words from the start of the verse, or None if the document has fewer or begins with the verse."""
    found = list(islice(BETWEEN_BLANKS.finditer(verse.document, verse.begin), words))
    enough = len(found) == words and verse.begin > 0
    return verse.document[verse.begin : found[-1].end()] if enough else None
