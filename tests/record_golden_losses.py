"""Record the golden losses again: ``python -m tests.record_golden_losses``; explain the change in the commit."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from mvlm_core.training.history import read_history
from tests.helpers import FIXTURES, MODELS, StopAfter, build_tiny_corpus, everything_on, make_loop, tiny_settings

GOLDEN = FIXTURES / "golden_losses.json"


def golden_losses(model: str, corpus: Path, work: Path) -> list[float]:
    """Train the golden run of a model and return its losses, one per step."""
    changes = {**everything_on(model), "dropout": 0.0, "max_steps": 20}
    loop = make_loop(model, tiny_settings(model, corpus, work, **changes))
    loop.run(StopAfter())
    return [record["train_loss"] for record in read_history(loop.step_log.path)]


def main() -> None:
    torch.set_num_threads(2)
    # One thread instead of two, or AVX2 instead of AVX-512, changed these losses by 3e-7 of their size.
    golden: dict[str, object] = {"command": "python -m tests.record_golden_losses", "relative_tolerance": 2e-5}
    with tempfile.TemporaryDirectory() as folder:
        corpus = build_tiny_corpus(Path(folder) / "corpus")
        for model in MODELS:
            golden[model] = [round(loss, 6) for loss in golden_losses(model, corpus, Path(folder))]
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
