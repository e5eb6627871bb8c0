"""``models/report.html``: a run on one page that needs no network, from one template (``report_template.html``).

What it shows comes from the run's own records; what the models write and what their heads did while reading is asked
of the exports, a model at a time.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm_core.data.corpus import Corpus
from mvlm_core.files import read_json, write_atomic
from mvlm_core.pipeline.comparison import STYLES, anchor_lines, probe_cells, rows
from mvlm_core.run_layout import Layout, training_config, training_history

TEMPLATE = Path(__file__).with_name("report_template.html")
# Okabe and Ito's, for lines of one model: apart for every kind of colour vision.
PART_STYLES = (("#0072B2", "-"), ("#E69F00", "--"), ("#009E73", ":"), ("#CC79A7", "-."))
CONTINUATION = 80  # tokens
POINTS = 400  # of a curve: more than a page has pixels for
SHAPE_WORDS = {
    "hidden_dim": "wide",
    "num_layers": "layers",
    "num_heads": "heads",
    "max_length": "tokens of context",
    "num_epochs": "epochs at most",
    "seed": "as seed",
}
TRACE_WORDS = {
    "policy": "how much of what attention read is let through (0 to 2)",
    "memory": "share of the first layer's values in the later layers' (0 to 1)",
    "entropy": "how widely attention is spread, in nats",
    "distance": "how far back attention looks, in tokens",
}


@dataclass(frozen=True)
class Sample:
    """A prompt, what the text itself goes on with (where it is of one), and each model's continuation by its name."""

    prompt: str
    source: str
    original: str
    written: dict[str, str]


@dataclass(frozen=True)
class Trace:
    """What the heads did while a model read a verse: by field, a value for each of the tokens."""

    model: str
    source: str
    tokens: list[str]
    fields: dict[str, list[float]]


# --- asked of the models ------------------------------------------------------------------------------------


