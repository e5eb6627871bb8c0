"""Curves of training histories, and `training_plots.png` in the export."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mvlm_core.metrics import BY_NAME

# Okabe and Ito's palette: distinguishable with any type of color vision, and in grayscale.
STYLES = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o", "hatch": ""},
    {"color": "#E69F00", "linestyle": "--", "marker": "s", "hatch": "//"},
)
PART_STYLES = (("#0072B2", "-"), ("#E69F00", "--"), ("#009E73", ":"), ("#CC79A7", "-."))  # for curves of one model
POINTS = 400  # per curve, enough for the width of a page
BY_TEXT, BY_TIME = ("bytes", 1e6, "training text read, MB"), ("seconds", 1.0, "seconds of training")
PANELS = (  # field of the history's records, label
    ("train_loss", "training loss (nats per token)"),
    ("validation_bpb", BY_NAME["validation_bpb"].title),
    ("learning_rate", "learning rate"),
    ("grad_norm", "gradient norm"),
)
Axis = tuple[str, float, str]
Histories = dict[str, list[dict[str, Any]]]


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Downsample to at most about ``POINTS`` points, always keeping the last one."""
    step = -(-len(points) // POINTS)
    return points[::-1][::step][::-1] if step > 1 else points


def curves(histories: Histories, keys: Iterable[str], x: Axis, ylabel: str) -> Callable[[Any], None] | None:
    """Return a function that plots history values against text or time on given axes; None if there are no values.

    Args:
        keys: one key for a curve per model, several for a curve per key.
        x: the record's key, its divisor, and the axis label.
    """
    (x_key, unit, xlabel), keys, lines = x, list(keys), []
    for style, (name, history) in zip(STYLES, histories.items(), strict=False):
        for number, key in enumerate(keys):
            points = thinned([(record[x_key] / unit, record[key]) for record in history if key in record])
            color, line = PART_STYLES[number % 4] if len(keys) > 1 else (style["color"], style["linestyle"])
            label = name if len(keys) == 1 else key.replace("_", " ")
            look: dict[str, Any] = {"color": color, "linestyle": line, "label": label}
            look |= {"marker": style["marker"], "markersize": 4} if len(points) < 60 else {}
            lines += [(points, look)] if points else []

    def draw(axes: Any) -> None:
        for points, look in lines:
            axes.plot(*zip(*points, strict=True), linewidth=1.3, **look)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize=8)

    return draw if lines else None


def plot_history(history: list[dict[str, Any]], title: str, path: Path) -> None:
    """Plot loss, validation, learning rate and gradient norm against training text in one figure."""
    from matplotlib.figure import Figure  # not pyplot, which has global state and may need a display

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(2, 2, sharex=True).flat, PANELS, strict=True):
        if draw := curves({title: history}, [key], BY_TEXT, label):
            draw(axes)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
