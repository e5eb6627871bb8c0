"""Compression baselines: bits per byte of the test text for general-purpose compressors primed with the train text."""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from mvlm_core.data.corpus import Corpus
from mvlm_core.files import read_json, write_json_atomic
from mvlm_core.run_layout import finite_number

TEXT_LIMIT = 64 << 20  # bytes; above that it would take minutes and gigabytes
VERSION = 1  # part of the cache's key: raise it when the measurement changes


def _xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def _ppmd(data: bytes, order: int) -> int:
    import pyppmd

    # 256 MB hold every context of 4 MB of text at order 16 (measured; more changes nothing). Once that is full, PPMd
    # forgets.
    encoder = pyppmd.Ppmd7Encoder(order, min(max(256 << 20, 64 * len(data)), 2 << 30))
    return len(encoder.encode(data)) + len(encoder.flush())


METHODS: dict[str, tuple[str, Callable[[bytes], int]]] = {
    "xz": ("xz -9e", _xz),
    "ppmd_order_6": ("PPMd order 6", partial(_ppmd, order=6)),
    "ppmd_order_16": ("PPMd order 16", partial(_ppmd, order=16)),
}
LABELS = {name: label for name, (label, _) in METHODS.items()}


def compression_baselines(corpus: Corpus, cache_dir: Path) -> dict[str, Any]:
    """Bits per byte by method, on the test text of the primary translation, or on all of it where there is none.

    Each code length is size(train + test) - size(train), in bits over the bytes of the test text. Cached in
    ``cache_dir`` by the hash of the text, because 4 MB take about ten seconds.

    Returns:
        A value for each of ``METHODS``, ``train_bytes``, ``test_bytes``, and ``translation`` (None for all text); {}
        where either split is empty or the text is longer than ``TEXT_LIMIT``.
    """
    primary = bool(corpus.primary_part("test"))
    splits = [corpus.primary_part(name) if primary else corpus.split(name) for name in ("train", "test")]
    if not all(splits) or sum(document.size for split in splits for document in split) > TEXT_LIMIT:
        return {}
    train, test = ("".join(document.read() for document in split).encode() for split in splits)
    key = hashlib.sha256(b"%d %d " % (VERSION, len(train)) + train + test).hexdigest()
    cache = Path(cache_dir) / "compressors" / f"{key[:32]}.json"
    found = {name: value for name in METHODS if (value := finite_number(read_json(cache).get(name))) is not None}
    if len(found) < len(METHODS):  # not measured before, or the record is damaged
        with ThreadPoolExecutor(2) as pool:  # both libraries release the interpreter's lock while they work
            jobs = {
                name: [pool.submit(size, data) for data in (train + test, train)] for name, (_, size) in METHODS.items()
            }
            found = {name: (both.result() - alone.result()) * 8 / len(test) for name, (both, alone) in jobs.items()}
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(cache, found)
    known = {"translation": corpus.primary_translation if primary else None}
    return known | {"train_bytes": len(train), "test_bytes": len(test)} | found
