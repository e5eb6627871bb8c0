"""What the tests share: offline, two threads, and real text that does not need the corpus to be built."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before transformers or tokenizers are imported anywhere: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the programs set it: spinning threads starve each other
os.environ.setdefault("MPLBACKEND", "Agg")

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE = REPOSITORY / "tests" / "data" / "kjv_sample.txt"
# The sample's books: number, name, first chapter, and the part of the corpus, which is the real one's.
BOOKS = (
    (1, "genesis", 1, "train"),
    (8, "ruth", 1, "validation"),
    (19, "psalms", 1, "train"),
    (21, "ecclesiastes", 1, "test"),
    (40, "matthew", 5, "train"),
    (43, "john", 1, "train"),
)
LOCAL_ADDRESSES = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root folder."""
    return REPOSITORY


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    """The same thread count everywhere: sums are split by it, and golden numbers depend on how."""
    import torch

    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Nothing in this process may reach beyond the machine; an integration test may (it installs)."""
    if "integration" in request.keywords:
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        local = isinstance(address, tuple) and address[0] in LOCAL_ADDRESSES
        if self.family != socket.AF_UNIX and not local:
            raise AssertionError(f"a test tried to reach the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def sample_books() -> dict[str, str]:
    """Book name → its text in the sample: a verse a line, a blank line between chapters."""
    books: dict[str, str] = {}
    for part in SAMPLE.read_text(encoding="utf-8").split("=== ")[1:]:
        name, _, text = part.partition("\n")
        books[name.strip()] = text.strip() + "\n"
    return books


@pytest.fixture(scope="session")
def real_text() -> list[str]:
    """44 chapters of the King James Bible, each of 0.5 to 6 KB, 98 KB in all."""
    passages = []
    for text in sample_books().values():
        passages += [chapter.strip() + "\n" for chapter in text.split("\n\n")]
    return passages


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


def modernised(text: str) -> str:
    """Another wording of the same verses, standing in for a second translation."""
    for old, new in (("thou", "you"), ("thee", "you"), ("thy", "your"), ("unto", "to"), ("hath", "has")):
        text = text.replace(f" {old} ", f" {new} ")
    return text


@pytest.fixture
def tiny_corpus(tmp_path: Path) -> Path:
    """Two translations, laid out like the real corpus, with train, validation and test books."""
    return build_tiny_corpus(tmp_path / "corpus")


def build_tiny_corpus(folder: Path) -> Path:
    """Write the tiny corpus into ``folder`` and return it."""
    books = sample_books()
    for translation, change, quality in (("kjv", str, 10.0), ("plain", modernised, 8.0)):
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
                "source": "tests/data/kjv_sample.txt",
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
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny real exports of both models, by name; to be read, not written."""
    from runs import MODELS, recipe_of, tiny_settings

    from mvlm_core.training_run import run_training

    work = tmp_path_factory.mktemp("trained")
    corpus = build_tiny_corpus(work / "corpus")
    for model in MODELS:
        run_training(recipe_of(model), tiny_settings(model, corpus, work))
    return work


@pytest.fixture
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of one folder, into which a test puts its own nvidia-smi; no other trace of a GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    from mvlm_core import resources

    monkeypatch.setattr(resources, "NVIDIA_TRACES", ())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def add_nvidia_smi(folder: Path, script: str) -> None:
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    file.chmod(0o755)


@pytest.fixture
def no_thread_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture
def handlers() -> Iterator[None]:
    """For what sets handlers of SIGINT and SIGTERM: the tests' own come back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
