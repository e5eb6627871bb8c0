"""Data-constrained training: spend much compute on little text, over many epochs.

    python -m benchmarks.experiments.data_constrained                   proxies of the h200 preset, both models
    python -m benchmarks.experiments.data_constrained --only hour       scored on the King James text, on two cores

A proxy model has the h200 preset's ratio of text to parameters: whole books in all translations, up to --text_bytes,
and 0.9 million parameters. ``3ep`` is a single model trained for three epochs, ``18ep-3x1ep`` the student of three
teachers of one epoch each, trained for 18 epochs. Compute is in multiples of ``3ep``. Scores are on the held-out books
in all translations, and in the primary one only.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import statistics
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks import command
from benchmarks.experiments import runner
from benchmarks.experiments.runner import Figures, ResultsBySeed, Run, Variant
from bible_corpus.books import PRIMARY_TRANSLATION
from mvlm_core.data.corpus import MANIFEST_NAME, load_corpus, validation_subset
from mvlm_core.errors import UserError, run_main
from mvlm_core.export.manifest import training_config
from mvlm_core.files import temporary_folder
from mvlm_core.metrics import PRIMARY_TEST_BPB
from mvlm_core.training.distillation import relative_step_cost, teacher_and_student_settings

RATES: dict[str, dict[str, Any]] = {
    "mvlm_gpt2": {"learning_rate": 2e-3},
    "simone_enhanced": {"learning_rate": 0.02, "adamw_learning_rate": 0.01},
}
PER_MODEL: dict[str, dict[str, Any]] = {
    "mvlm_gpt2": {"dropout": 0.0},
    "simone_enhanced": {"dropout": 0.1, "output_head": "tied"},
}
PROXY: dict[str, Any] = {"max_length": 256, "vocab_size": 2048, "batch_size": 8, "train_mix": ""}
PROXY |= {"validation_text": "all", "weight_decay": 0.4}
TEXT_BYTES = 500_000
# Shapes by scale: parameters relative to the proxy's 0.9 million, and text in proportion. Learning rates at other
# scales follow the rules of benchmarks/experiments/scaling.py, like those of the h200 preset.
SHAPES: dict[float, dict[str, Any]] = {
    0.25: {"hidden_dim": 64, "num_heads": 1, "ff_dim": 256, "num_layers": 2},
    1: {"hidden_dim": 128, "num_heads": 2, "ff_dim": 512, "num_layers": 3},
    4: {"hidden_dim": 256, "num_heads": 4, "ff_dim": 1024, "num_layers": 4},
}
WIDTH_EXPONENTS = {"mvlm_gpt2": -1.05, "simone_enhanced": -0.37}
TEXT_EXPONENTS = {"mvlm_gpt2": 0.0, "simone_enhanced": -0.49}


@dataclass(frozen=True)
class ProxyRecipe:
    """How a proxy model is trained: alone, or as the student of its teachers. ``overrides`` are further settings."""

    epochs: float
    teachers: int = 0
    teacher_epochs: float = 3
    overrides: dict[str, float] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Short name: ``18ep-3x1ep`` is 18 epochs with three teachers of one epoch each."""
        teachers = f"-{self.teachers}x{self.teacher_epochs:g}ep" if self.teachers else ""
        return f"{self.epochs:g}ep{teachers}" + "".join(f"-{name}{value:g}" for name, value in self.overrides.items())

    @property
    def settings(self) -> dict[str, Any]:
        values: dict[str, Any] = {"num_epochs": float(self.epochs)}
        if self.teachers:
            values |= {"num_models": self.teachers + 1, "teacher_epochs": float(self.teacher_epochs)}
        return values | self.overrides


