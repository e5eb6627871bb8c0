"""``models/report.html``: a self-contained page about a run, rendered from ``report_template.html``.

Figures and scores come from the run's records; samples and traces are generated with one exported model at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mvlm_core.data.corpus import Corpus, load_corpus
from mvlm_core.data.verses import sample_verses, verses_of
from mvlm_core.errors import UserError
from mvlm_core.evaluation.results import DEFINITIONS
from mvlm_core.export.file_checks import check_export
from mvlm_core.export.manifest import corpus_choice, training_config
from mvlm_core.files import read_json, template, write_atomic
from mvlm_core.hardware import choose_hardware
from mvlm_core.pipeline.comparison import baseline_lines, evaluation_rows, metric_rows, score_metric
from mvlm_core.pipeline.plots import figures
from mvlm_core.run_layout import Layout, training_history
from mvlm_core.settings import DEFAULT_SAMPLING

TEMPLATE = Path(__file__).with_name("report_template.html")
CONTINUATION = 80  # tokens
SHAPE = {
    "hidden_dim": "width {}",
    "num_layers": "{} layers",
    "num_heads": "{} heads",
    "max_length": "{} tokens of context",
    "num_epochs": "at most {} epochs",
    "seed": "seed {}",
}


# --- samples and traces -------------------------------------------------------------------------------------


def draw_prompts(corpus: Corpus, seed: int) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Draw prompts (text, source, original continuation) and two held-out verses to trace (text, source).

    The prompts are the first words of the training text and the first halves of two other held-out verses.
    """
    held_out, train = (corpus.primary_part(split) or corpus.split(split) for split in ("test", "train"))
    verses = sample_verses((v for v in verses_of(held_out) if 12 <= len(v.text.split()) <= 30), 4, seed)
    prompts = [(" ".join(train[0].read().split(maxsplit=3)[:3]), "the first words of the training text", "")]
    for verse in verses[:2]:
        words = verse.text.split(" ")
        half = len(words) // 2
        prompts.append((" ".join(words[:half]), f"{verse.reference}, held out", " ".join(words[half:])))
    return prompts, [(verse.text, f"{verse.reference}, held out") for verse in verses[2:]]


def samples_and_traces(
    exports: dict[str, Path], corpus: Corpus, *, device: str, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Generate samples and governance traces with the models.

    ``samples``: each prompt, its source, its original continuation (or ""), and each model's continuation.
    ``traces``: for each text, field → meaning and a value per token.
    """
    import torch

    from mvlm_core.evaluation.bits_per_byte import context_of, load_export
    from mvlm_core.evaluation.generation import continuations, prompt_ids

    prompts, traced = draw_prompts(corpus, seed)
    samples: list[dict[str, Any]] = [
        {"prompt": prompt, "source": source, "original": original, "written": {}}
        for prompt, source, original in prompts
    ]
    traces: list[dict[str, Any]] = []
    for name, folder in exports.items():
        model, tokenizer = load_export(folder, device)
        room = context_of(model)
        length = min(CONTINUATION, room // 2)
        ids = [prompt_ids(tokenizer, prompt, room - length) for prompt, _, _ in prompts]
        texts = continuations(model, tokenizer, ids, [length] * len(ids), sample=DEFAULT_SAMPLING, seed=seed)
        for sample, text in zip(samples, texts, strict=True):
            sample["written"][name] = text
        for text, source in traced if getattr(model, "trace_fields", None) else ():
            tokens = prompt_ids(tokenizer, text, room)
            by_field = model.token_traces(torch.tensor([tokens], device=model.device))
            fields = {field: (meaning, values[1:]) for field, (meaning, values) in by_field.items()}
            texts = [tokenizer.decode([token]) for token in tokens[1:]]  # without the start token
            traces.append({"model": name, "source": source, "tokens": texts, "fields": fields})
    return {"samples": samples, "traces": traces}


# --- the page -----------------------------------------------------------------------------------------------


def facts(summary: dict[str, Any], configs: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Facts about the run, as (title, text): preset, device, model shapes, training text."""
    lines = [(key, str(summary.get(key))) for key in ("preset", "device", "started", "finished") if summary.get(key)]
    texts: dict[str, list[str]] = {}
    for name, config in configs.items():
        data, settings = config.get("data", {}), config.get("settings", {})
        shape = [form.format(settings[key]) for key, form in SHAPE.items() if settings.get(key) is not None]
        lines.append((name, ", ".join(shape)))
        if "train_bytes" in data:
            text = f"{data['train_bytes'] / 1e6:.1f} MB in {data.get('train_documents')} documents"
            texts.setdefault(f"{text}, {data.get('only') or 'the whole corpus'}", []).append(name)
    for text, names in texts.items():
        lines.append((f"training text of {' and '.join(names)}" if len(texts) > 1 else "training text", text))
    return lines


def make_report(layout: Layout, data_dir: str, sources: Path, *, device: str, seed: int) -> Path:
    """Write the report of the run in ``layout``; return its path.

    Args:
        sources: the folder with the repository's own modeling files, the only code that is run.
    """
    summary, validation = read_json(layout.summary), read_json(layout.validation_report)
    models: dict[str, dict[str, Any]] = summary.get("models", {})
    errors = {name: error for name, entry in models.items() if (error := entry.get("error"))}
    failures = [f"{name}: {error}" for name, error in errors.items() if not str(error).startswith("validation: ")]
    failures += validation.get("failed", [])
    exports = {}
    for name in [name for name, entry in models.items() if entry.get("status") == "finished"]:
        try:
            check_export(layout.export(name), sources)
            exports[name] = layout.export(name)
        except UserError as error:
            failures += error.problems
    generated: dict[str, Any] = {"samples": [], "traces": []}
    if exports:
        hardware = choose_hardware(device=device)
        hardware.apply()
        corpus = load_corpus(data_dir, **corpus_choice(next(iter(exports.values()))))
        generated = samples_and_traces(exports, corpus, device=hardware.device, seed=seed)
    comparison = summary.get("comparison") or {}
    names = [name for name in comparison.get("test_bpb", {}) if name in models]
    configs = {name: training_config(layout.export(name)) for name in models}
    score = score_metric(comparison, names)
    histories = {name: training_history(layout.export(name)) for name in names or models}
    page = template(TEMPLATE).render(
        facts=facts(summary, {name: config for name, config in configs.items() if config}),
        names=names,
        sentences=comparison.get("sentences", []),
        score=score,
        scores=comparison.get(score.name),
        metrics=metric_rows(comparison, names) if comparison else [],
        baselines=baseline_lines(comparison),
        suite=evaluation_rows(comparison, names),
        definitions=DEFINITIONS,
        notes=read_json(layout.evaluation_suite).get("notes", []),
        sampling=DEFAULT_SAMPLING,
        figures=figures(histories, comparison.get("test_bpb_by_book", {})),
        failures=failures,
        checked=sum(len(model.get("checks", [])) for model in validation.get("models", {}).values()),
        **generated,
    )
    write_atomic(layout.report, page)
    return layout.report
