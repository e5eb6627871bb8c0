"""Corpus → tokenizer → tokens → batches: everything a run reads, from the cache where nothing has changed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mvlm_core.data.batches import BatchSource
from mvlm_core.data.corpus import Corpus, Document, load_corpus
from mvlm_core.data.token_store import TokenStore, build_token_store, parse_mix, texts
from mvlm_core.data.tokenizer import ByteLevelBPE, cached_tokenizer
from mvlm_core.errors import UserError
from mvlm_core.export.manifest import corpus_choice
from mvlm_core.settings import TrainingSettings
from mvlm_core.training.distributed import ALONE, Ranks
from mvlm_core.training.init_from import Source, open_source, replay_of, source_of

_SKIPPED_SHOWN = 20
log = logging.getLogger("mvlm")


@dataclass(frozen=True)
class OldText:
    """The corpus of ``--replay``, else what the export was trained on.

    Attributes:
        mix: how often a pass reads each folder: as in the export's own training, where that read this corpus.
        test: its test text, without what the new corpus holds.
    """

    corpus: Corpus
    mix: str | None
    test: list[Document]


@dataclass(frozen=True)
class PreparedText:
    """Corpus (the whole data folder, or its part ``only``), tokenizer and training batches of a run; where it trains a
    model further, the export that it starts from and the text that it may forget; and its teacher, if it has one."""

    corpus: Corpus
    only: str | None
    tokenizer: ByteLevelBPE
    batches: BatchSource
    source: Source | None = None
    old: OldText | None = None
    teacher: Source | None = None

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
    old = None
    if (source := source_of(settings)) is not None:
        log.info("starting from the export %s", settings.init_from)
        old = old_text(settings, source, corpus)
    if place := tokenizer_place(settings):
        tokenizer = tokenizer_class.load(place)
    else:
        pieces = (text for group in texts(train) for text in group)
        tokenizer = cached_tokenizer(
            tokenizer_class, pieces, corpus.fingerprint, settings.vocab_size, settings.cache_dir, quiet=settings.quiet
        )
    if (teacher := teacher_of(settings)) is not None:
        _check_teacher(teacher, tokenizer, settings.max_length)
    store = build_token_store(corpus, tokenizer, settings.cache_dir, mix=mix_of(settings), quiet=settings.quiet)
    log.info("%s tokens to train on, %.2f bytes each", f"{len(store.tokens):,}", store.bytes_per_token)
    batches = partial(
        BatchSource,
        context=settings.max_length,
        sequences=settings.sequences_per_step,
        seed=settings.seed,
        unigram_noise=settings.unigram_noise,
    )
    if old is None or (replay := replay_of(settings)) is None:
        return PreparedText(corpus, only, tokenizer, batches(store), source, old, teacher)
    try:
        replayed = batches(_replayed(settings, corpus, tokenizer, old))
    except UserError as error:
        raise _about_replay(settings, error) from None
    mixed = batches(store, replay=replayed, replay_share=replay.share)
    return PreparedText(corpus, only, tokenizer, mixed, source, old, teacher)


def _replayed(settings: TrainingSettings, new: Corpus, tokenizer: ByteLevelBPE, old: OldText) -> TokenStore:
    """The old train text, without what the new corpus holds out."""
    store = build_token_store(old.corpus, tokenizer, settings.cache_dir, mix=old.mix, quiet=settings.quiet)
    held_out = {document.sha256 for document in new.documents if document.split != "train"}
    store.repeats[[document.sha256 in held_out for document in old.corpus.split("train")]] = 0
    log.info("replayed: %s tokens of %s (--replay %s)", f"{len(store.tokens):,}", old.corpus.root, settings.replay)
    return store


def teacher_of(settings: TrainingSettings) -> Source | None:
    """The export of ``--teacher``, checked; None without one.

    Raises:
        UserError: none, an unfinished or a damaged one.
    """
    return None if settings.teacher is None else open_source(settings.teacher, "--teacher")


def _check_teacher(teacher: Source, tokenizer: ByteLevelBPE, context: int) -> None:
    problems = []
    if teacher.config["tokenizer"].get("sha256") != tokenizer.sha256:
        problems.append(f"--teacher {teacher.folder}: another tokenizer; --tokenizer_path takes a teacher's")
    if not isinstance(longest := teacher.config["settings"].get("max_length"), int) or longest < context:
        problems.append(f"--teacher {teacher.folder}: a context of {longest} tokens, shorter than {context}")
    if problems:
        raise UserError(problems)


def _about_replay(settings: TrainingSettings, error: Exception) -> UserError:
    problems = error.problems if isinstance(error, UserError) else [str(error)]
    return UserError([f"--replay {settings.replay}: {problem}" for problem in problems])


def tokenizer_place(settings: TrainingSettings) -> Path | str | None:
    """Where the run's tokenizer is; None where one is trained."""
    source = source_of(settings)
    return settings.tokenizer_path if source is None else source.folder


def old_text(settings: TrainingSettings, source: Source, new: Corpus) -> OldText | None:
    """The text that further training may make a model forget; None, with a line in the log, where there is none here.

    Raises:
        UserError: the corpus of ``--replay`` cannot be read.
    """
    replay, data = replay_of(settings), source.config["data"]
    root = replay.folder if replay else Path(str(data.get("data_dir")))
    try:
        choice = corpus_choice(source.folder)
        for name, place in (
            ("only", root / (choice["only"] or "")),
            ("validation_dir", choice["validation_dir"] or ""),
        ):
            if not Path(place).is_dir():
                choice[name] = None
        corpus = load_corpus(root, **choice)
    except (UserError, OSError, ValueError) as error:  # the latter two: a record that names what can be no path
        if replay:
            raise _about_replay(settings, error) from None
        log.info("forgetting is not measured: the export's corpus is not here (%s)", error)
        return None
    is_own = corpus.fingerprint == data.get("fingerprint")
    if not (is_own or replay):
        log.info("forgetting is not measured: %s is not as the export was trained on it", root)
        return None
    known = {document.sha256 for document in new.documents}
    test = [document for document in corpus.split("test") if document.sha256 not in known]
    mix = source.config["settings"].get("train_mix") if is_own else None
    if not isinstance(mix, str) or not all((root / folder).is_dir() for folder in parse_mix(mix)):
        mix = None  # none, or a preset's that did not apply
    return OldText(corpus, mix, test)


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