# Epochs, number of teachers, and epochs of each teacher.
STUDENTS = [(1, 1, 1), (2, 1, 1), (4.5, 1, 1), (3, 3, 1), (9, 3, 1), (18, 3, 1), (60, 9, 1)]
STUDENTS += [(4.5, 1, 3), (9, 1, 3), (18, 3, 3), (36, 14, 3), (52, 7, 3), (180, 20, 3), (210, 20, 1)]
RECIPES = [ProxyRecipe(epochs) for epochs in (1, 2, 3)]
RECIPES += [ProxyRecipe(*student) for student in STUDENTS]
RECIPES += [ProxyRecipe(9, 1, overrides={"dropout": dropout}) for dropout in (0.0, 0.1, 0.3)]
PROXIES = {
    f"{model} {recipe.id}": Variant(model, overrides=PROXY | PER_MODEL[model] | recipe.settings)
    for recipe, model in itertools.product(RECIPES, RATES)
    if recipe.overrides.get("dropout") != PER_MODEL[model]["dropout"]  # otherwise it repeats the recipe without it
}
HOUR: dict[str, Any] = {"data_subset": f"bible/{PRIMARY_TRANSLATION}", "train_mix": "", "max_length": 512}
HOUR |= {"hidden_dim": 192, "num_heads": 3, "ff_dim": 768, "num_layers": 6, "vocab_size": 4096, "batch_size": 8}
HOUR |= {"weight_decay": 0.2, "num_models": 3, "num_epochs": 9.0}
# GPT-2 learns too slowly to train teachers as well, or to memorize the other translations (LOG.md, 2026-11-30).
GPT2_HOUR = {"learning_rate": 3e-3, "weight_decay": 0.4, "max_length": 256, "data_subset": None, "train_mix": None}
HOUR_PER_MODEL: dict[str, dict[str, Any]] = {
    "mvlm_gpt2": GPT2_HOUR | {"num_models": 1, "num_epochs": None, "max_steps": 12_000},
    "simone_enhanced": RATES["simone_enhanced"] | {"adamw_learning_rate": 0.006},
}
HOURS = {
    name: Variant(model, overrides=PER_MODEL[model] | HOUR | HOUR_PER_MODEL[model])
    for name, model in {"hour": "simone_enhanced", "mvlm_gpt2 hour": "mvlm_gpt2"}.items()
}
VARIANTS = PROXIES | HOURS


