"""What both trainers do, in order: corpus → tokenizer → token files → training loop → export → test scores."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mvlm_core.console import hush_transformers, progress
from mvlm_core.data.batches import BatchSource
from mvlm_core.data.corpus import Corpus, load_corpus, validation_subset
from mvlm_core.data.token_store import TokenStore, build_token_store, parse_mix, texts
from mvlm_core.data.tokenizer import ByteLevelBPE, cached_tokenizer
from mvlm_core.errors import TrainingFailed, UserError
from mvlm_core.evaluation.bits_per_byte import (
    Score,
    bits_per_byte,
    bits_per_byte_by_part,
    score_documents,
    score_export,
)
from mvlm_core.evaluation.memorization import extractable_memorization
from mvlm_core.export.folder import finish_export, remove_export, software_versions, stage_model
from mvlm_core.export.manifest import training_config, verify_folder
from mvlm_core.export.model_card import model_card
from mvlm_core.files import RunLock
from mvlm_core.hardware import Hardware, choose_hardware, describe
from mvlm_core.monitor import peak_memory
from mvlm_core.settings import TrainingSettings
from mvlm_core.signals import StopRequest
from mvlm_core.training.checkpoint import DamagedCheckpoint, open_checkpoint
from mvlm_core.training.cost import describe_cost
from mvlm_core.training.cpu_workers import fork
from mvlm_core.training.distributed import ALONE, Ranks, join
from mvlm_core.training.ema import WeightAverage
from mvlm_core.training.history import HISTORY_NAME, read_history
from mvlm_core.training.loop import TrainingLoop
from mvlm_core.training.optimizer import Optimizers
from mvlm_core.training.state import LoopState, TrainingTask, identity_differences, total_steps
from mvlm_core.training.tensorboard import EVENTS_NAME, EventFiles

log = logging.getLogger("mvlm")


@dataclass(frozen=True)
class BuiltModel:
    """A fresh model with all that trains it.

    Attributes:
        model: a transformers causal language model.
        modules: as in ``TrainingTask``; holds the model as "model".
        loss: as in ``TrainingTask``.
    """

    model: Any
    modules: dict[str, Any]
    loss: Callable[..., Any]
    optimizers: Optimizers


@dataclass(frozen=True)
class Recipe:
    """The part of a run that belongs to one model.

    Attributes:
        name: of the export folder and the archive.
        build: (settings, tokenizer, hardware) → the model with fresh weights; random numbers are already seeded.
    """

    name: str
    title: str
    description: str
    remote_code: bool
    tokenizer_class: type[ByteLevelBPE]
    build: Callable[[Any, ByteLevelBPE, Hardware], BuiltModel]


@dataclass(frozen=True)
class PreparedText:
    """Corpus (all of a folder, or the part ``only`` of it), tokenizer and tokens of a run."""

    corpus: Corpus
    only: str | None
    tokenizer: ByteLevelBPE
    store: TokenStore


def fitting(settings: TrainingSettings, name: str) -> str | None:
    """``data_subset`` or ``train_mix`` as set; a preset's own value only where the data folder has what it names."""
    value = getattr(settings, name)
    if value is None or value != settings.preset_values(settings.preset).get(name):
        return value
    folders = [value] if name == "data_subset" else parse_mix(value)
    if all((Path(settings.data_dir) / folder).is_dir() for folder in folders):
        return value
    log.info("%s has no %s: the preset's --%s does not apply", settings.data_dir, ", ".join(folders), name)
    return None


def _corpus(settings: TrainingSettings, only: str | None) -> Corpus:
    split, folder = settings.validation_split, settings.validation_dir
    return load_corpus(settings.data_dir, validation_split=split, validation_dir=folder, only=only)