def ask(exports: dict[str, Path], corpus: Corpus, *, device: str, seed: int) -> tuple[list[Sample], list[Trace]]:
    """Continuations of the same prompts by all models, and traces of two held-out verses by those that report them."""
    from mvlm_core.data.verses import sample_verses, verses_of
    from mvlm_core.evaluation.bits_per_byte import context_of, load_export
    from mvlm_core.evaluation.generation import continuations, prompt_ids

    held_out = [d for d in corpus.split("test") if d.translation in ("kjv", None)] or corpus.split("test")
    verses = sample_verses((v for v in verses_of(held_out) if 12 <= len(v.text.split()) <= 30), 4, seed)
    prompts = [("In the beginning", "a well-known beginning", "")]
    for verse in verses[:2]:
        said = verse.text.split(" ")
        half, rest = " ".join(said[: len(said) // 2]), " ".join(said[len(said) // 2 :])
        prompts.append((half, f"{verse.place}, held out", rest))
    written: dict[str, list[str]] = {}
    traces: list[Trace] = []
    for name, folder in exports.items():
        model, tokenizer = load_export(folder, device)
        room = context_of(model)
        length = min(CONTINUATION, room // 2)
        ids = [prompt_ids(tokenizer, prompt, room - length) for prompt, _, _ in prompts]
        written[name] = continuations(model, tokenizer, ids, [length] * len(ids), sample=True, seed=seed)
        if getattr(model.config, "trace_head", False):
            for verse in verses[2:]:
                tokens = prompt_ids(tokenizer, verse.text, room)
                shown = [tokenizer.decode([token]) for token in tokens[1:]]  # without the start token
                traces.append(Trace(name, f"{verse.place}, held out", shown, _fields(model, tokens)))
    samples = [
        Sample(prompt, source, original, {name: texts[number] for name, texts in written.items()})
        for number, (prompt, source, original) in enumerate(prompts)
    ]
    return samples, traces


def _fields(model: Any, tokens: list[int]) -> dict[str, list[float]]:
    """Means over layers and heads of each field of the trace, for every token but the first."""
    import torch

    with torch.inference_mode():
        output = model(torch.tensor([tokens], device=model.device), output_traces=True, use_cache=False)
    means = torch.stack(output.traces).float().mean(dim=(0, 3))[0, 1:]
    return dict(zip(TRACE_WORDS, means.T.tolist(), strict=True))


# --- drawn --------------------------------------------------------------------------------------------------


def _figure(draw: Callable[[Any], None], *, height: float = 3.0) -> str:
    """A picture as a data URL that scales without loss; ``draw`` gets the axes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, height), layout="constrained")
    FigureCanvasSVG(figure)
    draw(figure.subplots())
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):  # the same run gives the same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about ``POINTS`` of them, the last one always."""
    step = -(-len(points) // POINTS)
    return points[::-1][::step][::-1] if step > 1 else points


def curves(
    histories: dict[str, list[dict[str, Any]]], keys: Iterable[str], x: str, unit: float, x_words: str, y_words: str
) -> str | None:
    """Figures of the history against text or seconds: a colour and a kind of line for each model, or for each key
    where there are several; None where no record has any."""
    keys = list(keys)
    lines = []
    for style, (name, history) in zip(STYLES, histories.items(), strict=False):
        for number, key in enumerate(keys):
            points = _thinned([(record[x] / unit, record[key]) for record in history if key in record])
            if points:
                color, line = PART_STYLES[number % 4] if len(keys) > 1 else (style["color"], style["linestyle"])
                look = {"color": color, "linestyle": line}
                look |= {"marker": style["marker"], "markersize": 4} if len(points) < 60 else {}
                lines.append((points, name if len(keys) == 1 else key.replace("_", " "), look))
    if not lines:
        return None

    def draw(axes: Any) -> None:
        for points, label, look in lines:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.3, **look)
        axes.set(xlabel=x_words, ylabel=y_words)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)

    return _figure(draw)


def book_bars(by_book: dict[str, dict[str, float]]) -> str | None:
    """Test bits per byte by book, a bar for each model; None where there are none."""
    books = list(next(iter(by_book.values()), {}))
    if not books:
        return None

    def draw(axes: Any) -> None:
        width = 0.8 / len(by_book)
        for number, (style, (name, scores)) in enumerate(zip(STYLES, by_book.items(), strict=False)):
            places = [place + number * width for place in range(len(books))]
            values = [scores.get(book, 0.0) for book in books]
            bars = axes.barh(
                places, values, width, label=name, color=style["color"], hatch=style["hatch"], edgecolor="black"
            )
            axes.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
        axes.set_yticks([place + width * (len(by_book) - 1) / 2 for place in range(len(books))], books)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("test, bits per byte (lower is better)")
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2, frameon=False)

    return _figure(draw, height=1.0 + 0.5 * len(books))


def pictures(histories: dict[str, list[dict[str, Any]]], by_book: dict[str, dict[str, float]]) -> list[dict[str, str]]:
    """Title and data URL of each picture there is something for."""
    text, seconds = ("bytes", 1e6, "training text read, MB"), ("seconds", 1.0, "seconds of training")
    wanted = [
        ("Validation by text", curves(histories, ["validation_bpb"], *text, "bits per byte")),
        ("Validation by time", curves(histories, ["validation_bpb"], *seconds, "bits per byte")),
        ("Test scores by book", book_bars(by_book)),
        ("Training loss", curves(histories, ["train_loss"], *text, "nats a token")),
        ("Learning rate", curves(histories, ["learning_rate"], *text, "learning rate")),
        ("Gradient norm", curves(histories, ["grad_norm"], *text, "norm")),
    ]
    for name, history in histories.items():
        parts = sorted({key for record in history for key in record if "_loss" in key} - {"train_loss"})
        wanted.append((f"Parts of the loss, {name}", curves({name: history}, parts, *text, "nats a token")))
    return [{"title": title, "url": url} for title, url in wanted if url]


def heat(values: list[float]) -> list[float]:
    """Each value's place between the least and the most, 0 to 1; 0 where all are alike."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


# --- put together -------------------------------------------------------------------------------------------


def facts(summary: dict[str, Any], configs: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """What was trained on what, in a few lines."""
    found = [(key, str(summary.get(key))) for key in ("preset", "device", "started", "finished") if summary.get(key)]
    texts: dict[str, list[str]] = {}
    for name, config in configs.items():
        data, settings = config.get("data", {}), config.get("settings", {})
        shape = [f"{settings[key]} {words}" for key, words in SHAPE_WORDS.items() if settings.get(key) is not None]
        found.append((name, ", ".join(shape)))
        if "train_bytes" in data:
            text = f"{data['train_bytes'] / 1e6:.1f} MB in {data.get('train_documents')} documents"
            texts.setdefault(f"{text}, {data.get('only') or 'the whole corpus'}", []).append(name)
    return found + [(f"text of {' and '.join(of)}" if len(texts) > 1 else "text", text) for text, of in texts.items()]


def write_report(layout: Layout, samples: list[Sample], traces: list[Trace], problems: list[str]) -> Path:
    """Fill the template from the records in ``layout``; returns the page's path.

    Args:
        problems: what could not be asked of a model, a sentence each; shown with what failed in the run.
    """
    from jinja2 import Environment, StrictUndefined

    summary, validation = read_json(layout.summary), read_json(layout.report)
    models = {name: entry for name, entry in summary.get("models", {}).items() if isinstance(entry, dict)}
    comparison = summary.get("comparison") or {}
    names = [name for name, value in comparison.get("test_bpb", {}).items() if name in models]
    configs = {name: training_config(layout.export(name)) for name in models}
    failures = [f"{name}: {entry['error']}" for name, entry in models.items() if entry.get("error")]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["heat"] = heat
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts(summary, {name: config for name, config in configs.items() if config}),
        names=names,
        sentences=comparison.get("sentences", []),
        rows=rows(comparison, names) if comparison else [],
        anchors=anchor_lines(comparison.get("compressors", {})),
        probes=probe_cells(comparison.get("text_probes", {}), names),
        pictures=pictures(
            {name: training_history(layout.export(name)) for name in names or models},
            comparison.get("test_bpb_by_book", {}),
        ),
        samples=samples,
        traces=traces,
        trace_words=TRACE_WORDS,
        failures=[*failures, *validation.get("failed", []), *problems],
        checked=sum(len(model.get("checks", [])) for model in validation.get("models", {}).values()),
    )
    write_atomic(layout.page, page)
    return layout.page
