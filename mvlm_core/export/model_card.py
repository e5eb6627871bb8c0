"""The export's README.md: a model card with Hugging Face metadata and only measured figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mvlm_core.evaluation.results import share
from mvlm_core.export.manifest import hardware_name
from mvlm_core.files import template
from mvlm_core.metrics import FINE_TUNING_METRICS, METRICS


def model_card(
    config: dict[str, Any], *, title: str, description: str, sources: str, licenses: str | None, remote_code: bool
) -> str:
    """Render the model card.

    Args:
        config: content of `training_config.json`.
        sources: description of the training text.
        licenses: of the training text; None for the built corpus alone.
        remote_code: whether the export includes its modeling files.
    """
    results, settings = config["results"], config["settings"]
    known = [metric for metric in (*METRICS, *FINE_TUNING_METRICS) if metric.name in results]
    figures = [(metric.title, metric.text(results[metric.name])) for metric in known]
    figures += [
        ("vocabulary", f"{config['tokenizer']['vocab_size']:,}"),
        ("training context, tokens", f"{settings['max_length']:,}"),
        ("training steps", f"{results['steps']:,}; exported weights are from step {results['best_step']:,}"),
        ("training hardware", hardware_name(config["hardware"])),
    ]
    figures += _memorization(results["memorization"])
    subject = ["bible"] if results.get("test_bpb_by_translation") else []
    return template(Path(__file__).with_suffix(".md")).render(
        tags=[*subject, "small-language-model", config["model"].replace("_", "-")],
        title=title,
        description=description,
        figures=figures,
        seed=settings["seed"],
        sources=sources,
        licenses=None if licenses is None else json.dumps(licenses, ensure_ascii=False),
        transformers=config["software"]["transformers"],
        trust=", trust_remote_code=True" if remote_code else "",
    )


def _memorization(measured: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Rows of the table; a dash if it was not measured."""
    label = "memorization: second half of a verse reproduced exactly from its first half"
    if measured is None:
        return [(label, "-")]
    read = measured["read"]
    training = f"training verses (expected share seen in training: {'none' if read is None else f'{read:.1%}'})"
    verses = {"train": training, "held_out": "held-out verses as a control"}
    exact = {part: measured[part]["exact"] for part in verses}
    return [(f"{label}, {verses[part]}", f"{share(exact[part])} of {exact[part]['count']}") for part in verses]
