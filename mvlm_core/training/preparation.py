"""Corpus → tokenizer → tokens → batches: everything a run reads, from the cache where nothing has changed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from mvlm_core.data.batches import BatchSource
from mvlm_core.data.corpus import Corpus, load_corpus
from mvlm_core.data.token_store import TokenStore, build_token_store, parse_mix, texts
from mvlm_core.data.tokenizer import ByteLevelBPE, cached_tokenizer
from mvlm_core.settings import TrainingSettings
from mvlm_core.training.distributed import ALONE, Ranks

_SKIPPED_SHOWN = 20
log = logging.getLogger("mvlm")


@dataclass(frozen=True)
class PreparedText:
    """Corpus (the whole data folder, or its part ``only``), tokenizer and training batches of a run."""

    corpus: Corpus
    only: str | None
    tokenizer: ByteLevelBPE
    batches: BatchSource

    @property
    def store(self) -> TokenStore:
        return self.batches.store


def prepare_text(settings: TrainingSettings, tokenizer_class: type[ByteLevelBPE], ranks: Ranks = ALONE) -> PreparedText:
    """Read the corpus, tokenize its train text and set up the batches.

    The first process of each machine fills the cache while the others wait, and then read it.

    Raises:
        UserError: no corpus, no usable text, an unreadable tokenizer, or fewer sequences in a batch than processes.
    """
    if ranks.local == 0:
        text = _prepare(settings, tokenizer_class)
        ranks.wait_for_first("text")
        return text
    ranks.wait_for_first("text")
    return _prepare(settings, tokenizer_class)


def _prepare(settings: TrainingSettings, tokenizer_class: type[ByteLevelBPE]) -> PreparedText:
    corpus, only = read_corpus(settings)
    train = corpus.split("train")
    size = sum(document.size for document in train) / 1e6
    log.info("corpus %s: %s documents, %.1f MB to train on", corpus.root, len(corpus.documents), size)
    for skipped in corpus.skipped[:_SKIPPED_SHOWN]:
        log.warning("left out %s: %s", skipped.path, skipped.reason)
    if len(corpus.skipped) > _SKIPPED_SHOWN:
        log.warning("left out %s more files", len(corpus.skipped) - _SKIPPED_SHOWN)
    if settings.tokenizer_path:
        tokenizer = tokenizer_class.load(settings.tokenizer_path)
    else:
        pieces = (text for group in texts(train) for text in group)
        tokenizer = cached_tokenizer(
            tokenizer_class, pieces, corpus.fingerprint, settings.vocab_size, settings.cache_dir, quiet=settings.quiet
        )
    store = build_token_store(corpus, tokenizer, settings.cache_dir, mix=mix_of(settings), quiet=settings.quiet)
    log.info("%s tokens to train on, %.2f bytes each", f"{len(store.tokens):,}", store.bytes_per_token)
    batches = BatchSource(
        store,
        context=settings.max_length,
        sequences=settings.sequences_per_step,
        seed=settings.seed,
        unigram_noise=settings.unigram_noise,
    )
    return PreparedText(corpus, only, tokenizer, batches)


def read_corpus(settings: TrainingSettings) -> tuple[Corpus, str | None]:
    """The corpus of a run, and the folder it is limited to, if any."""
    only = _applicable(settings, "data_subset")
    split, folder = settings.validation_split, settings.validation_dir
    return load_corpus(settings.data_dir, validation_split=split, validation_dir=folder, only=only), only


def mix_of(settings: TrainingSettings) -> str | None:
    """How often a pass reads each folder of the run's text; None for once."""
    return _applicable(settings, "train_mix")


def _applicable(settings: TrainingSettings, name: str) -> str | None:
    """``data_subset`` or ``train_mix``; a preset's own value is dropped where the data folder lacks what it names."""
    value = getattr(settings, name)
    if value is None or value != settings.preset_values(settings.preset).get(name):
        return value
    folders = [value] if name == "data_subset" else parse_mix(value)
    if all((Path(settings.data_dir) / folder).is_dir() for folder in folders):
        return value
    log.info("%s has no %s: the preset's --%s does not apply", settings.data_dir, ", ".join(folders), name)
    return None
