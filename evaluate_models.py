#!/usr/bin/env python3
"""Run the evaluation suite on held-out text: calibration, cloze, extractable memorization, repetition and grammar.

    python evaluate_models.py [MODEL ...] [--split test] [--json FILE]

MODEL is an export folder or a .tar.gz. Prints one table with a column per MODEL; ± is the standard error over samples.
The column "reference text" has the held-out text's own values. Results already in the --json file for the same
model, text and options are reused. Sources of the metrics: the modules of mvlm_core/evaluation.

Exit codes: 0 done, 2 bad arguments or unusable models, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mvlm_trainer
from mvlm_core.command_line import CommandLine, device_problems, seed_problems
from mvlm_core.errors import run_main
from mvlm_core.export.file_checks import checked_exports
from mvlm_core.files import read_json, write_json_atomic
from mvlm_core.hardware import choose_hardware, set_process_environment
from mvlm_core.pipeline.parallel import parallel_map
from mvlm_core.settings import DEFAULT_DATA_DIR, REPOSITORY_ROOT
from mvlm_core.signals import end_on_sigterm
from prioritary_mvlm.config import MODELING_FILES, NAME

if TYPE_CHECKING:
    from mvlm_core.data.corpus import Corpus

MODELS = (mvlm_trainer.NAME, NAME)
SIZES = {
    "verses": (300, "verses per metric"),
    "prompts": (100, "number of prompts"),
    "words": (64, "length of a continuation in words"),
    "pairs": (200, "maximum number of minimal pairs per rule"),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    default = [REPOSITORY_ROOT / "models" / name for name in MODELS]
    models = f"export folders or .tar.gz [default: models/{MODELS[0]} and models/{MODELS[1]}]"
    add("models", nargs="*", type=Path, default=default, metavar="MODEL", help=models)
    add("--data_dir", default=str(DEFAULT_DATA_DIR), help="the corpus the models were trained on")
    add("--validation_dir", help="the folder of the validation text, if the models were trained with one")
    add("--data_subset", help="use only this subfolder of --data_dir [default: the first model's]")
    add("--split", choices=("validation", "test"), default="validation", help="held-out split [default validation]")
    for name, (number, text) in SIZES.items():
        add(f"--{name}", type=int, default=number, help=f"{text} [default {number}]")
    add("--no_bits_per_byte", action="store_true", help="skip bits per byte, which training has already measured")
    add("--device", default="auto", help="auto, cpu or cuda [default auto]")
    add("--seed", type=int, default=0, help="random seed for sampling [default 0]")
    add("--json", type=Path, help="also write the results to this file")
    return parser.parse_args(arguments)


def option_problems(options: argparse.Namespace) -> list[str]:
    problems = [f"--{name} {value}: must be at least 1" for name in SIZES if (value := getattr(options, name)) < 1]
    problems += seed_problems(options.seed) + device_problems(options.device)
    if not Path(options.data_dir).is_dir():
        problems.append(f"--data_dir {options.data_dir}: no such folder")
    if options.json and (options.json.is_dir() or not os.access(options.json.parent, os.W_OK)):
        problems.append(f"--json {options.json}: must be a file in an existing, writable folder")
    return problems


def recorded_coverage(folder: Path, corpus: Corpus) -> dict[str, float]:
    """Expected share of each train document, by path, that the exported weights have seen; {} if not recorded."""
    from mvlm_core.data.token_store import document_coverage, document_repeats
    from mvlm_core.export.manifest import training_config
    from mvlm_core.run_layout import finite_number

    config, train = training_config(folder), corpus.split("train")
    epochs = finite_number(config.get("results", {}).get("best_epoch"))
    if epochs is None or config.get("data", {}).get("fingerprint") != corpus.fingerprint:
        return {}
    return document_coverage(train, document_repeats(train, config["data"].get("mix")), epochs)


def reusable_results(saved: dict[str, Any], identity: dict[str, Any], manifests: dict[str, str]) -> dict[str, Any]:
    """Return the saved results of the same exports, if they were measured with the same ``identity``."""
    if any(saved.get(key) != value for key, value in identity.items()):
        return {}
    results = saved.get("results", {})
    return {name: results[name] for name in manifests if results.get(name, {}).get("manifest") == manifests[name]}


def warn_about_another_corpus(exports: dict[str, Path], corpus: Corpus) -> None:
    from mvlm_core.export.manifest import training_config

    for name, folder in exports.items():
        if training_config(folder).get("data", {}).get("fingerprint") != corpus.fingerprint:
            print(
                f"{name} was trained on another corpus: it may have seen the held-out text, or not have seen the train "
                "text"
            )


def print_table(split: str, results: dict[str, dict[str, Any]]) -> None:
    from mvlm_core.evaluation.results import DEFINITIONS, rows

    head = [split, "reference text", *(Path(name).name for name in results)]
    rule = ["---", *["---:"] * (len(results) + 1)]
    print("\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows([*results.values()])]))
    print("\n".join(["", *(f"{label}: {meaning}." for label, meaning in DEFINITIONS.items())]))


def evaluate_exports(options: argparse.Namespace, exports: dict[str, Path]) -> None:
    """Evaluate every export once and print the table.

    Args:
        exports: maps each MODEL to its verified folder.
    """
    from bible_corpus.grammar import RULES
    from mvlm_core.data.corpus import load_corpus
    from mvlm_core.evaluation.memorization import mean_coverage
    from mvlm_core.evaluation.suite import FORMAT, draw_evaluation_set, evaluate, notes
    from mvlm_core.export.manifest import corpus_choice, manifest_sha256

    choice = corpus_choice(next(iter(exports.values())), options.validation_dir)
    corpus = load_corpus(options.data_dir, **choice | ({"only": options.data_subset} if options.data_subset else {}))
    hardware = choose_hardware(device=options.device)
    hardware.apply()
    read = {name: recorded_coverage(folder, corpus) for name, folder in exports.items()}
    train = [d for d in corpus.split("train") if all(shares.get(d.path, 1) for shares in read.values())]
    sizes = {name: getattr(options, name) for name in SIZES}
    text = draw_evaluation_set(corpus, options.split, RULES, seed=options.seed, train=train, **sizes)
    identity = {
        "format": FORMAT,
        "options": {key: value for key, value in vars(options).items() if key not in ("models", "json")},
        "fingerprint": corpus.fingerprint,
        "unread": sorted({d.path for d in corpus.split("train")} - {d.path for d in train}),
    }
    manifests = {name: manifest_sha256(folder) for name, folder in exports.items()}
    results = reusable_results(read_json(options.json) if options.json else {}, identity, manifests)
    new = {name: folder for name, folder in exports.items() if name not in results}
    warn_about_another_corpus(new, corpus)
    work = partial(evaluate, device=hardware.device, bits_per_byte=not options.no_bits_per_byte)
    jobs = [
        (folder, text, mean_coverage(text.train_verses, train, read[name]) if read[name] else None)
        for name, folder in new.items()
    ]
    first = next(iter(exports))
    for name, result in zip(new, parallel_map(work, jobs, on_cpu=hardware.device == "cpu"), strict=True):
        results[name] = result | {"manifest": manifests[name]}
        print(f"{name}: done", file=sys.stderr, flush=True)
        if options.json:
            write_json_atomic(options.json, identity | {"results": results, "notes": notes(results[first], text)})
    print_table(options.split, {name: results[name] for name in exports})
    print("\n".join(["", *notes(results[first], text)]))


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    set_process_environment()
    models = list(dict.fromkeys(options.models))
    with checked_exports(models, MODELING_FILES, option_problems(options)) as folders:
        evaluate_exports(options, dict(zip(map(str, models), folders, strict=True)))
    return 0


if __name__ == "__main__":
    end_on_sigterm()  # cleans up unpacked archives
    run_main(main)
