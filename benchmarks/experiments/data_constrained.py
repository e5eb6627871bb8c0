"""Data-constrained training: spend much compute on little text, over many epochs.

    python -m benchmarks.experiments.data_constrained                   a small twin of the h200 preset, both models
    python -m benchmarks.experiments.data_constrained --only hour       only the King James text, on two cores

The twin has the h200 preset's ratio of text to parameters: whole books in all translations, up to --text_bytes, and
0.9 million parameters. A single model is trained for 3 epochs, a student of such models (``--num_models``) for more.
Compute is in multiples of a single model's three epochs. Scores are on the held-out books in all translations,
and in the primary one only.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import statistics
import tempfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks import command
from benchmarks.experiments import runner
from benchmarks.experiments.runner import Figures, Found, Line, Run
from bible_corpus.books import PRIMARY_TRANSLATION
from mvlm_core.data.corpus import MANIFEST_NAME, load_corpus, validation_subset
from mvlm_core.errors import UserError, run_main
from mvlm_core.export.manifest import training_config
from mvlm_core.metrics import PRIMARY_TEST_BPB
from mvlm_core.training.distillation import relative_step_cost, stages

RATES: dict[str, dict[str, Any]] = {
    "mvlm_gpt2": {"learning_rate": 2e-3},
    "simone_enhanced": {"learning_rate": 0.02, "adamw_learning_rate": 0.01},
}
OWN: dict[str, dict[str, Any]] = {
    "mvlm_gpt2": {"dropout": 0.0},
    "simone_enhanced": {"dropout": 0.1, "output_head": "tied"},
}
TWIN: dict[str, Any] = {"max_length": 256, "vocab_size": 2048, "batch_size": 8, "train_mix": ""}
TWIN |= {"validation_text": "all", "weight_decay": 0.4}
TEXT_BYTES = 500_000
# Shapes by scale: parameters relative to the twin's 0.9 million, and text in proportion. Learning rates at other scales
# follow the rules of benchmarks/experiments/scaling.py, like those of the h200 preset.
SHAPES: dict[float, dict[str, Any]] = {
    0.25: {"hidden_dim": 64, "num_heads": 1, "ff_dim": 256, "num_layers": 2},
    1: {"hidden_dim": 128, "num_heads": 2, "ff_dim": 512, "num_layers": 3},
    4: {"hidden_dim": 256, "num_heads": 4, "ff_dim": 1024, "num_layers": 4},
}
WIDTH_EXPONENTS = {"mvlm_gpt2": -1.05, "simone_enhanced": -0.37}
TEXT_EXPONENTS = {"mvlm_gpt2": 0.0, "simone_enhanced": -0.49}


def _epochs(count: float) -> str:
    return f"{count:g} epoch{'s' * (count != 1)}"


ALONE = (0.5, 1, 2, 3, 9)
RECIPES: dict[str, dict[str, Any]] = {_epochs(count): {"num_epochs": float(count)} for count in ALONE}
RECIPES |= {f"{name} with decay 1.6": RECIPES[name] | {"weight_decay": 1.6} for name in ("3 epochs", "9 epochs")}
# (epochs, number of teachers, epochs of each teacher)
STUDENTS = (
    (4.5, 1, 3),
    (9, 1, 3),
    (18, 3, 3),
    (36, 14, 3),
    (52, 7, 3),
    (209, 7, 3),
    (1, 1, 1),
    (2, 1, 1),
    (4.5, 1, 1),
    (3, 3, 1),
    (9, 3, 1),
    (18, 3, 1),
    (18, 9, 1),
    (60, 9, 1),
)
for count, teachers, of in STUDENTS:
    name = f"{_epochs(count)} with {teachers} teacher{'s' * (teachers > 1)}" + f" of {_epochs(of)}" * (of != 3)
    RECIPES[name] = {"num_epochs": float(count), "num_models": teachers + 1, "teacher_epochs": float(of)}
RECIPES |= {
    f"{name} and dropout {dropout}": RECIPES[name] | {"dropout": dropout}
    for name, dropout in itertools.product(("3 epochs", "9 epochs with 1 teacher"), (0.0, 0.1, 0.3))
}
TWINS = {
    f"{model} {name}": Line(model, changes=TWIN | OWN[model] | recipe)
    for (name, recipe), model in itertools.product(RECIPES.items(), RATES)
    if recipe.get("dropout") != OWN[model]["dropout"]  # otherwise it equals the line without dropout in its name
}
HOUR: dict[str, Any] = {"data_subset": f"bible/{PRIMARY_TRANSLATION}", "train_mix": "", "max_length": 512}
HOUR |= {"hidden_dim": 192, "num_heads": 3, "ff_dim": 768, "num_layers": 6, "vocab_size": 4096, "batch_size": 8}
HOUR |= {"weight_decay": 0.2, "num_models": 3, "num_epochs": 9.0}
HOUR_RATES = RATES | {"simone_enhanced": RATES["simone_enhanced"] | {"adamw_learning_rate": 0.006}}
HOURS = {
    name: Line(model, changes=HOUR_RATES[model] | OWN[model] | HOUR)
    for name, model in {"hour": "simone_enhanced", "mvlm_gpt2 hour": "mvlm_gpt2"}.items()
}
LINES = TWINS | HOURS


def few_books(options: argparse.Namespace) -> Path:
    """Return a data folder with train books up to ``--text_bytes``, in all translations, and all held-out books.

    Raises:
        UserError: every train book is larger than ``--text_bytes``.
    """
    folder = options.work_dir / f"text-{options.text_bytes}"
    if folder.is_dir():
        return folder
    corpus, books, left = load_corpus(options.data_dir), defaultdict(list), options.text_bytes
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
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=options.work_dir))
    files = [Path(document.path).with_suffix(kind) for document in kept for kind in (".txt", ".json")]
    for file in (Path(MANIFEST_NAME), *files):  # the manifest names the primary translation
        (staging / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(corpus.root / file, staging / file)
    with suppress(OSError):  # another process may have created it first
        staging.rename(folder)
    shutil.rmtree(staging, ignore_errors=True)
    return folder


def plan(options: argparse.Namespace) -> list[Run]:
    """Create a run for each line and seed.

    Raises:
        UserError: an unknown line.
    """
    lines = {name: LINES[name] for name in command.chosen(options.only, LINES, TWINS)}
    shared = runner.shared_values(options, test_score=True) | {"eval_interval": 10**6, "processes": options.processes}
    if lines.keys() & TWINS.keys():
        twin = SHAPES[options.scale] | {"data_dir": str(few_books(options))}
        lines = {
            name: Line(line.model, changes=line.changes | twin | rates(line.model, options.scale))
            if name in TWINS
            else line
            for name, line in lines.items()
        }
    return runner.plan(lines, options, shared)


def rates(model: str, scale: float) -> dict[str, Any]:
    """Return a model's learning rates at this scale."""
    width = SHAPES[scale]["hidden_dim"] / SHAPES[1]["hidden_dim"]
    factor = width ** WIDTH_EXPONENTS[model] * scale ** TEXT_EXPONENTS[model]
    return {name: value * factor for name, value in RATES[model].items()}