def prepare_text(settings: TrainingSettings, tokenizer_class: type[ByteLevelBPE]) -> PreparedText:
    """Read the corpus and bring its train text to tokens (both from the cache where nothing changed).

    Raises:
        UserError: no corpus, no usable text, a tokenizer that cannot be read.
    """
    only = fitting(settings, "data_subset")
    corpus = _corpus(settings, only)
    train = corpus.split("train")
    log.info(
        "corpus %s: %s documents, %.1f MB to train on",
        corpus.root,
        len(corpus.documents),
        sum(d.size for d in train) / 1e6,
    )
    for skipped in corpus.skipped[:20]:
        log.warning("left out %s: %s", skipped.path, skipped.reason)
    if len(corpus.skipped) > 20:
        log.warning("left out %s more files", len(corpus.skipped) - 20)
    if settings.tokenizer_path:
        tokenizer = tokenizer_class.load(settings.tokenizer_path)
    else:
        pieces = (text for group in texts(train) for text in group)
        tokenizer = cached_tokenizer(
            tokenizer_class, pieces, corpus.fingerprint, settings.vocab_size, settings.cache_dir, quiet=settings.quiet
        )
    mix = fitting(settings, "train_mix")
    store = build_token_store(corpus, tokenizer, settings.cache_dir, mix=mix, quiet=settings.quiet)
    log.info("%s tokens to train on, %.2f bytes each", f"{len(store.tokens):,}", store.bytes_per_token)
    return PreparedText(corpus, only, tokenizer, store)


def run_training(recipe: Recipe, settings: TrainingSettings) -> Path:
    """Train, export and score one model; returns the export folder. A dry run prints what that would take instead.

    Raises:
        UserError: bad settings or input. Nothing has been written to the output folder then.
        Stopped: a signal; the same call goes on from the checkpoint.
        TrainingFailed: the run cannot go on.
    """
    settings.check()
    output_dir = Path(settings.output_dir)
    hardware = choose_hardware(
        device=settings.device,
        precision=settings.precision,
        attention_backend=settings.attention_backend,
        no_mixed_precision=settings.no_mixed_precision,
        no_compile=settings.no_compile,
    )
    hush_transformers()
    if settings.dry_run:
        corpus = _corpus(settings, fitting(settings, "data_subset"))
        train_bytes = sum(document.size for document in corpus.split("train"))
        for line in describe_cost(recipe.build, settings, hardware, train_bytes):
            print(line)
        return output_dir
    hardware.apply()
    ranks = _start_ranks(settings, hardware)
    try:
        return _run(recipe, settings, hardware, ranks)
    finally:
        ranks.end()


def _start_ranks(settings: TrainingSettings, hardware: Hardware) -> Ranks:
    if settings.processes == 1:
        return join(hardware.device)
    if hardware.device != "cpu" or "WORLD_SIZE" in os.environ:
        raise UserError(
            f"--processes {settings.processes} is for the cores of a processor, without torchrun; for several GPUs: "
            "torchrun --nproc_per_node, without --processes"
        )
    return fork(settings.processes)


def _run(recipe: Recipe, settings: TrainingSettings, hardware: Hardware, ranks: Ranks) -> Path:
    """``run_training`` as one of its ranks."""
    output_dir = Path(settings.output_dir)
    if not ranks.is_main:
        log.setLevel(logging.ERROR)
    for line in describe(hardware):
        log.info(line)
    if ranks.world > 1:
        log.info("processes: %s, each on its part of every batch", ranks.world)
    text = _prepare_together(settings, recipe.tokenizer_class, ranks)
    batches = batch_source(settings, text)
    if batches.sequences < ranks.world:
        raise UserError(
            f"{ranks.world} processes share a batch of {batches.sequences} sequences: start fewer, or raise "
            "--batch_size or --gradient_accumulation_steps"
        )
    steps = total_steps(settings, batches)
    identity = run_identity(settings, text)
    stop = StopRequest()
    with RunLock(output_dir, str(output_dir)) if ranks.is_main else nullcontext():
        if ranks.is_main and settings.fresh:
            _clear(output_dir)
        if ranks.share(ranks.is_main and not settings.fresh and _is_finished(output_dir, identity, steps)):
            log.info("already finished: %s (use --fresh to train it again)", output_dir)
            return output_dir
        stop.raise_at_once()
        built, task = build_task(recipe, settings, hardware, text, batches, identity, ranks)
        events = EventFiles(output_dir / EVENTS_NAME) if settings.tensorboard and ranks.is_main else None
        loop = TrainingLoop(task, settings, hardware, output_dir, steps, ranks, events and events.add)
        log.info(
            "%s: %s parameters, %s steps of %s sequences of %s tokens (%.2f epochs)",
            recipe.title,
            f"{built.model.num_parameters():,}",
            f"{steps:,}",
            settings.sequences_per_step,
            settings.max_length,
            batches.epoch_at(steps),
        )
        state = loop.run(stop)
        (peak,) = ranks.sum_numbers(peak_memory(hardware.device))
        ranks.leave()
        stop.raise_at_once()
        if ranks.is_main:
            try:
                _export(recipe, settings, hardware, text, built, task, state, int(peak), output_dir)
            except (OSError, SafetensorError) as error:
                raise TrainingFailed(
                    f"the model is trained, but its export cannot be written: {error}; free some space and run again"
                ) from None
    return output_dir


