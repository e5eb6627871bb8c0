"""Plots for `comparison.png` and the report: validation and training curves, test scores."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mvlm_core.evaluation.compression import LABELS
from mvlm_core.export.plots import BY_TEXT, BY_TIME, STYLES, Histories, curves
from mvlm_core.files import write_atomic
from mvlm_core.metrics import BY_NAME, PRIMARY_TEST_BPB, Metric

TEST = BY_NAME["test_bpb"]


def _bars(axes: Any, values: dict[str, list[float]], labels: list[str], orientation: str = "vertical") -> None:
    """Draw labeled groups of bars, one bar per model, annotated with its value."""
    colors = [str(style["color"]) for style in STYLES[: len(values)]]
    form: dict[str, Any] = {"tick_labels": labels, "orientation": orientation, "group_spacing": 0.5}
    drawn = axes.grouped_bar(values, colors=colors, edgecolor="black", **form)
    for style, bars in zip(STYLES, drawn.bar_containers, strict=False):
        for bar in bars:
            bar.set_hatch(style["hatch"])
        axes.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)


def book_bars(by_book: dict[str, dict[str, float]]) -> Callable[[Any], None] | None:
    """Return a function that draws the test score of each book, one bar per model; None without scores."""
    books = list(next(iter(by_book.values()), {}))

    def draw(axes: Any) -> None:
        axes.figure.set_figheight(1.0 + 0.5 * len(books))
        values = {name: [scores.get(book, 0.0) for book in books] for name, scores in by_book.items()}
        _bars(axes, values, books, "horizontal")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(f"{TEST.title} ({TEST.direction})")
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2, frameon=False)

    return draw if books else None


def plot_comparison(comparison: dict[str, Any], histories: Histories, path: Path) -> None:
    """Write `comparison.png`: validation curves by text and by time, and test scores with compression baselines."""
    from matplotlib.figure import Figure  # not pyplot, which has global state and may need a display

    scores = [TEST, BY_NAME[PRIMARY_TEST_BPB]]
    scores = [metric for metric in scores if any(comparison[metric.name].get(name) is not None for name in histories)]
    figure = Figure(figsize=(13 if scores else 9, 4.4), layout="constrained")
    panels = figure.subplots(1, 3 if scores else 2)
    for axes, x, title in zip(panels, (BY_TEXT, BY_TIME), ("Validation, by text", "Validation, by time"), strict=False):
        if draw := curves(histories, ["validation_bpb"], x, "bits per byte"):
            draw(axes)
        axes.set(title=title)
    if scores:  # without test text there are none
        _score_bars(panels[2], comparison, scores, list(histories))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _score_bars(axes: Any, comparison: dict[str, Any], scores: list[Metric], names: list[str]) -> None:
    """Draw these scores of each model as bars, and those of the compression baselines as lines."""
    from matplotlib.patheffects import withStroke

    values = {name: [comparison[metric.name].get(name) or 0 for metric in scores] for name in names}
    _bars(axes, values, [metric.label.replace(", ", ",\n") for metric in scores])
    axes.set(ylabel=TEST.unit, title=f"Test scores ({TEST.direction})")
    baselines = comparison["compression_baselines"]
    if baselines:
        last = len(scores) - 1  # baselines are for the primary translation, or for all text if there is none
        halo = [withStroke(linewidth=3, foreground="white")]
        for key in ("xz", "ppmd_order_16"):
            value = baselines[key]
            reach = ([last - 0.48, last + 0.5], [value] * 2)
            axes.plot(*reach, color="black", linewidth=1.5, linestyle=":", path_effects=halo)
            axes.annotate(f"{LABELS[key]}\n{value:.3f}", (last + 0.54, value), va="center", fontsize=8)
        axes.set_xlim(-0.6, last + 1.3)


def svg_url(draw: Callable[[Any], None]) -> str:
    """Render a figure as an SVG data URL; ``draw`` is called with the axes."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    draw(figure.subplots())
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):  # for reproducible output
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def figures(histories: Histories, by_book: dict[str, dict[str, float]]) -> list[dict[str, str]]:
    """Title and data URL of each figure of the report that has values."""
    plots = [
        ("Validation by text", curves(histories, ["validation_bpb"], BY_TEXT, "bits per byte")),
        ("Validation by time", curves(histories, ["validation_bpb"], BY_TIME, "bits per byte")),
        ("Test scores by book", book_bars(by_book)),
        ("Training loss", curves(histories, ["train_loss"], BY_TEXT, "nats per token")),
        ("Learning rate", curves(histories, ["learning_rate"], BY_TEXT, "learning rate")),
        ("Gradient norm", curves(histories, ["grad_norm"], BY_TEXT, "norm")),
    ]
    for name, history in histories.items():
        parts = sorted({key for record in history for key in record if "_loss" in key} - {"train_loss"})
        plots.append((f"Loss components, {name}", curves({name: history}, parts, BY_TEXT, "nats per token")))
    return [{"title": title, "url": svg_url(draw)} for title, draw in plots if draw]
