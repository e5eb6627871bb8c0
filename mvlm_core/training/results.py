"""Results of a run: its test scores, and the record stored with the export."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mvlm_core.console import progress
from mvlm_core.data.corpus import Corpus, Document, named_texts
from mvlm_core.data.token_store import document_coverage
from mvlm_core.errors import UserError, printable
from mvlm_core.evaluation.bits_per_byte import Score, bits_per_byte_by_part, load_export, score_export, score_loaded
from mvlm_core.evaluation.memorization import extractable_memorization
from mvlm_core.export.folder import software_versions
from mvlm_core.metrics import BY_NAME, METRICS, PRIMARY_TEST_BPB
from mvlm_core.training.preparation import PreparedText
from mvlm_core.training.state import LoopState
from mvlm_core.training.task import Run

MAX_LISTED = 30  # titles, authors and licenses in the model card
log = logging.getLogger("mvlm")


def score_test(export: Path, run: Run, corpus: Corpus) -> Score:
    """Score the exported files on the test split; return an empty score with ``--no_test_score``."""
    if run.settings.no_test_score:
        return Score()
    total = sum(document.size for document in corpus.split("test"))
    with progress(total, "test score", "B", quiet=run.settings.quiet, unit_scale=True) as bar:
        return score_export(export, corpus, split="test", device=run.hardware.device, progress=bar.update)


def score_old(export: Path, run: Run, text: PreparedText) -> float | None:
    """Bits per byte of the exported files on the old corpus's test documents; None if not scored."""
    if run.settings.no_test_score or text.old is None or not text.old.test:
        return None
    return score_loaded(*load_export(export, run.hardware.device), named_texts(text.old.test)).bits_per_byte


def measure_memorization(
    run: Run, model: Any, tokenizer: Any, text: PreparedText, state: LoopState
) -> dict[str, Any] | None:
    """``extractable_memorization``; None with ``--no_test_score``, as for teachers, or if it cannot be measured.

    Only the model card shows it, so a failure must not cost the export of a finished run.
    """
    if run.settings.no_test_score:
        return None
    read = document_coverage(
        text.corpus.split("train"), text.store.repeats, text.batches.epoch_at(state.best_step or 0)
    )
    model.eval()
    try:
        return extractable_memorization(model, tokenizer, text.corpus, read)
    except (RuntimeError, UserError) as error:  # memory has run out, or a document has changed
        reason = str(error).partition("\n")[0]
        log.warning("memorization is left out of the model card (evaluate_models.py measures it, too): %s", reason)
        return None


def collect_metrics(model: Any, text: PreparedText, state: LoopState, score: Score) -> dict[str, Any]:
    """Collect the run's metrics (None where nothing can be measured) and supporting details."""
    corpus = text.corpus
    scored = [document for document in corpus.split("test") if document.path in score.documents]
    parts = bits_per_byte_by_part(score, scored)
    primary = score.part({document.path for document in corpus.primary_part("test")})
    values = vars(state) | {
        "parameters": model.num_parameters(),
        "tokens_per_second": state.tokens / state.step_seconds,
        "validation_bpb": state.best_bpb,
        "test_bpb": score.bits_per_byte if score.bytes else None,
        PRIMARY_TEST_BPB: primary.bits_per_byte if primary.bytes else None,
    }
    return {metric.name: values[metric.name] for metric in METRICS if metric.name in values} | {
        "steps": state.step,
        "best_step": state.best_step,
        "best_epoch": text.batches.epoch_at(state.best_step or 0),
        "test_bpb_by_book": parts.books,
        "test_bpb_by_translation": parts.translations,
        "micro_batch": state.micro_batch,
        "stopped_early": state.stopped_early,
        "fixed_steps": state.fixed_steps,
        "evaluations_since_best": state.evaluations_since_best,
        "skipped_steps": state.guard.skipped,
        "rollbacks": state.guard.rollbacks,
    }


def training_config_content(
    run: Run, text: PreparedText, identity: dict[str, Any], results: dict[str, Any]
) -> dict[str, Any]:
    """Content of ``training_config.json``: settings, data, tokenizer, hardware, software and results of the run."""
    base = text.base
    origin = {"init_from": {"manifest_sha256": base.sha256, "data": base.config["data"]}} if base else {}
    return {
        "model": run.recipe.name,
        "preset": run.settings.preset,
        "settings": asdict(run.settings),
        "identity": identity,
        "data": {
            "fingerprint": text.corpus.fingerprint,
            "data_dir": str(text.corpus.root),
            "only": text.only,
            "mix": text.mix,
            "train_documents": len(text.corpus.split("train")),
            "train_bytes": text.store.text_bytes,
        },
        "tokenizer": {"sha256": text.tokenizer.sha256, "vocab_size": text.tokenizer.vocab_size},
        "hardware": hardware_record(run),
        "software": software_versions(),
        "results": results,
    } | origin


