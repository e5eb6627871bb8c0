"""n-gram overlap: 64-bit hashes of word n-grams, used by the leak audits to find shared text."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

LENGTH = 13  # words: long enough that only quotations match (Brown et al. 2020, arXiv 2005.14165, appendix C)


class NgramHasher:
    """Hash every ``LENGTH``-gram of words, lower-cased and without punctuation.

    Hashes are comparable only if they come from the same hasher.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        # Odd multipliers from a fixed seed: about one collision in 10**6 builds.
        random = np.random.default_rng(13)
        self._weights = random.integers(0, 2**63, LENGTH, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

    def __call__(self, texts: Iterable[str]) -> np.ndarray:
        """Return the hashes of the concatenated texts, ``[n-grams]`` uint64."""
        numbers = self._numbers
        words = re.findall(r"[^\W_]+", re.sub(r"['\u2019]", "", " ".join(texts).lower()))
        ids = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.uint64, len(words))
        mixed = (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        count = max(0, len(words) - LENGTH + 1)
        total = np.zeros(count, np.uint64)
        for i in range(LENGTH):
            total += mixed[i : i + count] * self._weights[i]
        return total
