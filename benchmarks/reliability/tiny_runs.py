"""Tiny real runs for benchmarks and tests: sample chapters in two translations as a corpus, and settings of a run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks.experiments.runner import SETTINGS
from mvlm_core.settings import REPOSITORY_ROOT

SAMPLE = REPOSITORY_ROOT / "tests" / "fixtures" / "kjv_sample.txt"
# The sample's books: number, name, first chapter, and split, as in the real corpus.
BOOKS = (
    (1, "genesis", 1, "train"),
    (8, "ruth", 1, "validation"),
    (19, "psalms", 1, "train"),
    (21, "ecclesiastes", 1, "test"),
    (40, "matthew", 5, "train"),
    (43, "john", 1, "train"),
)


def sample_books() -> dict[str, str]:
    """Book name → its text in the sample: one verse per line, a blank line between chapters."""
    books: dict[str, str] = {}
    for part in SAMPLE.read_text(encoding="utf-8").split("=== ")[1:]:
        name, _, text = part.partition("\n")
        books[name.strip()] = text.strip() + "\n"
    return books


def write_document(file: Path, text: str, metadata: dict) -> None:
    """Write a text with its metadata beside it, as the built corpus does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", newline="")
    metadata = {
        **metadata,
        "word_count": len(text.split()),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    file.with_suffix(".json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def modernized(text: str) -> str:
    """Another wording of the same verses, standing in for a second translation."""
    for old, new in (("thou", "you"), ("thee", "you"), ("thy", "your"), ("unto", "to"), ("hath", "has")):
        text = text.replace(f" {old} ", f" {new} ")
    return text


def build_tiny_corpus(folder: Path) -> Path:
    """Write the tiny corpus into ``folder`` and return it."""
    books = sample_books()
    for translation, change, quality in (("kjv", str, 10.0), ("plain", modernized, 8.0)):
        for number, book, first_chapter, split in BOOKS:
            text = change(books[book])
            chapters = text.strip().split("\n\n")
            verses = [
                f"{chapter}:{verse}"
                for chapter, lines in enumerate(chapters, start=first_chapter)
                for verse in range(1, len(lines.split("\n")) + 1)
            ]
            metadata = {
                "title": f"{book.title()} ({translation.upper()})",
                "author": "King James Version, 1769 text",
                "source": "tests/fixtures/kjv_sample.txt",
                "license": "Public domain",
                "category": "scripture",
                "split": split,
                "quality_score": quality,
                "biblical_alignment": 10.0,
                "translation": translation,
                "book": book.title(),
                "verses": verses,
            }
            write_document(folder / "bible" / translation / f"{number:02d}-{book}.txt", text, metadata)
    (folder / "corpus_manifest.json").write_text(json.dumps({"primary_translation": "kjv"}), encoding="utf-8")
    return folder


TINY = {
    "preset": "smoke",
    "data_subset": "bible/kjv",
    "hidden_dim": 32,
    "num_heads": 2,
    "ff_dim": 64,
    "num_layers": 2,
    "max_length": 32,
    "vocab_size": 400,
    "batch_size": 4,
    "max_steps": 12,
    "eval_interval": 4,
    "checkpoint_interval": 5,
    "log_interval": 2,
    "device": "cpu",
    "precision": "fp32",  # golden numbers and tolerances must also hold on processors with bf16
    "quiet": True,
}
MODELS = tuple(SETTINGS)


def tiny_settings(model: str, data_dir: Path, work: Path, **changes: Any) -> Any:
    """Settings of a run of a second or two; its output folder is ``work/<model>``."""
    values = {
        **TINY,
        "data_dir": str(data_dir),
        "output_dir": str(work / model),
        "cache_dir": str(work / "cache"),
        **changes,
    }
    return SETTINGS[model](**values)
