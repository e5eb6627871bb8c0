"""Verses (non-empty lines of documents) with their context, and random samples of them."""

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
_BREAKS = re.compile(r"(?:\s*\n)?")


@dataclass(frozen=True, slots=True)
class Verse:
    """A line of a document, ``begin`` to ``end`` in its text. ``reference`` is the same in every translation."""

    document: str
    begin: int
    end: int
    reference: str
    translation: str | None

    @property
    def text(self) -> str:
        return self.document[self.begin : self.end]

    @property
    def before(self) -> str:
        """The document's text before the verse, including the line break."""
        return self.document[: self.begin]

    @property
    def next_begin(self) -> int:
        """Where the document's text goes on after the line breaks that follow the verse."""
        match = _BREAKS.match(self.document, self.end)
        return match.end() if match else self.end


def verses_of(documents: Iterable[Document], min_words: int = 1) -> Iterator[Verse]:
    """Yield all lines of at least ``min_words`` words; ``reference`` is path:line if the metadata names no verses."""
    for document in documents:
        text, names = document.read(), document.metadata.get("verses")
        lines = list(LINE.finditer(text))
        references = [f"{document.path}:{number}" for number in range(1, len(lines) + 1)]
        if document.book is not None and isinstance(names, list) and len(names) == len(lines):
            references = [f"{document.book} {name}" for name in names]
        for line, reference in zip(lines, references, strict=True):
            if len(line[0].split()) >= min_words:
                yield Verse(text, line.start(), line.end(), reference, document.translation)


def sample_verses(verses: Iterable[Verse], count: int, seed: int) -> list[Verse]:
    """Draw up to ``count`` verses, one per reference, as translations of the same verse are not independent."""
    pool = list(verses)
    chosen: dict[str, Verse] = {}
    random.Random(seed).shuffle(pool)
    for verse in pool:
        chosen.setdefault(verse.reference, verse)
    return list(islice(chosen.values(), count))


def matched_verses(verses: Iterable[Verse], pool: Iterable[Verse], seed: int) -> list[Verse]:
    """For each verse, draw one from the pool with the same translation and the closest number of words.

    Verses whose translation is not in the pool are skipped; draws are with replacement.
    """
    by_length: dict[str | None, dict[int, list[Verse]]] = defaultdict(lambda: defaultdict(list))
    for verse in pool:
        by_length[verse.translation][len(verse.text.split())].append(verse)
    rng, matches = random.Random(seed), []
    for verse in verses:
        if lengths := by_length.get(verse.translation):
            words = len(verse.text.split())
            nearest = min(lengths, key=lambda length: (abs(length - words), length))
            matches.append(rng.choice(lengths[nearest]))
    return matches


def next_words(verse: Verse, words: int) -> str | None:
    """Return ``words`` words from the start of the verse; None if there are fewer or no text precedes the verse."""
    matches = list(islice(WORD.finditer(verse.document, verse.begin), words))
    enough = len(matches) == words and verse.begin > 0
    return verse.document[verse.begin : matches[-1].end()] if enough else None