def compute(run: Run) -> float:
    """Return the compute of a run's teachers and student, in multiples of a single model's three epochs."""
    return sum((stage.num_epochs or 0) / 3 * relative_step_cost(stage) for stage in stages(run.settings()))


def figures(run: Run) -> Figures:
    """Return a finished run's results and compute."""
    return (run.result() or {}) | {"compute": compute(run)}


def table(found: Found) -> str:
    """Format a table with a row for each line with finished runs."""
    columns = ("line", "seeds", "parameters", "compute", "validation", "test", f"test, {PRIMARY_TRANSLATION}")
    rows = []
    for name, seeds in found.items():
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
    """Format a table of teachers, their ensemble and the student, for lines with several teachers and finished runs."""
    from mvlm_core.evaluation.bits_per_byte import score_loaded
    from mvlm_core.training.preparation import read_corpus

    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for run in runs:
        settings = run.settings()
        *teachers, _ = [Path(str(stage.output_dir)) for stage in stages(settings)]
        if len(teachers) < 2 or (result := run.result()) is None:
            continue
        alone = [training_config(teacher)["results"]["validation_bpb"] for teacher in teachers]
        ensemble, (corpus, _) = Ensemble(teachers), read_corpus(settings)
        texts = validation_subset(corpus, whole=settings.validation_text == "all")
        named = ((document.path, text) for document, text in texts)
        together = score_loaded(ensemble, ensemble.tokenizer, named).bits_per_byte
        found[run.label].append((statistics.mean(alone), together, result["validation_bpb"]))
    columns = ("line", "seeds", "teachers alone", "their ensemble", "student", "share of the ensemble's gain")
    rows = []
    for label, scores in found.items():
        shares = [(alone - student) / (alone - together) for alone, together, student in scores]
        values = [*map(command.spread, zip(*scores, strict=True)), command.spread(shares, "{:.2f}")]
        rows.append((label, len(scores), *values))
    return command.table(columns, rows)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = runner.command_line(__doc__, "data_constrained", LINES)
    parser.add_argument("--scale", type=float, choices=SHAPES, default=1, help="size and text of the twin [default 1]")
    parser.add_argument("--text_bytes", type=int, help=f"text of the twin [default {TEXT_BYTES:,} times --scale]")
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
    runs = plan(options)
    code = runner.run_experiment(runs, options, table, figures)
    if options.ensembles:
        print("\n" + ensemble_table(runs))
    return code


if __name__ == "__main__":
    run_main(main)
