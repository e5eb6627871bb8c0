#!/usr/bin/env python3
"""What exported models can do beside bits per byte, on held-out text: calibration, cloze, recall, repetition, grammar.

    python evaluate_models.py [MODEL_DIR ...] [--split test] [--json FILE]

One table with a model a column; "text" is what the held-out text itself gives. A value after ± is a standard error.
A folder of the exports of several seeds (seed0, seed1, …) is one column too: their mean, ± its error between the seeds.
With --json, what that file already says of the same model, text and questions is not measured again.
The probes and their sources stand in mvlm_core/text_probes.py and mvlm_core/minimal_pairs.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from mvlm_core.hardware import DEVICES
from mvlm_core.settings import REPOSITORY_ROOT as REPOSITORY


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [REPOSITORY / "models" / name for name in ("mvlm_gpt2", "simone_enhanced")]
    parser.add_argument("models", nargs="*", type=Path, default=default, metavar="MODEL_DIR", help="export folders")
    parser.add_argument("--data_dir", default=str(REPOSITORY / "mvlm_training_dataset_complete"))
    parser.add_argument("--data_subset", help="use only this folder below --data_dir [default: as the first model did]")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--verses", type=int, default=300, help="verses for each question [default 300]")
    parser.add_argument("--prompts", type=int, default=100, help="prompts to continue [default 100]")
    parser.add_argument("--words", type=int, default=64, help="words of a continuation [default 64]")
    parser.add_argument("--pairs", type=int, default=200, help="most pairs of a rule [default 200]")
    parser.add_argument("--no_bits_per_byte", action="store_true", help="leave out what the trainers measure already")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="[default auto]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser.parse_args()


def known_results(path: Path, same: dict[str, Any]) -> dict[str, Any]:
    """The results in ``path`` where it was written for the same questions and text."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        alike = all(before[key] == value for key, value in same.items())
        return before["results"] if alike and isinstance(before["results"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def seeds_of(folder: Path) -> list[Path]:
    """The exports that a column stands for: ``folder`` itself, or those of the seeds in it."""
    return sorted(path.parent for path in folder.glob("seed*/model.safetensors")) or [folder]


def main() -> int:
    options = parse()
    from mvlm_core.hardware import set_process_environment

    set_process_environment()
    from bible_corpus.grammar import RULES
    from mvlm_core.data.corpus import load_corpus
    from mvlm_core.evaluation.suite import Size, draw, measure, over_seeds, sizes
    from mvlm_core.evaluation.suite_table import rows
    from mvlm_core.export.folder import read_training_config
    from mvlm_core.export.validation import corpus_choice
    from mvlm_core.files import sha256_file, write_json_atomic
    from mvlm_core.hardware import choose_hardware

    size = Size(options.verses, options.prompts, options.words, options.pairs)
    asked = {key: value for key, value in vars(options).items() if key not in ("models", "json")}
    columns = {folder: seeds_of(folder) for folder in options.models}
    exports = list(dict.fromkeys(export for seeds in columns.values() for export in seeds))  # each once
    choice = corpus_choice(exports[0] / "training_config.json")
    corpus = load_corpus(options.data_dir, **choice | ({"only": options.data_subset} if options.data_subset else {}))
    hardware = choose_hardware(device=options.device)
    hardware.apply()
    same = {"asked": asked, "fingerprint": corpus.fingerprint}
    known = known_results(options.json, same) if options.json else {}
    material, results = draw(corpus, options.split, size, options.seed, RULES), {}
    for folder in exports:
        weights = sha256_file(folder / "model.safetensors")
        if (before := known.get(str(folder), {})).get("weights") == weights:
            results[str(folder)] = before
            continue
        config, started = read_training_config(folder) or {}, time.perf_counter()
        if config.get("data", {}).get("fingerprint") != corpus.fingerprint:
            print(f"{folder} was trained on another corpus: held-out text may have been read, train text may not")
        scored = not options.no_bits_per_byte
        result = measure(folder, material, size, options.seed, device=hardware.device, bits_per_byte=scored)
        results[str(folder)] = result | {"weights": weights}
        print(f"{folder}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        if options.json:
            write_json_atomic(options.json, same | {"results": results})
    found = [over_seeds([results[str(export)] for export in seeds]) for seeds in columns.values()]
    print("| " + " | ".join([options.split, "text", *(folder.name for folder in columns)]) + " |")
    print("| --- |" + " ---: |" * (len(found) + 1))
    for cells in rows(found):
        print("| " + " | ".join(cells) + " |")
    print("\n".join(["", *sizes(found[0], material, size), f"Seed {options.seed}."]))
    return 0


if __name__ == "__main__":
    from mvlm_core.errors import run_main

    sys.exit(run_main(main))
