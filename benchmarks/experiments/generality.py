"""Measure generalization beyond the training text: bits per byte of other prose and of the held-out test books.

    python -m benchmarks.experiments.generality models/mvlm_gpt2 models/simone_enhanced --text my_texts

Compared with compressors primed with the train text.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import command
from bible_corpus.import_texts import SUFFIXES, gather
from mvlm_core.data.corpus import Corpus, load_corpus
from mvlm_core.errors import run_main
from mvlm_core.evaluation.compression import LABELS, compared_texts, compressed_bits_by_part
from mvlm_core.export.file_checks import checked_exports
from mvlm_core.hardware import set_process_environment
from mvlm_core.settings import DEFAULT_DATA_DIR
from prioritary_mvlm.config import MODELING_FILES


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


def table(rows: dict[str, dict[str, float]]) -> str:
    """Format a table with a row for each text."""
    columns = list(next(iter(rows.values())))
    cells = [[title, f"{row['bytes']:,}", *(f"{row[key]:.3f}" for key in columns[1:])] for title, row in rows.items()]
    return command.table(("bits per byte", *columns), cells)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = command.new_parser(__doc__)
    parser.add_argument("models", metavar="MODEL", nargs="+", type=Path, help="export folders or .tar.gz archives")
    parser.add_argument("--text", type=Path, required=True, help="folder of .txt and .md files to score")
    parser.add_argument("--data_dir", type=Path, default=DEFAULT_DATA_DIR, help="the corpus the models were trained on")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    from mvlm_core.evaluation.bits_per_byte import load_export

    options = parse_options(arguments)
    problems = []
    if not any(path.suffix.lower() in SUFFIXES for path in options.text.rglob("*")):
        problems.append(f"--text {options.text}: no folder with {' or '.join(SUFFIXES[:2])} files")
    set_process_environment()
    with checked_exports(options.models, MODELING_FILES, problems) as folders:
        corpus = load_corpus(options.data_dir)
        models = {str(place): load_export(folder) for place, folder in zip(options.models, folders, strict=True)}
        rows = text_rows(models, corpus, options.text)
    command.show(table(rows), rows, options)
    return 0


if __name__ == "__main__":
    run_main(main)
