"""`training_plots.png`, the picture of a training run in its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mvlm_core.metrics import BY_NAME

PANELS = (  # field of the history's records, label, line style
    ("train_loss", "training loss (nats per token)", "-"),
    ("validation_bpb", BY_NAME["validation_bpb"].title, "o-"),
    ("learning_rate", "learning rate", "-"),
    ("grad_norm", "gradient norm", "-"),
)


def plot_history(history: list[dict[str, Any]], title: str, path: Path) -> None:
    """Loss, validation, learning rate and gradient norm against the text read, as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True, layout="constrained")
    for axes, (key, label, style) in zip(panels.flat, PANELS, strict=True):
        points = [(record["bytes"] / 1e6, record[key]) for record in history if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, color="#0072B2", linewidth=1.2)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel("training text read (MB)")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
