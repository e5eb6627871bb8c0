"""Corpus → tokenizer → tokens → batches: load a run's data, reusing cached tokenizers and tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mvlm_core.data.batches import BatchSource
from mvlm_core.data.corpus import Corpus, Document, load_corpus
from mvlm_core.data.token_store import TokenStore, build_token_store, parse_mix
from mvlm_core.data.tokenizer import ByteLevelBPE, cached_tokenizer
from mvlm_core.errors import UserError, printable
from mvlm_core.settings import TrainingSettings
from mvlm_core.training.distributed import SINGLE_RANK, Ranks
from mvlm_core.training.init_from import PretrainedExport, base_export, open_export, replay_of

_SKIPPED_SHOWN = 20
log = logging.getLogger("mvlm")


@dataclass(frozen=True)
class OldText:
    """The corpus of ``--replay``, or else the one the export was trained on.

    Attributes:
        mix: how often an epoch reads each folder; the export's own mix if it was trained on this corpus.
        test: its test documents, except those that the new corpus contains.
    """

    corpus: Corpus
    mix: str | None
    test: list[Document]


@dataclass(frozen=True)
class PreparedText:
    """Data of a run: corpus, tokenizer and training batches.

    Attributes:
        only: the subfolder the corpus is limited to, if any.
        mix: how often an epoch reads each folder; None means once.
        base, old: for fine-tuning, the export to start from and the text that may be forgotten.
        teachers: the exports to distill from.
    """

    corpus: Corpus
    only: str | None
    mix: str | None
    tokenizer: ByteLevelBPE
    batches: BatchSource
    base: PretrainedExport | None = None
    old: OldText | None = None
    teachers: tuple[PretrainedExport, ...] = ()

    @property
    def store(self) -> TokenStore:
        return self.batches.store


def prepare_text(
    settings: TrainingSettings, tokenizer_class: type[ByteLevelBPE], ranks: Ranks = SINGLE_RANK
) -> PreparedText:
    """Read the corpus, tokenize the training split and set up the batches.

    The first rank of each machine fills the cache; the others wait and then read it.

    Raises:
        UserError: no corpus, no usable text, or an unreadable tokenizer.
    """
    if ranks.local_rank == 0:
        text = _prepare(settings, tokenizer_class)
        ranks.wait_for_first("text")
        return text
    ranks.wait_for_first("text")
    return _prepare(settings, tokenizer_class)


def _prepare(settings: TrainingSettings, tokenizer_class: type[ByteLevelBPE]) -> PreparedText:
    corpus, only = read_corpus(settings)
    train = corpus.split("train")
    size = sum(document.size for document in train) / 1e6
    log.info("corpus %s: %s documents, %.1f MB of training text", corpus.root, len(corpus.documents), size)
    for skipped in corpus.skipped[:_SKIPPED_SHOWN]:
        log.warning("skipped %s: %s", skipped.path, skipped.reason)
    if len(corpus.skipped) > _SKIPPED_SHOWN:
        log.warning("skipped %s more files", len(corpus.skipped) - _SKIPPED_SHOWN)
    check_held_out(settings, corpus)
    old = None
    if (base := base_export(settings)) is not None:
        log.info("starting from the export %s", settings.init_from)
        old = old_text(settings, base, corpus)
    if path := tokenizer_path(settings):
        tokenizer = tokenizer_class.load(path)
    else:
        pieces = (document.read() for document in train)
        tokenizer = cached_tokenizer(
            tokenizer_class, pieces, corpus.fingerprint, settings.vocab_size, settings.cache_dir, quiet=settings.quiet
        )
    teachers = tuple(open_export(path, "--teacher") for path in settings.teacher)
    _check_teachers(teachers, tokenizer, settings.max_length)
    mix = mix_of(settings)
    store = build_token_store(corpus, tokenizer, settings.cache_dir, mix=mix, quiet=settings.quiet)
    log.info("%s training tokens, %.2f bytes per token", f"{len(store.tokens):,}", store.bytes_per_token)
    batches = partial(
        BatchSource,
        context=settings.max_length,
        batch_size=settings.sequences_per_step,
        seed=settings.seed,
    )
    if old is None or (replay := replay_of(settings)) is None:
        return PreparedText(corpus, only, mix, tokenizer, batches(store), base, old, teachers)
    try:
        replayed = batches(_replayed(settings, corpus, tokenizer, old))
    except UserError as error:
        raise _replay_error(settings, error) from None
    mixed_batches = batches(store, replay=replayed, replay_share=replay.share)
    return PreparedText(corpus, only, mix, tokenizer, mixed_batches, base, old, teachers)


def _replayed(settings: TrainingSettings, new: Corpus, tokenizer: ByteLevelBPE, old: OldText) -> TokenStore:
    """Tokenize the old training text, except documents that the new corpus holds out."""
    held_out = {document.sha256 for document in new.documents if document.split != "train"}
    store = build_token_store(
        old.corpus, tokenizer, settings.cache_dir, mix=old.mix, excluded=held_out, quiet=settings.quiet
    )
    log.info("replay: %s tokens of %s (--replay %s)", f"{len(store.tokens):,}", old.corpus.root, settings.replay)
    return store


def _check_teachers(teachers: Iterable[PretrainedExport], tokenizer: ByteLevelBPE, context: int) -> None:
    problems = []
    for teacher in teachers:
        if teacher.config["tokenizer"].get("sha256") != tokenizer.sha256:
            problems.append(
                f"--teacher {teacher.folder}: different tokenizer; pass the teacher's with --tokenizer_path"
            )
        if not isinstance(longest := teacher.config["settings"].get("max_length"), int) or longest < context:
            problems.append(
                f"--teacher {teacher.folder}: a context of {longest} tokens, shorter than --max_length {context}"
            )
    if problems:
        raise UserError(problems)


def _replay_error(settings: TrainingSettings, error: UserError) -> UserError:
    return UserError([f"--replay {settings.replay}: {problem}" for problem in error.problems])


def tokenizer_path(settings: TrainingSettings) -> Path | str | None:
    """Path of the run's existing tokenizer; None if one will be trained."""
    base = base_export(settings)
    return settings.tokenizer_path if base is None else base.folder


