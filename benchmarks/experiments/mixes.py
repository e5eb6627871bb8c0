"""Compare data mixes: train model 2 on the same budget of text with different shares of each translation.

    python -m benchmarks.experiments.mixes --seeds 3 --max_bytes 1400000

The translations are near-duplicates: how much of the budget should go to the primary one? Each mix is scored on the
validation books of the primary translation, and of all translations, weighted by bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import command
from benchmarks.experiments import runner
from benchmarks.experiments.runner import Figures, ResultsBySeed, Run, Variant
from bible_corpus.books import PRIMARY_TRANSLATION
from mvlm_core.console import log
from mvlm_core.data.corpus import load_corpus
from mvlm_core.errors import run_main
from mvlm_core.files import write_json_atomic

PRIMARY = f"bible/{PRIMARY_TRANSLATION}"
MIXES = {"all alike": {"train_mix": ""}} | {f"primary {n} times": {"train_mix": f"{PRIMARY}={n}"} for n in (4, 16, 64)}
MIXES["primary only"] = {"train_mix": "", "data_subset": PRIMARY}
VARIANTS = {name: Variant("simone_enhanced", overrides=overrides) for name, overrides in MIXES.items()}


def score(run: Run, data_dir: Path) -> Figures:
    """Compute bits per byte on the validation books of all translations, cached next to the run for this corpus."""
    from mvlm_core.evaluation.bits_per_byte import bits_per_byte_by_part, score_export

    corpus, cached = load_corpus(data_dir), run.folder.with_suffix(".scores.json")
    if cached.is_file() and cached.stat().st_mtime > (run.folder / "model.safetensors").stat().st_mtime:
        scores = json.loads(cached.read_text(encoding="utf-8"))
        if scores.get("corpus") == corpus.fingerprint:
            return scores
    log.info("scoring %s", run.name)
    parts = bits_per_byte_by_part(score_export(run.folder, corpus, split="validation"), corpus.split("validation"))
    primary = parts.translations.get(corpus.primary_translation)
    scores = {"corpus": corpus.fingerprint, "all": parts.all, "primary": primary, "translations": parts.translations}
    write_json_atomic(cached, scores)
    return scores


def table(results: ResultsBySeed) -> str:
    rows = [
        (name, len(seeds), *(command.deviation([one[key] for one in seeds.values()]) for key in ("primary", "all")))
        for name, seeds in results.items()
    ]
    return command.table(("mix", "seeds", "primary translation", "all translations"), rows)


def main(arguments: list[str] | None = None) -> int:
    options = runner.checked(runner.command_line(__doc__, "mixes", VARIANTS).parse_args(arguments))
    variants = {name: VARIANTS[name] for name in command.parse_only(options.only, VARIANTS)}
    runs = runner.make_runs(variants, options, runner.shared_values(options))
    return runner.run_experiment(runs, options, table, lambda run, _: score(run, options.data_dir))


if __name__ == "__main__":
    run_main(main)
