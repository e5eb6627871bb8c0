"""Measure generalization beyond the training text: score other prose, and multiple-choice tasks of lm_eval.

    python -m benchmarks.experiments.generality models/mvlm_gpt2 models/simone_enhanced --text my_texts
    python -m benchmarks.experiments.generality MODEL MODEL --tasks my_task --task_folder FOLDER
    python -m benchmarks.experiments.generality MODEL MODEL --tasks blimp          needs network access once

--text: bits per byte of the folder's .txt and .md files and of the held-out test books, compared with compressors
primed with the train text. --tasks (needs lm_eval): accuracy compared with chance and with a unigram model of the train
text, which only knows word frequencies. Answers with equal scores share the point.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import command
from bible_corpus.import_texts import SUFFIXES, gather
from mvlm_core.data.corpus import Corpus, load_corpus
from mvlm_core.errors import UserError, run_main
from mvlm_core.evaluation.compression import LABELS, compared_texts, compressed_bits_by_part
from mvlm_core.evaluation.results import Mean, as_json, choice_point, mean, share
from mvlm_core.export.file_checks import checked_exports
from mvlm_core.hardware import set_process_environment
from mvlm_core.settings import DEFAULT_DATA_DIR
from prioritary_mvlm.config import MODELING_FILES

WORD = re.compile(r"[a-z]+")
Score = Callable[[str, str], float]  # log probability of a continuation after a context


def unigram(texts: Iterable[str]) -> Score:
    """Score a continuation by the frequencies of its words in ``texts``, add-one smoothed, ignoring the context."""
    counts = Counter(word for text in texts for word in WORD.findall(text.lower()))
    total = math.log(counts.total() + len(counts) + 1)
    return lambda _, continuation: sum(math.log(counts[w] + 1) - total for w in WORD.findall(continuation.lower()))


def answer_questions(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run lm_eval's tasks; return each task's questions: ``choices`` (context, continuation), ``scores``, ``answer``.

    Raises:
        UserError: lm_eval is not installed, or a task is unknown or is not multiple-choice.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("--tasks needs lm_eval: pip install -r requirements-ecosystem.txt") from None
    manager = TaskManager(include_path=options.task_folder and str(options.task_folder))
    if unknown := [name for name in options.tasks.split(",") if name not in manager.all_tasks]:
        raise UserError([f"--tasks {name}: lm_eval knows no such task; is --task_folder right?" for name in unknown])
    samples_by_task = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16),
        tasks=options.tasks.split(","),
        task_manager=manager,
        limit=options.limit,
        log_samples=True,
        bootstrap_iters=0,
    )["samples"]
    questions: dict[str, list[dict[str, Any]]] = {}
    for task, samples in samples_by_task.items():
        if not all(isinstance(sample["target"], int) and len(sample["arguments"]) > 1 for sample in samples):
            raise UserError(f"--tasks {task}: not a multiple-choice task")
        questions[task] = [
            {
                "choices": [tuple(request[:2]) for request in sample["arguments"]],
                "scores": [float(response[0]) for response in sample["filtered_resps"]],
                "answer": sample["target"],
            }
            for sample in samples
        ]
    return questions


def accuracy(questions: list[dict[str, Any]], score: Score | None = None) -> Mean:
    """Return the accuracy on ``questions``, with their stored scores or those of ``score``."""
    return mean(
        [choice_point([score(*c) for c in q["choices"]] if score else q["scores"], q["answer"]) for q in questions]
    )


def task_rows(models: dict[str, tuple[Any, Any]], corpus: Corpus, options: argparse.Namespace) -> dict[str, Any]:
    """Return task → number of questions, chance, and the accuracy of the unigram model and of each model."""
    answers = {name: answer_questions(*loaded, options) for name, loaded in models.items()}
    control = unigram(document.read() for document in corpus.primary_part("train") or corpus.split("train"))
    rows: dict[str, Any] = {}
    for task, questions in next(iter(answers.values())).items():
        rows[task] = {
            "questions": len(questions),
            "chance": mean([1 / len(question["choices"]) for question in questions]).value,
            "unigram": accuracy(questions, control),
        }
        rows[task] |= {name: accuracy(of_model[task]) for name, of_model in answers.items()}
    return rows


def text_rows(models: dict[str, tuple[Any, Any]], corpus: Corpus, folder: Path) -> dict[str, dict[str, float]]:
    """Return text → bits per byte by compressor and by model, for the test books and the texts of ``folder``."""
    from mvlm_core.evaluation.bits_per_byte import score_loaded

    books = [(book.path, book.read()) for book in corpus.primary_part("test") or corpus.split("test")]
    other = [(text.path, text.text) for text in gather(folder, None).texts]
    rows: dict[str, dict[str, float]] = {}
    for title, texts in (("test books", books), (str(folder), other)):
        parts = [text.encode() for _, text in texts]
        size = sum(map(len, parts))
        bits = compressed_bits_by_part(compared_texts(corpus)[0], parts)
        rows[title] = {"bytes": size} | {LABELS[key]: n / size for key, (_, n) in bits.items()}
        for name, (model, tokenizer) in models.items():
            rows[title][name] = score_loaded(model, tokenizer, texts).bits_per_byte
    return rows


def tables(results: dict[str, Any]) -> str:
    parts = []
    if rows := results.get("text"):
        columns = list(next(iter(rows.values())))
        cells = [
            [title, f"{row['bytes']:,}", *(f"{row[key]:.3f}" for key in columns[1:])] for title, row in rows.items()
        ]
        parts.append(command.table(("bits per byte", *columns), cells))
    if rows := results.get("tasks"):
        columns = list(next(iter(rows.values())))[2:]
        parts.append(
            command.table(
                ("accuracy", "questions", "chance", *columns),
                (
                    [task, row["questions"], f"{row['chance']:.1%}"] + [share(as_json(row[key])) for key in columns]
                    for task, row in rows.items()
                ),
            )
        )
    return "\n\n".join(parts)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = command.new_parser(__doc__)
    parser.add_argument("models", metavar="MODEL", nargs="+", type=Path, help="export folders or .tar.gz archives")
    parser.add_argument("--text", type=Path, help="folder of .txt and .md files to score")
    parser.add_argument("--tasks", help="multiple-choice tasks of lm_eval, separated by commas")
    parser.add_argument("--task_folder", type=Path, help="folder with your own tasks' .yaml files")
    parser.add_argument("--limit", type=int, help="use only so many questions of each task")
    parser.add_argument("--data_dir", type=Path, default=DEFAULT_DATA_DIR, help="the corpus the models were trained on")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    from mvlm_core.evaluation.bits_per_byte import load_export

    options = parse_options(arguments)
    problems = [] if options.text or options.tasks else ["give --text FOLDER, --tasks NAMES or both"]
    problems += command.at_least_one(options, "limit")
    if options.text and not any(path.suffix.lower() in SUFFIXES for path in options.text.rglob("*")):
        problems.append(f"--text {options.text}: no folder with {' or '.join(SUFFIXES[:2])} files")
    set_process_environment()
    with checked_exports(options.models, MODELING_FILES, problems) as folders:
        corpus = load_corpus(options.data_dir)
        models = {str(place): load_export(folder) for place, folder in zip(options.models, folders, strict=True)}
        results: dict[str, Any] = {}
        if options.text:
            results["text"] = text_rows(models, corpus, options.text)
        if options.tasks:
            results["tasks"] = task_rows(models, corpus, options)
    command.show(tables(results), as_json(results), options)
    return 0


if __name__ == "__main__":
    run_main(main)