def _prepare_together(settings: TrainingSettings, tokenizer_class: type[ByteLevelBPE], ranks: Ranks) -> PreparedText:
    """``prepare_text`` on every rank: the first of each machine fills the cache, the others read it."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if first:
        text = prepare_text(settings, tokenizer_class)
    ranks.wait()
    if not first:
        text = prepare_text(settings, tokenizer_class)
    return text


def batch_source(settings: TrainingSettings, text: PreparedText) -> BatchSource:
    """The run's batches."""
    return BatchSource(
        text.store,
        context=settings.max_length,
        sequences=settings.sequences_per_step,
        seed=settings.seed,
        unigram_noise=settings.unigram_noise,
    )


def build_task(
    recipe: Recipe,
    settings: TrainingSettings,
    hardware: Hardware,
    text: PreparedText,
    batches: BatchSource,
    identity: dict[str, Any],
    ranks: Ranks = ALONE,
) -> tuple[BuiltModel, TrainingTask]:
    """The model with fresh weights, and the task that trains it."""
    import torch

    torch.manual_seed(settings.seed)
    built = recipe.build(settings, text.tokenizer, hardware)
    built.optimizers.spread_over(ranks)
    for module in built.modules.values():
        module.train()
    validation = [(document.path, part) for document, part in validation_subset(text.corpus)]
    validation = validation[ranks.rank :: ranks.world]

    def evaluate() -> float:
        score = score_documents(
            built.model,
            text.tokenizer.encode,
            validation,
            start_id=text.tokenizer.start_id,
            context=settings.max_length,
            device=hardware.device,
        )
        return bits_per_byte(*ranks.sum_numbers(score.nats, score.bytes))

    average = WeightAverage(built.model, settings.ema_decay) if settings.ema_decay else None
    return built, TrainingTask(built.modules, built.loss, built.optimizers, batches, evaluate, identity, average)


def run_identity(settings: TrainingSettings, text: PreparedText) -> dict[str, Any]:
    """What makes this run this run; a checkpoint of another is refused with the list of differences."""
    preset = {"--preset": settings.preset}
    flags = {f"--{name}": value for name, value in settings.identity().items()}
    return preset | flags | {"corpus": text.corpus.fingerprint, "tokenizer": text.tokenizer.sha256}


def _is_finished(output_dir: Path, identity: dict[str, Any], steps: int) -> bool:
    """Whether a whole export of this run is there already.

    Raises:
        UserError: one of another run is.
    """
    config = training_config(output_dir, "identity", "results")
    if not config:
        return False
    differences = identity_differences(config.get("identity", {}), identity)
    if differences:
        raise UserError(
            [f"{output_dir} holds a finished model of another run: {difference}" for difference in differences]
            + ["choose another --output_dir, or train it anew with --fresh"]
        )
    results = config.get("results", {})
    enough = results.get("stopped_early") or results.get("steps", 0) >= steps
    return bool(enough) and not verify_folder(output_dir)


def _clear(output_dir: Path) -> None:
    """Delete what an earlier run left in the folder, and nothing else."""
    remove_export(output_dir)
    for folder in ("checkpoints", EVENTS_NAME):
        shutil.rmtree(output_dir / folder, ignore_errors=True)
    (output_dir / HISTORY_NAME).unlink(missing_ok=True)


