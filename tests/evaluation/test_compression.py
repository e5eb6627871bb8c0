"""Compression baselines: primed with the train text."""

import gzip
import lzma
from dataclasses import replace
from functools import partial

import pyppmd
import pytest

from mvlm_core.data.corpus import MANIFEST_NAME, load_corpus
from mvlm_core.evaluation.compression import compared_texts, compressed_bits_by_part, compression_baselines


def test_compressors_are_primed_with_the_train_text(tiny_corpus):
    corpus = load_corpus(tiny_corpus)
    found = compression_baselines(corpus)
    train = "".join(d.read() for d in corpus.split("train") if d.translation == "kjv").encode()
    test = "".join(d.read() for d in corpus.split("test") if d.translation == "kjv").encode()
    assert (found["translation"], found["train_bytes"], found["test_bytes"]) == ("kjv", len(train), len(test))
    both, alone = (xz_size(text) for text in (train + test, train))
    assert found["xz"] == pytest.approx((both - alone) * 8 / len(test))
    assert found["xz"] < len(gzip.compress(test)) * 8 / len(test)  # priming helps
    assert found["ppmd_order_16"] < found["xz"] and found["ppmd_order_6"] < found["xz"]


def test_without_a_primary_translation_all_test_text_is_compressed(tiny_corpus):
    (tiny_corpus / MANIFEST_NAME).unlink()
    corpus = load_corpus(tiny_corpus)
    found = compression_baselines(corpus)
    assert found["translation"] is None
    assert found["test_bytes"] == sum(document.size for document in corpus.split("test"))


def xz_size(data):
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def ppmd_size(data, order):
    encoder = pyppmd.Ppmd7Encoder(order, 256 << 20)
    return len(encoder.encode(data)) + len(encoder.flush())


def test_ppmd_code_lengths_by_part_add_up_to_the_total(tiny_corpus):
    corpus = load_corpus(tiny_corpus)
    train = "".join(d.read() for d in corpus.split("train") if d.translation == "kjv").encode()
    parts = [train[:300], b" My dog ate a pizza on Tuesday.", b" Behold, a son."]
    found = compressed_bits_by_part(train, parts)
    sizes = {"xz": xz_size, "ppmd_order_6": partial(ppmd_size, order=6), "ppmd_order_16": partial(ppmd_size, order=16)}
    for name, size in sizes.items():
        lengths, total = found[name]
        # Ending the code takes a byte or two, which the parts do not include.
        assert total == pytest.approx(8 * (size(train + b"".join(parts)) - size(train)), abs=0 if name == "xz" else 16)
        assert sum(lengths) == (0 if name == "xz" else total)
    known, pizza, _ = found["ppmd_order_16"][0]
    assert known / len(parts[0]) < 1 < 3 < pizza / len(parts[1]), "it has read the first part"


def test_there_are_no_code_lengths_without_train_text(tiny_corpus):
    corpus = load_corpus(tiny_corpus)
    none = replace(corpus, documents=tuple(d for d in corpus.documents if d.split != "train"))
    assert compressed_bits_by_part(compared_texts(none)[0], [b"In the beginning"]) == {}
