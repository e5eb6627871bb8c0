"""Sizes of the tiny models in ``conftest``, and a stand-alone verse."""

from mvlm_core.data.verses import Verse

CONTEXT, VOCABULARY, KNOWN = 96, 600, 28


def verse_of(text: str) -> Verse:
    """A verse that is its document's only line."""
    return Verse(text + "\n", 0, len(text), text[:20], None)
