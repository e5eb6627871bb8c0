"""Verses, the lines of documents that are not empty, with the text around them: what the probes draw and ask about."""

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
        """What the document says before it, the line break included."""
        return self.document[: self.begin]


def verses_of(documents: Iterable[Document]) -> Iterator[Verse]:
    """All lines that are not empty. Without a list of verses in the metadata, a place is a path and a line's number."""
    for document in documents:
        text, names = document.read(), document.metadata.get("verses")
        lines = list(LINE.finditer(text))
        known = document.book is not None and isinstance(names, list) and len(names) == len(lines)
        for number, line in enumerate(lines):
            place = f"{document.book} {names[number]}" if known else f"{document.path}:{number + 1}"
            yield Verse(text, line.start(), line.end(), place, document.translation)


def sample_verses(verses: Iterable[Verse], count: int, seed: int) -> list[Verse]:
    """At most ``count``, drawn at random, no two of one place: two translations of a verse say the same twice."""
    pool, chosen = list(verses), {}
    random.Random(seed).shuffle(pool)
    for verse in pool:
        chosen.setdefault(verse.place, verse)
    return list(islice(chosen.values(), count))


def matched_verses(verses: Iterable[Verse], pool: Iterable[Verse], seed: int) -> list[Verse]:
    """For each verse one of the pool, of the same translation and as nearly as possible as many words.

    A verse whose translation the pool lacks has none; a verse of the pool may come twice.
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
    """The first ``words`` words from the verse on, or None where the document ends before or begins here."""
    found = list(islice(BETWEEN_BLANKS.finditer(verse.document, verse.begin), words))
    enough = len(found) == words and verse.begin > 0
    return verse.document[verse.begin : found[-1].end()] if enough else None