def check_held_out(settings: TrainingSettings, corpus: Corpus) -> None:
    """Check that the base and the teachers were not trained on text that ``corpus`` holds out.

    Logs the exports whose corpus is not on this machine, which cannot be checked.

    Raises:
        UserError: an export has seen held-out text, so that its scores, and those of a model that learns from it, would
            be too good.
    """
    exports = [(f"--teacher {path}", open_export(path, "--teacher")) for path in settings.teacher]
    if (base := base_export(settings)) is not None:
        exports.insert(0, (f"--init_from {settings.init_from}", base))
    held_out, problems = {d.sha256: d.path for d in corpus.documents if d.split != "train"}, []
    for name, export in exports:
        if export.config["data"].get("fingerprint") == corpus.fingerprint:
            continue
        if export.corpus is None:
            log.info("%s: whether it has seen held-out text is unknown: its corpus is not here or has changed", name)
        elif seen := sorted({held_out[d.sha256] for d in export.corpus.split("train") if d.sha256 in held_out}):
            problems.append(
                f"{name} was trained on {len(seen)} of the documents held out here, such as {printable(seen[0])}; use "
                'its --data_dir and --validation_split, or set "split": "train" in their .json'
            )
    if problems:
        raise UserError(problems)


def old_text(settings: TrainingSettings, base: PretrainedExport, new: Corpus) -> OldText | None:
    """Load the text that fine-tuning may make a model forget; log and return None if it is not on this machine.

    Raises:
        UserError: the corpus of ``--replay`` cannot be read.
    """
    try:
        replay = replay_of(settings)
        corpus = base.corpus_in(replay.folder) if replay else base.corpus
    except UserError as error:
        raise _replay_error(settings, error) from None
    if corpus is None:
        log.info("forgetting is not measured: the export's corpus is not here or has changed")
        return None
    known = {document.sha256 for document in new.documents}
    test = [document for document in corpus.split("test") if document.sha256 not in known]
    data = base.config["data"]
    return OldText(corpus, data.get("mix") if corpus.fingerprint == data.get("fingerprint") else None, test)


def read_corpus(settings: TrainingSettings) -> tuple[Corpus, str | None]:
    """Read the corpus of a run; also return the subfolder it is limited to, if any."""
    only = _applicable(settings, "data_subset")
    split, folder = settings.validation_split, settings.validation_dir
    return load_corpus(settings.data_dir, validation_split=split, validation_dir=folder, only=only), only


def mix_of(settings: TrainingSettings) -> str | None:
    """How often an epoch reads each folder of the training text; None means once."""
    return _applicable(settings, "train_mix")


def _applicable(settings: TrainingSettings, name: str) -> str | None:
    """Value of ``data_subset`` or ``train_mix``; a preset's value is dropped if the data lacks the folders it names."""
    value = getattr(settings, name)
    if value is None or value != settings.preset_values(settings.preset).get(name):
        return value
    folders = [value] if name == "data_subset" else parse_mix(value)
    if all((Path(settings.data_dir) / folder).is_dir() for folder in folders):
        return value
    log.info("%s has no %s: the preset's --%s does not apply", settings.data_dir, ", ".join(folders), name)
    return None
