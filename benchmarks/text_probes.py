#!/usr/bin/env python3
"""What exported models can do beside bits per byte, on held-out text: calibration, cloze, recall, repetition, grammar.

    python benchmarks/text_probes.py [MODEL_DIR ...] [--split test] [--json FILE]

One table with a model a column; "text" is what the held-out text itself gives. A value after ± is a standard error.
The probes and their sources stand in mvlm_core/text_probes.py and mvlm_core/minimal_pairs.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
SHORTEST = 8  # words of a verse that is asked about: its second half has four at least


@dataclass(frozen=True)
class Material:
    """The same text for every model: held-out documents, verses of them, and pairs made from them."""

    held_out: list[Any]
    verses: list[Any]
    train_verses: list[Any]
    prompts: list[Any]
    pairs: list[Any]
    fingerprint: str


def draw(data_dir: str, split: str, verses: int, prompts: int, pairs: int, words: int, seed: int) -> Material:
    from mvlm_core.corpus import load_corpus
    from mvlm_core.minimal_pairs import minimal_pairs
    from mvlm_core.verses import followed_by, matched_verses, sample_verses, verses_of

    corpus = load_corpus(data_dir)
    every = list(verses_of(corpus.split(split)))
    asked = sample_verses((v for v in every if len(v.text.split()) >= SHORTEST), verses, seed)
    return Material(
        corpus.split(split),
        asked,
        matched_verses(asked, verses_of(corpus.split("train")), seed),
        sample_verses((v for v in every if followed_by(v, words) is not None), prompts, seed),
        minimal_pairs(every, per_rule=pairs, seed=seed),
        corpus.fingerprint,
    )


def measure(model_dir: Path, material: Material, words: int, seed: int) -> dict[str, Any]:
    """Every probe's result for one model."""
    from mvlm_core import text_probes as probes
    from mvlm_core.evaluation import load_export
    from mvlm_core.minimal_pairs import pair_accuracy

    started = time.perf_counter()
    model, tokenizer = load_export(model_dir)
    train, control = (probes.recall(model, tokenizer, v) for v in (material.train_verses, material.verses))
    return {
        "bits_per_byte": probes.bits_per_byte_by_part(model, tokenizer, material.held_out),
        "calibration": probes.calibration(model, tokenizer, material.verses),
        "cloze": probes.cloze(model, tokenizer, material.verses),
        "recall_train": train,
        "recall_held_out": control,
        "memorised": train - control,
        "repetition": probes.repetition(model, tokenizer, material.prompts, words=words, seed=seed),
        "pairs": pair_accuracy(model, tokenizer, material.pairs),
        "seconds": time.perf_counter() - started,
    }


def share(mean: Any, sign: str = "") -> str:
    """A mean as a percentage with its standard error."""
    return f"{mean.value:{sign}.1%} ± {mean.error:.1%}"


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """The table: what, the held-out text's own value, and each model's."""
    table = []

    def row(what: str, value: Any, text: str = "") -> None:
        table.append([what, text, *(value(result) for result in results)])

    row("bits per byte", lambda r: f"{r['bits_per_byte'].all:.4f}")
    for part in ("books", "translations"):
        for name in getattr(results[0]["bits_per_byte"], part):
            row(f"· {name}", lambda r, part=part, name=name: f"{getattr(r['bits_per_byte'], part)[name]:.4f}")
    row("calibration error (ECE)", lambda r: f"{r['calibration'].error:.2%}")
    row("· mean confidence", lambda r: f"{r['calibration'].confidence:.2%}")
    row("· accuracy, next token", lambda r: f"{r['calibration'].accuracy:.2%}")
    row("last word, all text before it", lambda r: share(r["cloze"].full))
    row("last word, the verse alone", lambda r: share(r["cloze"].alone))
    for key, words in (("exact", "second half exact"), ("prefix", "common prefix"), ("longest", "longest match")):
        row(f"{words}, train", lambda r, key=key: share(getattr(r["recall_train"], key)))
        row(f"{words}, held out", lambda r, key=key: share(getattr(r["recall_held_out"], key)))
        row("· memorised (difference)", lambda r, key=key: share(getattr(r["memorised"], key), "+"))
    text = results[0]["repetition"].reference
    for kind in ("greedy", "sampled"):
        row(f"rep-4, {kind}", lambda r, kind=kind: share(getattr(r["repetition"], kind).rep_4), share(text.rep_4))
        row(
            f"distinct-2, {kind}",
            lambda r, kind=kind: f"{getattr(r['repetition'], kind).distinct_2:.1%}",
            f"{text.distinct_2:.1%}",
        )
        row(
            f"· words a continuation, {kind}",
            lambda r, kind=kind: f"{getattr(r['repetition'], kind).words:.1f}",
            f"{text.words:.1f}",
        )
    for rule, found in results[0]["pairs"].items():
        row(f"{rule} ({found.count} pairs)", lambda r, rule=rule: share(r["pairs"][rule]))
    row("seconds", lambda r: f"{r['seconds']:.0f}")
    return table


def sizes(result: dict[str, Any], material: Material, words: int) -> list[str]:
    """How much was asked, and what must be kept in mind."""
    recalled, control = result["recall_train"].exact.count, result["recall_held_out"].exact.count
    return [
        f"{len(material.held_out)} documents for bits per byte; {len(material.verses)} held-out verses, each of "
        f"another place, for calibration, {result['cloze'].full.count} of them for the last word, {control} as control "
        f"of recall, for which {recalled} train verses are of the same translations and lengths; "
        f"{result['repetition'].reference.rep_4.count} prompts continued by {words} words.",
        "Chance is 50 % for the pairs. They come from all translations, which share wording, so their errors are "
        "larger than ± says.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [REPOSITORY / "models" / name for name in ("mvlm_gpt2", "simone_enhanced")]
    parser.add_argument("models", nargs="*", type=Path, default=default, metavar="MODEL_DIR", help="export folders")
    parser.add_argument("--data_dir", default=str(REPOSITORY / "mvlm_training_dataset_complete"))
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--verses", type=int, default=300, help="verses for each question [default 300]")
    parser.add_argument("--prompts", type=int, default=100, help="prompts to continue [default 100]")
    parser.add_argument("--words", type=int, default=64, help="words of a continuation [default 64]")
    parser.add_argument("--pairs", type=int, default=200, help="most pairs of a rule [default 200]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mvlm_core.export import read_training_config

    material = draw(
        options.data_dir, options.split, options.verses, options.prompts, options.pairs, options.words, options.seed
    )
    results = []
    for folder in options.models:
        config = read_training_config(folder) or {}
        if config.get("data", {}).get("fingerprint") != material.fingerprint:
            print(f"{folder} was trained on another corpus: held-out text may have been read, train text may not")
        results.append(measure(folder, material, options.words, options.seed))
        print(f"{folder}: {results[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    print("| " + " | ".join([options.split, "text", *(folder.name for folder in options.models)]) + " |")
    print("| --- |" + " ---: |" * (len(results) + 1))
    for cells in rows(results):
        print("| " + " | ".join(cells) + " |")
    print("\n".join(["", *sizes(results[0], material, options.words), f"Seed {options.seed}."]))
    if options.json:
        plain = {
            str(folder): {key: _plain(value) for key, value in result.items()}
            for folder, result in zip(options.models, results, strict=True)
        }
        options.json.write_text(json.dumps({**vars(options), "results": plain}, indent=1, default=str) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


if __name__ == "__main__":
    main()
