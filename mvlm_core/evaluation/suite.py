"""The text probes put to several models with the same material.

Results are plain dictionaries, as JSON holds them: a ``Mean`` is ``{"value", "error", "count"}``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from mvlm_core.data.corpus import Corpus, Document
from mvlm_core.data.verses import Verse, followed_by, matched_verses, sample_verses, verses_of
from mvlm_core.evaluation import generation, memorization
from mvlm_core.evaluation.bits_per_byte import bits_per_byte_by_part, load_export, score_loaded
from mvlm_core.evaluation.calibration import calibration
from mvlm_core.evaluation.minimal_pairs import Pair, Rule, minimal_pairs, pair_accuracy

SHORTEST = 8  # words of a verse that is asked about: its second half has four at least


@dataclass(frozen=True)
class Size:
    """How much is asked: verses a question, prompts to continue and by how many words, pairs a rule at most."""

    verses: int = 300
    prompts: int = 100
    words: int = 64
    pairs: int = 200


@dataclass(frozen=True)
class Material:
    """The same text for every model: held-out documents, verses of them, and pairs made from them."""

    held_out: list[Document]
    verses: list[Verse]
    train_verses: list[Verse]
    prompts: list[Verse]
    pairs: list[Pair]


def draw(corpus: Corpus, split: str, size: Size, seed: int, rules: Sequence[Rule]) -> Material:
    """Material from ``split`` ("validation" or "test"), and train verses of the same translations and lengths.

    Args:
        rules: of the minimal pairs.
    """
    held_out = corpus.split(split)
    every = list(verses_of(held_out))
    asked = sample_verses((v for v in every if len(v.text.split()) >= SHORTEST), size.verses, seed)
    return Material(
        held_out,
        asked,
        matched_verses(asked, verses_of(corpus.split("train")), seed),
        sample_verses((v for v in every if followed_by(v, size.words) is not None), size.prompts, seed),
        minimal_pairs(every, rules, per_rule=size.pairs, seed=seed),
    )


def measure(
    model_dir: Path | str,
    material: Material,
    size: Size,
    seed: int,
    *,
    device: str = "cpu",
    bits_per_byte: bool = True,
) -> dict[str, Any]:
    """Every probe's result for one export folder.

    Args:
        bits_per_byte: score the held-out documents too, which takes longest; trainers have done that already.
    """
    model, tokenizer = load_export(model_dir, device)
    train, control = (memorization.recall(model, tokenizer, v) for v in (material.train_verses, material.verses))
    found: dict[str, Any] = {}
    if bits_per_byte:
        score = score_loaded(model, tokenizer, material.held_out)
        found["bits_per_byte"] = bits_per_byte_by_part(score, material.held_out)
    found |= {
        "calibration": calibration(model, tokenizer, material.verses),
        "cloze": memorization.cloze(model, tokenizer, material.verses),
        "recall_train": train,
        "recall_held_out": control,
        "memorised": train - control,
        "repetition": generation.repetition(model, tokenizer, material.prompts, words=size.words, seed=seed),
        "pairs": pair_accuracy(model, tokenizer, material.pairs),
    }
    return {name: _plain(value) for name, value in found.items()}


def memorisation(model: Any, tokenizer: Any, corpus: Corpus, *, verses: int = 100, seed: int = 0) -> dict[str, Any]:
    """Recall of train verses and, as a control, of validation verses of the same length, for the model's card.

    Of the King James Version where the corpus has it: a translation that is read often is what can be known by heart.
    """
    train, held_out = corpus.split("train"), corpus.split("validation")
    if any(document.translation == "kjv" for document in held_out):
        train, held_out = ([d for d in part if d.translation == "kjv"] for part in (train, held_out))
    asked = sample_verses((v for v in verses_of(held_out) if len(v.text.split()) >= SHORTEST), verses, seed)
    known = matched_verses(asked, verses_of(train), seed)
    return {
        name: _plain(memorization.recall(model, tokenizer, some))
        for name, some in (("train", known), ("held_out", asked))
    }


def over_seeds(results: list[Any]) -> Any:
    """``measure``'s results for models that differ in the seed alone, as one result: their mean.

    The error of a ``Mean`` is then that between the seeds, which were asked the same. What all say stays as it
    is, and what one could not say is None.
    """
    first = results[0]
    if all(result == first for result in results):
        return first
    if None in results:
        return None
    if isinstance(first, dict) and first.keys() == {"value", "error", "count"}:
        values = [result["value"] for result in results]
        error = None if None in values else statistics.stdev(values) / len(values) ** 0.5
        return first | {"value": over_seeds(values), "error": error}
    if isinstance(first, dict):
        return {key: over_seeds([result[key] for result in results]) for key in first}
    return statistics.mean(results) if isinstance(first, float) else first


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if is_dataclass(value):
        return _plain(asdict(value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sizes(result: dict[str, Any], material: Material, size: Size) -> list[str]:
    """How much was asked, and what must be kept in mind."""
    recalled, control = result["recall_train"]["exact"]["count"], result["recall_held_out"]["exact"]["count"]
    return [
        f"{len(material.verses)} held-out verses, each of another place, for calibration, "
        f"{result['cloze']['full']['count']} of them for the last word, {control} as control of recall, for which "
        f"{recalled} train verses are of the same translations and lengths; "
        f"{result['repetition']['reference']['rep_4']['count']} prompts continued by {size.words} words.",
        "Chance is 50 % for the pairs. They come from all translations, which share wording, so their errors are "
        "larger than ± says.",
    ]
