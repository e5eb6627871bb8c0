"""Sizes of a run's text for a dry run, before it is tokenized."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from mvlm_core.data.corpus import Corpus, Document, validation_subset
from mvlm_core.data.token_store import document_repeats, token_folder
from mvlm_core.data.tokenizer import ByteLevelBPE, load_cached, tokenizer_folder
from mvlm_core.settings import TrainingSettings
from mvlm_core.training.init_from import base_export, replay_of
from mvlm_core.training.preparation import mix_of, old_text, tokenizer_path

SAMPLE_BYTES = 8_000_000  # a tokenizer trained on this much text needs 0.5 % more tokens than one trained on all 64 MB
MEASURED_BYTES = 2_000_000


@dataclass(frozen=True)
class TextPlan:
    """Sizes of a run's text, estimated before it is tokenized.

    Attributes:
        train_bytes: each training document counted once.
        epoch_bytes: bytes read in one epoch.
        bytes_per_token: measured with the tokenizer that ``source`` describes.
        has_tokenizer, has_tokens: whether they are cached.
    """

    train_bytes: int
    epoch_bytes: int
    validation_bytes: int
    test_bytes: int
    bytes_per_token: float
    source: str
    has_tokenizer: bool
    has_tokens: bool


def plan_text(settings: TrainingSettings, tokenizer_class: type[ByteLevelBPE], corpus: Corpus) -> TextPlan:
    """Measure the text and its bytes per token, with an existing tokenizer or one trained on a sample."""
    train, mix = corpus.split("train"), mix_of(settings)
    repeats = document_repeats(train, mix)
    sizes = [document.size for document in train]
    folder = tokenizer_folder(tokenizer_class, corpus.fingerprint, settings.vocab_size, settings.cache_dir)
    own = tokenizer_path(settings)
    existing = tokenizer_class.load(own) if own else load_cached(tokenizer_class, folder)
    step = -(-sum(sizes) // SAMPLE_BYTES)
    if existing is not None:
        tokenizer, source = existing, "with the existing tokenizer"
    else:
        chosen = sorted({*range(0, len(train), step), _largest(train)})  # the largest may be most of the text
        sample = [train[index].read()[:SAMPLE_BYTES] for index in chosen]
        tokenizer = tokenizer_class.train(iter(sample), settings.vocab_size)
        source = f"with a tokenizer trained on {sum(map(len, sample)) / 1e6:.1f} MB of the text"
    has_tokens = existing is not None and (token_folder(corpus, tokenizer, settings.cache_dir) / "index.json").exists()
    validation = validation_subset(corpus, settings.validation_text)
    test = [] if settings.no_test_score else corpus.split("test")
    epoch_bytes: float = sum(size * int(count) for size, count in zip(sizes, repeats, strict=True))
    if (base := base_export(settings)) is not None:
        old = old_text(settings, base, corpus)
        test = 2 * [*test, *(old.test if old and not settings.no_test_score else [])]  # before and after
    if replay := replay_of(settings):
        epoch_bytes /= 1 - float(replay.share)
    return TextPlan(
        train_bytes=sum(sizes),
        epoch_bytes=int(epoch_bytes),
        validation_bytes=sum(len(part.encode()) for _, part in validation),
        test_bytes=sum(document.size for document in test),
        bytes_per_token=measured_bytes_per_token(tokenizer, train, repeats, step),
        source=source,
        has_tokenizer=existing is not None,
        has_tokens=has_tokens,
    )


def measured_bytes_per_token(tokenizer: ByteLevelBPE, train: list[Document], repeats: np.ndarray, step: int) -> float:
    """Measure the bytes per token of about ``MEASURED_BYTES`` of text, with each document as often as in an epoch.

    Args:
        step: measure every ``step``-th document, where possible outside the tokenizer's sample.
    """
    order = list(range(step // 2, len(train), step)) or [_largest(train)]
    totals = accumulate(train[index].size for index in order)
    sampled = [index for index, total in zip(order, totals, strict=True) if total <= MEASURED_BYTES]
    sampled = [index for index in sampled or order[:1] if repeats[index]] or order[:1]
    texts = [train[index].read()[:MEASURED_BYTES] for index in sampled]
    tokens = [len(ids) + 1 for ids in tokenizer.encode_batch(texts)]
    times = [int(repeats[index]) or 1 for index in sampled]
    return float(np.dot([len(text.encode()) for text in texts], times) / np.dot(tokens, times))


def _largest(documents: list[Document]) -> int:
    return max(range(len(documents)), key=lambda index: documents[index].size)