def few_books(options: argparse.Namespace) -> Path:
    """Return a data folder with train books up to ``--text_bytes``, in all translations, and all held-out books.

    Its name contains the size and the corpus's fingerprint.

    Raises:
        UserError: every train book is larger than ``--text_bytes``.
    """
    corpus, books, left = load_corpus(options.data_dir), defaultdict(list), options.text_bytes
    folder = options.work_dir / f"text-{options.text_bytes}-{corpus.fingerprint[:8]}"
    if folder.is_dir():
        return folder
    for document in corpus.split("train"):
        books[document.book].append(document)
    kept = [document for document in corpus.documents if document.split != "train"]
    for book in random.Random(0).sample(list(books), len(books)):
        if (size := sum(document.size for document in books[book])) <= left:
            kept = books[book] + kept
            left -= size
    if left == options.text_bytes:
        raise UserError(f"--text_bytes {left}: every train book is larger, all translations together; raise it")
    options.work_dir.mkdir(parents=True, exist_ok=True)
    staging = temporary_folder(options.work_dir, folder.name)
    files = [Path(document.path).with_suffix(kind) for document in kept for kind in (".txt", ".json")]
    for file in (Path(MANIFEST_NAME), *files):  # the manifest names the primary translation
        (staging / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(corpus.root / file, staging / file)
    with suppress(OSError):  # another process may have created it first
        staging.rename(folder)
    shutil.rmtree(staging, ignore_errors=True)
    return folder


def make_runs(options: argparse.Namespace) -> list[Run]:
    """Create a run for each variant and seed.

    Raises:
        UserError: an unknown variant.
    """
    variants = {name: VARIANTS[name] for name in command.parse_only(options.only, VARIANTS, PROXIES)}
    shared = runner.shared_values(options, test_score=True) | {"eval_interval": 10**6, "processes": options.processes}
    proxies = variants.keys() & PROXIES.keys()
    data_dir = str(few_books(options)) if proxies else ""
    for name in proxies:
        scaled = SHAPES[options.scale] | rates(variants[name].model, options.scale)
        overrides = variants[name].overrides | scaled | {"data_dir": data_dir}
        variants[name] = replace(variants[name], overrides=overrides)
    return runner.make_runs(variants, options, shared)


def rates(model: str, scale: float) -> dict[str, Any]:
    """Return a model's learning rates at this scale."""
    width = SHAPES[scale]["hidden_dim"] / SHAPES[1]["hidden_dim"]
    factor = width ** WIDTH_EXPONENTS[model] * scale ** TEXT_EXPONENTS[model]
    return {name: value * factor for name, value in RATES[model].items()}


def compute(run: Run) -> float:
    """Return the compute of a run's teachers and student, in multiples of a single model's three epochs."""
    models = teacher_and_student_settings(run.settings())
    return sum((model.num_epochs or 0) / 3 * relative_step_cost(model) for model in models)


def figures(run: Run, result: Figures) -> Figures:
    """Return a finished run's results and compute."""
    return result | {"compute": compute(run)}


def table(results: ResultsBySeed) -> str:
    """Format a table with a row for each variant with finished runs."""
    columns = ("variant", "seeds", "parameters", "compute", "validation", "test", f"test, {PRIMARY_TRANSLATION}")
    rows = []
    for name, seeds in results.items():
        runs = list(seeds.values())
        scores = [[run[key] for run in runs] for key in ("validation_bpb", "test_bpb", PRIMARY_TEST_BPB)]
        size = f"{statistics.mean(run['parameters'] for run in runs):,.0f}"
        rows.append((name, len(runs), size, f"{runs[0]['compute']:.1f}", *map(command.spread, scores)))
    return command.table(columns, rows)


class Ensemble:
    """Ensemble of exports that predicts the mean of their probabilities; for scoring only."""

    training, device = False, "cpu"

    def __init__(self, folders: list[Path]) -> None:
        from mvlm_core.evaluation.bits_per_byte import load_export

        loaded = [load_export(folder) for folder in folders]
        self.models, (_, self.tokenizer) = [model for model, _ in loaded], loaded[0]
        self.config = self.models[0].config

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        import torch

        log_probs = [model(**inputs).logits.log_softmax(-1) for model in self.models]
        return SimpleNamespace(logits=torch.stack(log_probs).logsumexp(0))  # up to a constant

    def train(self, _mode: bool) -> None: ...

    def eval(self) -> None: ...


def ensemble_table(runs: list[Run]) -> str:
    """Format a table of teachers, their ensemble and the student, for finished runs with several teachers."""
    from mvlm_core.evaluation.bits_per_byte import score_loaded
    from mvlm_core.training.preparation import read_corpus

    results: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for run in runs:
        settings = run.settings()
        *teachers, _ = [Path(str(model.output_dir)) for model in teacher_and_student_settings(settings)]
        if len(teachers) < 2 or (result := run.result()) is None:
            continue
        alone = [training_config(teacher)["results"]["validation_bpb"] for teacher in teachers]
        ensemble, (corpus, _) = Ensemble(teachers), read_corpus(settings)
        texts = validation_subset(corpus, settings.validation_text)
        named = ((document.path, text) for document, text in texts)
        together = score_loaded(ensemble, ensemble.tokenizer, named).bits_per_byte
        results[run.label].append((statistics.mean(alone), together, result["validation_bpb"]))
    columns = ("variant", "seeds", "teachers alone", "their ensemble", "student", "share of the ensemble's gain")
    rows = []
    for label, scores in results.items():
        shares = [(alone - student) / (alone - together) for alone, together, student in scores]
        values = [*map(command.spread, zip(*scores, strict=True)), command.spread(shares, "{:.2f}")]
        rows.append((label, len(scores), *values))
    return command.table(columns, rows)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = runner.command_line(__doc__, "data_constrained", VARIANTS)
    parser.add_argument("--scale", type=float, choices=SHAPES, default=1, help="size and text of a proxy [default 1]")
    parser.add_argument("--text_bytes", type=int, help=f"text of a proxy [default {TEXT_BYTES:,} times --scale]")
    parser.add_argument("--processes", type=int, default=1, help="CPU workers per run [default 1]")
    parser.add_argument("--ensembles", action="store_true", help="also score the ensemble of each student's teachers")
    options = parser.parse_args(arguments)
    if options.text_bytes is None:
        options.text_bytes = round(options.scale * TEXT_BYTES)
    options = runner.checked(options, "processes", "text_bytes")
    if options.scale != 1:
        options.root = options.root.with_name(f"{options.root.name}-scale-{options.scale:g}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    runs = make_runs(options)
    code = runner.run_experiment(runs, options, table, figures)
    if options.ensembles:
        print("\n" + ensemble_table(runs))
    return code


if __name__ == "__main__":
    run_main(main)
