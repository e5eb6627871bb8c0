"""``models/report.html``: a run on one page that needs no network, from one template (``report_template.html``).

Figures and scores come from the run's own records; samples and traces come from the exported models, one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm_core.data.corpus import Corpus, load_corpus
from mvlm_core.data.verses import sample_verses, verses_of
from mvlm_core.errors import UserError
from mvlm_core.export.file_checks import check_export
from mvlm_core.export.manifest import corpus_choice, training_config
from mvlm_core.files import read_json, write_atomic
from mvlm_core.hardware import choose_hardware
from mvlm_core.pipeline.comparison import baseline_lines, evaluation_rows, metric_rows
from mvlm_core.pipeline.plots import figures
from mvlm_core.run_layout import Layout, training_history
from mvlm_core.settings import READABLE

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


@dataclass(frozen=True)
class Sample:
    """A prompt, where it is from, how the text itself continues (or ""), and each model's continuation by its name."""

    prompt: str
    source: str
    original: str
    written: dict[str, str]


@dataclass(frozen=True)
class Trace:
    """What a model's heads did while it read a text: by field, its meaning and a value for each token."""

    model: str
    source: str
    tokens: list[str]
    fields: dict[str, tuple[str, list[float]]]


# --- asked of the models ------------------------------------------------------------------------------------


def draw_prompts(corpus: Corpus, seed: int) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Prompts (text, source, original continuation): the first words of the train text and the first halves of two
    held-out verses; and two more held-out verses to trace (text, source)."""
    held_out, train = (corpus.primary_part(split) or corpus.split(split) for split in ("test", "train"))
    verses = sample_verses((v for v in verses_of(held_out) if 12 <= len(v.text.split()) <= 30), 4, seed)
    prompts = [(" ".join(train[0].read().split(maxsplit=3)[:3]), "the first words of the training text", "")]
    for verse in verses[:2]:
        words = verse.text.split(" ")
        half = len(words) // 2
        prompts.append((" ".join(words[:half]), f"{verse.place}, held out", " ".join(words[half:])))
    return prompts, [(verse.text, f"{verse.place}, held out") for verse in verses[2:]]


def ask(exports: dict[str, Path], corpus: Corpus, *, device: str, seed: int) -> tuple[list[Sample], list[Trace]]:
    """Continuations of the same prompts by every model, and traces by those that report them."""
    from mvlm_core.evaluation.bits_per_byte import context_of, load_export
    from mvlm_core.evaluation.generation import continuations, prompt_ids

    prompts, traced = draw_prompts(corpus, seed)
    written: dict[str, list[str]] = {}
    traces: list[Trace] = []
    for name, folder in exports.items():
        model, tokenizer = load_export(folder, device)
        room = context_of(model)
        length = min(CONTINUATION, room // 2)
        ids = [prompt_ids(tokenizer, prompt, room - length) for prompt, _, _ in prompts]
        written[name] = continuations(model, tokenizer, ids, [length] * len(ids), sample=READABLE, seed=seed)
        if getattr(model, "trace_fields", None):
            for text, source in traced:
                tokens = prompt_ids(tokenizer, text, room)
                shown = [tokenizer.decode([token]) for token in tokens[1:]]  # without the start token
                traces.append(Trace(name, source, shown, _trace(model, tokens)))
    samples = [
        Sample(prompt, source, original, {name: texts[number] for name, texts in written.items()})
        for number, (prompt, source, original) in enumerate(prompts)
    ]
    return samples, traces


def _trace(model: Any, tokens: list[int]) -> dict[str, tuple[str, list[float]]]:
    """Meaning and values of each field of the trace, for every token but the first."""
    import torch

    found = model.token_traces(torch.tensor([tokens], device=model.device))
    return {name: (meaning, values[1:]) for name, (meaning, values) in found.items()}


def heat(values: list[float]) -> list[float]:
    """Each value's place between the least and the most, 0 to 1; 0 where all are equal."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


# --- put together -------------------------------------------------------------------------------------------


def facts(summary: dict[str, Any], configs: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """What was trained on what: each line's title and text."""
    found = [(key, str(summary.get(key))) for key in ("preset", "device", "started", "finished") if summary.get(key)]
    texts: dict[str, list[str]] = {}
    for name, config in configs.items():
        data, settings = config.get("data", {}), config.get("settings", {})
        shape = [form.format(settings[key]) for key, form in SHAPE.items() if settings.get(key) is not None]
        found.append((name, ", ".join(shape)))
        if "train_bytes" in data:
            text = f"{data['train_bytes'] / 1e6:.1f} MB in {data.get('train_documents')} documents"
            texts.setdefault(f"{text}, {data.get('only') or 'the whole corpus'}", []).append(name)
    for text, names in texts.items():
        found.append((f"training text of {' and '.join(names)}" if len(texts) > 1 else "training text", text))
    return found


def make_report(layout: Layout, data_dir: str, sources: Path, *, device: str, seed: int) -> Path:
    """Write the page of the run in ``layout``; returns its path.

    Args:
        sources: the folder of the modelling files, the only code that an export may hold.
    """
    exports, problems = {}, []
    for name, entry in read_json(layout.summary).get("models", {}).items():
        if entry.get("status") == "finished":
            try:
                check_export(layout.export(name), sources)
                exports[name] = layout.export(name)
            except UserError as error:
                problems += error.problems
    if not exports:
        return write_report(layout, [], [], problems)
    hardware = choose_hardware(device=device)
    hardware.apply()
    corpus = load_corpus(data_dir, **corpus_choice(next(iter(exports.values()))))
    samples, traces = ask(exports, corpus, device=hardware.device, seed=seed)
    return write_report(layout, samples, traces, problems)


def write_report(layout: Layout, samples: list[Sample], traces: list[Trace], problems: list[str]) -> Path:
    """Fill the template from the records in ``layout``; returns the page's path.

    Args:
        problems: why a model could not be asked, a sentence each; shown with what failed in the run.
    """
    from jinja2 import Environment, StrictUndefined

    summary, validation = read_json(layout.summary), read_json(layout.report)
    models = {name: entry for name, entry in summary.get("models", {}).items() if isinstance(entry, dict)}
    comparison = summary.get("comparison") or {}
    names = [name for name, value in comparison.get("test_bpb", {}).items() if name in models]
    configs = {name: training_config(layout.export(name)) for name in models}
    failures = [f"{name}: {entry['error']}" for name, entry in models.items() if entry.get("error")]
    histories = {name: training_history(layout.export(name)) for name in names or models}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["heat"] = heat
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts(summary, {name: config for name, config in configs.items() if config}),
        names=names,
        sentences=comparison.get("sentences", []),
        metrics=metric_rows(comparison, names) if comparison else [],
        baselines=baseline_lines(comparison),
        suite=evaluation_rows(comparison, names),
        figures=figures(histories, comparison.get("test_bpb_by_book", {})),
        samples=samples,
        traces=traces,
        failures=[*failures, *validation.get("failed", []), *problems],
        checked=sum(len(model.get("checks", [])) for model in validation.get("models", {}).values()),
    )
    write_atomic(layout.page, page)
    return layout.page