def hardware_record(run: Run) -> dict[str, Any]:
    """Hardware of the run, on CUDA with the number of GPUs."""
    record = {name: getattr(run.hardware, name) for name in ("device", "name", "precision", "threads")}
    return record | ({"gpus": run.ranks.world_size} if run.hardware.device == "cuda" else {})


def describe_sources(corpus: Corpus) -> str:
    """Describe the training text for the model card: its translations, and other texts' titles and authors."""
    train = corpus.split("train")
    own = [document for document in train if not document.translation]
    credits = {document.translation: _credit(document) for document in train if document.translation}
    listed = {
        "Titles": [document.metadata.get("title") for document in own],
        "Authors": [document.metadata.get("author") for document in own],
        "Licenses as recorded in the corpus": [document.metadata.get("license") for document in train],
    }
    sentences = [f"{len(train)} documents, {sum(document.size for document in train) / 1e6:.1f} MB of text."]
    for label, values in listed.items():
        if names := _listed(values):
            sentences.append(f"{label}: {names}.")
    if credits:
        sentences.append("Translations:\n\n" + "\n".join(f"- {credits[name]}" for name in sorted(credits)))
    return " ".join(sentences)


def _credit(document: Document) -> str:
    """Name and author of a document's translation; its title is such as ``Genesis (King James Version)``."""
    title, author = (document.metadata.get(key) for key in ("title", "author"))
    name = str(title or "").removeprefix(f"{document.book} (").removesuffix(")")
    by = f", by {author}" if author else ""
    return printable(f"{document.translation}: {name}{by}" if name or by else str(document.translation), limit=200)


def _listed(values: list[Any]) -> str:
    names = sorted({printable(str(value), limit=200) for value in values if value})
    more = f"; and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return "; ".join(names[:MAX_LISTED]) + more


def licenses_of(text: PreparedText) -> str | None:
    """Licenses recorded for the training text, for the model card; None for the built corpus alone."""
    train = text.corpus.split("train")
    if text.base is None and text.corpus.primary_translation and all(document.translation for document in train):
        return None
    train += text.old.corpus.split("train") if text.old else []
    licenses = [document.metadata.get("license") or "not recorded" for document in train]
    return _listed([*licenses, *(["those of the model it was fine-tuned from"] if text.base else [])])


def describe_text(text: PreparedText) -> str:
    """Describe all text that the model was trained on, for the model card."""
    if text.base is None:
        return describe_sources(text.corpus)
    data, old = text.base.config["data"], "" if text.old is None else describe_sources(text.old.corpus)
    first = f"{data.get('train_documents')} documents, {data.get('train_bytes')} bytes of text."
    if text.old is not None and text.old.corpus.fingerprint == data.get("fingerprint"):
        first = old
    share = float(text.batches.replay_share)
    return (
        f"First trained on: {first}\n\nThen fine-tuned, from the export whose manifest has the SHA-256 "
        f"`{text.base.sha256}`, on: {describe_sources(text.corpus)}"
    ) + (f"\n\nReplay ({share:.3g} of the sequences) from: {old}" if share else "")


def log_scores(results: dict[str, Any], score: Score, corpus: Corpus) -> None:
    """Log the scores."""
    log.info("validation %.4f bits per byte at step %s", results["validation_bpb"], results["best_step"])
    if score.bytes:
        primary = results[PRIMARY_TEST_BPB]
        part = "" if primary is None else f", {corpus.primary_translation} alone {primary:.4f}"
        log.info("test %.4f bits per byte over %.2f MB%s", score.bits_per_byte, score.bytes / 1e6, part)
    for name in ("validation_bpb", "test_bpb", "old_test_bpb") if "old_test_bpb" in results else ():
        now, before = results[name], results[f"{name}_before"]
        change = "not measured" if None in (now, before) else f"{before:.4f} → {now:.4f} ({now / before - 1:+.1%})"
        log.info("fine-tuning, %s: %s", BY_NAME[name].title, change)
