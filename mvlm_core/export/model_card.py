"""The export's README.md: a model card with Hugging Face metadata, and no figure that was not measured."""

from __future__ import annotations

from typing import Any

from mvlm_core.evaluation.results import share
from mvlm_core.metrics import CONTINUED, METRICS


def model_card(config: dict[str, Any], *, title: str, description: str, sources: str, remote_code: bool) -> str:
    """The text of the card.

    Args:
        config: as in `training_config.json`.
        sources: a sentence on the training text.
        remote_code: the export brings its modelling files along.
    """
    tags = [*(["bible"] if config["results"].get("test_bpb_by_translation") else []), "small-language-model"]
    trust = ", trust_remote_code=True" if remote_code else ""
    table = "\n".join(f"| {name} | {value} |" for name, value in _figures(config))
    return f"""---
language: en
license: mit
library_name: transformers
pipeline_tag: text-generation
tags: [{", ".join(tags)}, {config["model"].replace("_", "-")}]
---

# {title}

{description}

## Numbers

| what | value |
| --- | --- |
{table}

Bits per byte: total negative log-likelihood over ln 2 times the UTF-8 bytes of the text; every token is scored once, in
windows of the training context that start half of it apart. The corpus says which documents are validation and test
text; "test" is all of it, a dash stands for text that the corpus does not have or that was not scored. In the training
repository `validate_models.py FOLDER` measures the test figures again from these files, and `evaluate_models.py FOLDER`
memorization, repetition and calibration. One training run, with seed {config["settings"]["seed"]}; other seeds give
different figures.

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

A small model of one kind of text: it writes in the style of its training text, knows nothing else, follows no
instructions, makes up passages that do not exist and is no authority on its subject, doctrine included. What it writes
is not a quotation, not of scripture either, even where it reads like one; the table says how often it does repeat its
training text. It carries over what that text, old as it may be, says about peoples, women and slaves.
"""


def _figures(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table of numbers: the metrics that the run has, then what is no metric."""
    results = config["results"]
    recalled = {part: results["memorization"][part]["exact"] for part in ("train", "held_out")}
    return [
        *(
            (metric.title, metric.text(results[metric.name]))
            for metric in (*METRICS, *CONTINUED)
            if metric.name in results
        ),
        ("vocabulary", f"{config['tokenizer']['vocab_size']:,}"),
        ("training context, tokens", f"{config['settings']['max_length']:,}"),
        ("training steps", f"{results['steps']:,}; the exported weights are of step {results['best_step']:,}"),
        ("trained on", config["hardware"]["name"]),
        *(
            (f"memorization: second half of a verse from its first, word for word, {name}", _share_of(recalled[part]))
            for part, name in (("train", "verses trained on"), ("held_out", "held-out verses as a control"))
        ),
    ]


def _share_of(measured: dict[str, Any]) -> str:
    return f"{share(measured)} of {measured['count']}"