def _export(
    recipe: Recipe,
    settings: TrainingSettings,
    hardware: Hardware,
    text: PreparedText,
    built: BuiltModel,
    task: TrainingTask,
    state: LoopState,
    peak_memory_bytes: int,
    output_dir: Path,
) -> None:
    """Export the best weights by validation and score them on the test text, from the exported files."""
    _load_best(task, state, output_dir)
    history = read_history(output_dir / HISTORY_NAME)
    tokenizer = text.tokenizer.for_transformers(settings.max_length)
    staging = stage_model(built.model, tokenizer, history, recipe.title, output_dir)
    score = Score() if settings.no_test_score else _score_test(staging, text.corpus, hardware, settings.quiet)
    scored = [document for document in text.corpus.split("test") if document.path in score.documents]
    parts = bits_per_byte_by_part(score, scored)
    kjv = parts.translations.get("kjv")
    built.model.eval()
    results = {
        "parameters": built.model.num_parameters(),
        "steps": state.step,
        "tokens": state.tokens,
        "bytes": state.bytes,
        "seconds": state.seconds,
        "tokens_per_second": state.tokens / state.seconds,
        "validation_bpb": state.best_bpb,
        "best_step": state.best_step,
        "test_bpb": score.bits_per_byte if score.bytes else None,
        "test_bpb_kjv": kjv,
        "test_bpb_by_book": parts.books,
        "test_bpb_by_translation": parts.translations,
        "memorization": extractable_memorization(built.model, tokenizer, text.corpus),
        "peak_memory_bytes": peak_memory_bytes,
        "micro_batch": state.micro_batch,
        "stopped_early": state.stopped_early,
        "skipped_steps": state.guard.skipped,
        "rollbacks": state.guard.rollbacks,
    }
    config = {
        "model": recipe.name,
        "preset": settings.preset,
        "settings": settings.as_dict(),
        "identity": task.identity,
        "data": {
            "fingerprint": text.corpus.fingerprint,
            "data_dir": str(text.corpus.root),
            "only": text.only,
            "train_documents": len(text.corpus.split("train")),
            "train_bytes": text.store.text_bytes,
        },
        "tokenizer": {"sha256": text.tokenizer.sha256, "vocab_size": text.tokenizer.vocab_size},
        "hardware": {
            "device": hardware.device,
            "name": hardware.name,
            "precision": hardware.precision,
            "threads": hardware.threads,
        },
        "software": software_versions(),
        "results": results,
    }
    sources = _describe_sources(text.corpus)
    card = model_card(
        config, title=recipe.title, description=recipe.description, sources=sources, remote_code=recipe.remote_code
    )
    finish_export(staging, config, card, output_dir)
    log.info("validation %.4f bits per byte at step %s", state.best_bpb, state.best_step)
    if score.bytes:
        beside = f", King James Version {kjv:.4f}" if kjv else ""
        log.info("test %.4f bits per byte over %.2f MB%s", score.bits_per_byte, score.bytes / 1e6, beside)
    log.info("exported to %s", output_dir)


def _load_best(task: TrainingTask, state: LoopState, output_dir: Path) -> None:
    """Put the best weights by validation into the model, averaged where the run averages; the last ones stay in the
    newest checkpoint."""
    if state.best_step is not None and state.best_step != state.step:
        folder = output_dir / "checkpoints" / f"step-{state.best_step:08d}"
        try:
            best = open_checkpoint(folder)
            if task.average is None:
                task.load_weights(best.tensors("model"))
            else:
                task.average.load(best.tensors("average"))
        except DamagedCheckpoint as damage:
            raise UserError(f"the best checkpoint is damaged: {damage}; run again with --fresh") from None
    if task.average is not None:
        task.average.put_in_module()


def _score_test(export: Path, corpus: Corpus, hardware: Hardware, quiet: bool) -> Score:
    total = sum(document.size for document in corpus.split("test"))
    with progress(total, "test score", "B", quiet=quiet, unit_scale=True) as bar:
        return score_export(export, corpus, split="test", device=hardware.device, progress=bar.update)


def _describe_sources(corpus: Corpus) -> str:
    train = corpus.split("train")
    translations = sorted({document.translation for document in train if document.translation})
    sentence = f"{len(train)} documents, {sum(document.size for document in train) / 1e6:.1f} MB of English text."
    if not translations:
        return sentence
    licenses = sorted({str(d.metadata.get("license")) for d in train if d.metadata.get("license")})
    listed = f" Licences as the corpus names them: {'; '.join(licenses)}." if licenses else ""
    return f"{sentence} Bible translations: {', '.join(translations)}.{listed}"
