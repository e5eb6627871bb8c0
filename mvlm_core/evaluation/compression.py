"""Compression baselines: bits per byte of the test text for general-purpose compressors primed with training text."""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mvlm_core.data.corpus import Corpus

TEXT_LIMIT = 64 << 20  # bytes; beyond that it would take minutes and gigabytes


def _xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


ORDERS = {f"ppmd_order_{order}": order for order in (6, 16)}
LABELS = {"xz": "xz -9e"} | {name: f"PPMd order {order}" for name, order in ORDERS.items()}


def compression_baselines(corpus: Corpus) -> dict[str, Any]:
    """Bits per byte by method, on the test text of the primary translation, or on all test text if there is none.

    4 MB take about ten seconds.

    Returns:
        A value for each of ``LABELS``, ``train_bytes``, ``test_bytes``, and ``translation`` (None for all text); {}
        if either split is empty or the text is longer than ``TEXT_LIMIT``.
    """
    train, test = compared_texts(corpus)
    if not test:
        return {}
    values = {name: bits / len(test) for name, (_, bits) in compressed_bits_by_part(train, [test]).items()}
    translation = corpus.primary_translation if corpus.primary_part("test") else None
    return {"translation": translation, "train_bytes": len(train), "test_bytes": len(test)} | values


def compared_texts(corpus: Corpus) -> tuple[bytes, bytes]:
    """Training and test text of the primary translation, or of all translations if there is none; both empty if either
    is empty or together they exceed ``TEXT_LIMIT``."""
    primary = bool(corpus.primary_part("test"))
    splits = [corpus.primary_part(name) if primary else corpus.split(name) for name in ("train", "test")]
    if not all(splits) or sum(document.size for split in splits for document in split) > TEXT_LIMIT:
        return b"", b""
    train, test = ("".join(document.read() for document in split).encode() for split in splits)
    return train, test


def compressed_bits_by_part(train: bytes, parts: Sequence[bytes]) -> dict[str, tuple[list[float], float]]:
    """Code lengths in bits of consecutive parts of a text and their total, by method; primed with ``train``.

    xz buffers its output until the end, so it has no lengths of parts; the total is size(train + text) - size(train).
    Returns {} without training text to prime with.
    """
    if not train:
        return {}

    def xz() -> tuple[list[float], float]:
        return [], 8.0 * (_xz(train + b"".join(parts)) - _xz(train))

    def ppmd(order: int) -> tuple[list[float], float]:
        lengths = ppmd_bits(train, parts, order)
        return lengths, sum(lengths)

    with ThreadPoolExecutor(2) as pool:  # both libraries release the GIL
        jobs = {"xz": pool.submit(xz)} | {name: pool.submit(ppmd, order) for name, order in ORDERS.items()}
        return {name: job.result() for name, job in jobs.items()}


def ppmd_bits(train: bytes, parts: Sequence[bytes], order: int) -> list[float]:
    """Code length in bits of consecutive parts of a text with PPMd primed with ``train``.

    PPMd emits a byte as soon as it is determined, so a part's length is accurate to about a byte.
    """
    import pyppmd

    size = len(train) + sum(map(len, parts))
    # 256 MB hold every context of 4 MB of text at order 16 (measured; more makes no difference). Once the memory is
    # full, PPMd restarts its model.
    encoder = pyppmd.Ppmd7Encoder(order, min(max(256 << 20, 64 * size), 2 << 30))
    encoder.encode(train)
    return [8.0 * len(encoder.encode(part)) for part in parts]
