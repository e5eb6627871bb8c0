#!/usr/bin/env python3
"""Which mix of translations serves best: model 2 on the same budget of text, drawn in different shares.

The translations are near-duplicates of each other: how much of the budget should go to the one that is scored? Each
mix is judged twice on the validation books, by the King James part and by all translations, each of which weighs
what its text weighs. Run the command again and it goes on where it stopped.

Exit codes: 0 done, 1 a run failed (the others still ran), 2 bad arguments, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.experiments.runner import Run, command_line, make, settled, values_of
from mvlm_core.console import log
from mvlm_core.data.corpus import load_corpus
from mvlm_core.errors import run_main
from mvlm_core.files import write_json_atomic

KJV = "bible/kjv"
MIXES: dict[str, dict[str, Any]] = {
    "all alike": {"train_mix": ""},
    "King James 4 times": {"train_mix": f"{KJV}=4"},
    "King James 16 times (the preset)": {"train_mix": f"{KJV}=16"},
    "King James 64 times": {"train_mix": f"{KJV}=64"},
    "King James only": {"train_mix": "", "data_subset": KJV},
}


def plan(options: argparse.Namespace) -> list[Run]:
    shared = values_of(options)
    runs = []
    for seed in range(options.seeds):
        for number, (name, values) in enumerate(MIXES.items()):
            place = {"seed": seed, "output_dir": str(options.root / f"mix{number}" / f"seed{seed}")}
            runs.append(Run(name, "simone_enhanced", shared | values | place))
    return runs


def score(run: Run, data_dir: Path) -> dict[str, float]:
    """Bits per byte on the validation books of all translations, kept beside the run."""
    from mvlm_core.evaluation.bits_per_byte import bits_per_byte_by_part, score_export

    kept = run.folder.with_suffix(".scores.json")
    if kept.is_file() and kept.stat().st_mtime > (run.folder / "model.safetensors").stat().st_mtime:
        return json.loads(kept.read_text(encoding="utf-8"))
    corpus = load_corpus(data_dir)
    parts = bits_per_byte_by_part(score_export(run.folder, corpus, split="validation"), corpus.split("validation"))
    found = {"all": parts.all, "kjv": parts.translations.get("kjv"), "translations": parts.translations}
    write_json_atomic(kept, found)
    return found


def table(scores: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| mix | seeds | King James part | all translations |", "| --- | ---: | ---: | ---: |"]
    for name, found in scores.items():
        cells = []
        for key in ("kjv", "all"):
            values = [one[key] for one in found]
            deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{deviation}")
        lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = settled(command_line(__doc__, "mixes").parse_args(arguments))
    runs = plan(options)
    failed = make(runs, options.root)
    scores: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        if run.result() is not None:
            log.info("scoring %s", run.name)
            scores.setdefault(run.label, []).append(score(run, options.data_dir))
    print(table(scores))
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
