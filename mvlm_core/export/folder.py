"""The export folder: a finished model as transformers loads it, with its history, plots, card and manifest."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mvlm_core.evaluation.results import share
from mvlm_core.export.archive import ArchiveError, read_manifest
from mvlm_core.files import LOCK_NAME, fsync_path, read_regular, sha256_file, write_json_atomic

MANIFEST_NAME = "manifest.json"
_STAGING_NAME = ".export"
log = logging.getLogger("mvlm")


def software_versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def read_training_config(folder: Path) -> dict[str, Any] | None:
    """``training_config.json`` of a complete export, or None where there is none.

    A damaged one is None as well, with a line in the log: identity and results are needed to go on from it.
    """
    if not (folder / MANIFEST_NAME).exists():
        return None
    try:
        read_manifest(folder)
        config = json.loads(read_regular(folder / "training_config.json"))
    except (ArchiveError, OSError, ValueError, RecursionError) as error:
        log.warning("the export in %s is damaged and does not count as finished: %s", folder, error)
        return None
    parts = [config.get(key) for key in ("identity", "results")] if isinstance(config, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or not isinstance(parts[1].get("steps", 0), int):
        log.warning("%s/training_config.json has no identity and results: not counted as finished", folder)
        return None
    return config


def stage_model(model: Any, tokenizer: Any, history: list[dict[str, Any]], title: str, output_dir: Path) -> Path:
    """Write weights, tokenizer, history and plots into a staging folder and return it."""
    staging = output_dir / _STAGING_NAME
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    _name_tokenizer_class(staging / "tokenizer_config.json")
    write_json_atomic(staging / "training_history.json", history)
    plot_history(history, title, staging / "training_plots.png")
    return staging


def _name_tokenizer_class(path: Path) -> None:
    """Name the class that both transformers 4 and 5 know."""
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json_atomic(path, config)


def finish_export(staging: Path, config: dict[str, Any], card: str, output_dir: Path) -> None:
    """Add training configuration and model card, then put the export in place, its manifest last.

    Without a manifest there is no export: whatever interrupts this leaves either the old one, or none.
    """
    write_json_atomic(staging / "training_config.json", config)
    (staging / "README.md").write_text(card, encoding="utf-8")
    hashes = {path.name: sha256_file(path) for path in sorted(staging.iterdir())}
    remove_export(output_dir)
    for name in hashes:
        fsync_path(staging / name)
        os.replace(staging / name, output_dir / name)
    fsync_path(output_dir)
    write_json_atomic(output_dir / MANIFEST_NAME, {"format": 1, "name": config["model"], "files": hashes})
    staging.rmdir()


def remove_export(output_dir: Path) -> None:
    """Delete an earlier export's files, manifest first; nothing that the manifest does not name."""
    manifest = output_dir / MANIFEST_NAME
    names: list[str] = []
    with suppress(ArchiveError):  # a damaged manifest names nothing that could be trusted
        names = [name for name in read_manifest(output_dir)["files"] if name != LOCK_NAME and "/" not in name]
    manifest.unlink(missing_ok=True)
    for name in names:
        if not (output_dir / name).is_dir():
            (output_dir / name).unlink(missing_ok=True)


def plot_history(history: list[dict[str, Any]], title: str, path: Path) -> None:
    """Loss, validation, learning rate and gradient norm against the text read, as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def line(axes: Any, key: str, label: str, style: str = "-") -> None:
        points = [(record["bytes"] / 1e6, record[key]) for record in history if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, color="#0072B2", linewidth=1.2)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)

    figure, panels = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True, layout="constrained")
    line(panels[0, 0], "train_loss", "training loss (nats per token)")
    line(panels[0, 1], "validation_bpb", "validation (bits per byte)", "o-")
    line(panels[1, 0], "learning_rate", "learning rate")
    line(panels[1, 1], "grad_norm", "gradient norm")
    for axes in panels[1]:
        axes.set_xlabel("training text read (MB)")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def model_card(config: dict[str, Any], *, title: str, description: str, sources: str, remote_code: bool) -> str:
    """The export's README.md, with Hugging Face metadata and nothing that was not measured."""
    results, hardware = config["results"], config["hardware"]
    trust = ", trust_remote_code=True" if remote_code else ""

    def number(key: str, form: Callable[[Any], str] = lambda value: f"{value:.4f}") -> str:
        return form(results[key]) if results.get(key) is not None else "no such text in this corpus"

    def recalled(part: str) -> str:
        return f"{share(results['memorization'][part]['exact'])} of {results['memorization'][part]['exact']['count']}"

    return f"""---
language: en
license: mit
library_name: transformers
pipeline_tag: text-generation
tags: [bible, small-language-model, {config["model"].replace("_", "-")}]
---

# {title}

{description}

## Numbers

| what | value |
| --- | --- |
| parameters | {results["parameters"]:,} |
| vocabulary | {config["tokenizer"]["vocab_size"]:,} |
| training context | {config["settings"]["max_length"]} tokens |
| training text read | {results["bytes"] / 1e6:.2f} MB in {results["tokens"]:,} tokens, {results["steps"]:,} steps |
| validation, bits per byte | {number("validation_bpb")} (weights of step {results["best_step"]:,}) |
| test, bits per byte, all translations | {number("test_bpb")} |
| test, bits per byte, King James Version | {number("test_bpb_kjv")} |
| second half of a verse from its first, word for word: train verses | {recalled("train")} |
| the same of verses it has not read, as a control | {recalled("held_out")} |
| training time | {results["seconds"]:.0f} s, {results["tokens_per_second"]:,.0f} tokens/s, {hardware["name"]} |

Bits per byte: total negative log-likelihood over ln 2 times the UTF-8 bytes of the text, every token scored once,
windows of the training context half of it apart. The corpus says which documents are validation and test text;
of the Bible, whole books are held out in every translation. In the training repository `validate_models.py FOLDER`
measures the test figures again from these files, and `benchmarks/text_probes.py FOLDER` what it knows by heart, how
often it repeats itself and how well it is calibrated. One training run, with seed {config["settings"]["seed"]}: others
give other figures.

## Data

{sources}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
start = tokenizer(tokenizer.bos_token + "In the beginning God", split_special_tokens=False, return_tensors="pt")
print(tokenizer.decode(model.generate(**start, max_new_tokens=40)[0], skip_special_tokens=True))
```

## Limits

A small model of one kind of text: it writes archaic English, knows nothing else, follows no instructions, makes up
verses that do not exist and is no authority on doctrine. What it writes is not scripture, even where it reads like it;
how often it does repeat scripture, the table says. It takes over what the old translations say about peoples, women
and slaves.
"""
