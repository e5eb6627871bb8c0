"""Evaluation suite: metrics besides bits per byte, all on the same evaluation set.

Results are JSON-compatible dictionaries: a ``Mean`` is ``{"value", "error", "count"}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm_core.data.corpus import Corpus, Document, named_texts
from mvlm_core.data.verses import Verse, matched_verses, next_words, sample_verses, verses_of
from mvlm_core.evaluation.bits_per_byte import bits_per_byte_by_part, load_export, score_loaded
from mvlm_core.evaluation.calibration import calibration
from mvlm_core.evaluation.generation import repetition
from mvlm_core.evaluation.memorization import MIN_WORDS, cloze, extraction
from mvlm_core.evaluation.minimal_pairs import Pair, Rule, minimal_pairs, pair_accuracy
from mvlm_core.evaluation.results import as_json

FORMAT = 2  # of the results; raise it when a metric or what it is measured on changes, so that no old ones are reused


@dataclass(frozen=True)
class EvaluationSet:
    """Evaluation text, the same for every model.

    Attributes:
        held_out: documents from which verses, prompts and pairs are drawn.
        train_verses: training verses matched to ``verses`` by translation and length.
        prompts: verses; the text before each is continued by ``words`` words.
        seed: for drawing samples and for sampled continuations.
    """

    held_out: list[Document]
    verses: list[Verse]
    train_verses: list[Verse]
    prompts: list[Verse]
    pairs: list[Pair]
    words: int
    seed: int


def draw_evaluation_set(
    corpus: Corpus,
    split: str,
    rules: Sequence[Rule],
    *,
    verses: int,
    prompts: int,
    words: int,
    pairs: int,
    seed: int,
    train: list[Document] | None = None,
) -> EvaluationSet:
    """Draw an evaluation set from ``split`` ("validation" or "test").

    Args:
        pairs: maximum number of minimal pairs for each of the ``rules``.
        train: documents to draw training verses from; the whole train split by default.
    """
    held_out = corpus.split(split)
    every = list(verses_of(held_out))
    chosen = sample_verses(verses_of(held_out, MIN_WORDS), verses, seed)
    return EvaluationSet(
        held_out,
        chosen,
        matched_verses(chosen, verses_of(corpus.split("train") if train is None else train), seed),
        sample_verses((v for v in every if next_words(v, words) is not None), prompts, seed),
        minimal_pairs(every, rules, per_rule=pairs, seed=seed),
        words,
        seed,
    )


def evaluate(
    model_dir: Path | str, text: EvaluationSet, read: float | None, *, device: str, bits_per_byte: bool = True
) -> dict[str, Any]:
    """Run the suite on one export folder.

    Args:
        read: the share of the training verses that the model is expected to have seen; None if unknown.
        bits_per_byte: also score the held-out documents, the slowest part; training has already done so.
    """
    model, tokenizer = load_export(model_dir, device)
    results: dict[str, Any] = {}
    if bits_per_byte:
        score = score_loaded(model, tokenizer, named_texts(text.held_out))
        results["bits_per_byte"] = bits_per_byte_by_part(score, text.held_out)
    train, held_out = (extraction(model, tokenizer, verses) for verses in (text.train_verses, text.verses))
    difference = {name: train[name] - held_out[name] for name in train}  # memorization beyond language modeling
    results |= {
        "calibration": calibration(model, tokenizer, text.verses),
        "cloze": cloze(model, tokenizer, text.verses),
        "memorization": {"train": train, "held_out": held_out, "difference": difference, "read": read},
        "repetition": repetition(model, tokenizer, text.prompts, words=text.words, seed=text.seed),
        "pairs": pair_accuracy(model, tokenizer, text.pairs),
    }
    return as_json(results)


def notes(result: dict[str, Any], text: EvaluationSet) -> list[str]:
    """Notes for the table: sample sizes and how to read the errors."""
    train, held_out = (result["memorization"][name]["exact"]["count"] for name in ("train", "held_out"))
    read = result["memorization"]["read"]
    return [
        f"{len(text.verses)} distinct held-out verses ({result['cloze']['full']['count']} for the last "
        f"word, {held_out} for memorization, and {train} training verses of the same translations and lengths); "
        f"{result['repetition']['reference']['rep_4']['count']} prompts continued by {text.words} words; seed "
        f"{text.seed}.",
        f"Share of the training verses that the first model is expected to have seen, from its epochs and data mix: "
        f"{'unknown' if read is None else f'{read:.1%}'}; documents that it never reads are left out.",
        "Chance level is 50 % for the pairs. They come from all translations, which share wording, so the true errors "
        "are larger than ± indicates.",
    ]
