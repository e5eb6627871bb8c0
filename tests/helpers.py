"""Shared helpers: a tiny real corpus, tiny real runs, and hostile input."""

from __future__ import annotations

import hashlib
import json
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, patch

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import prioritary_mvlm.enhanced_trainer  # noqa: F401  imported before a test forks, instead of once in each child
from benchmarks.experiments.runner import SETTINGS, recipe_of
from benchmarks.reliability.fault_injection import without_times
from mvlm_core import command_line
from mvlm_core.hardware import choose_hardware
from mvlm_core.signals import StopRequest
from mvlm_core.training.checkpoint import newest_checkpoint
from mvlm_core.training.distributed import SINGLE_RANK, Ranks
from mvlm_core.training.history import read_history
from mvlm_core.training.loop import TrainingLoop
from mvlm_core.training.preparation import prepare_text
from mvlm_core.training.task import Run, build_task

REPOSITORY = Path(__file__).resolve().parent.parent
FIXTURES = REPOSITORY / "tests" / "fixtures"
SAMPLE = FIXTURES / "kjv_sample.txt"
# The sample's books: number, name, first chapter, and split, as in the real corpus.
BOOKS = (
    (1, "genesis", 1, "train"),
    (8, "ruth", 1, "validation"),
    (19, "psalms", 1, "train"),
    (21, "ecclesiastes", 1, "test"),
    (40, "matthew", 5, "train"),
    (43, "john", 1, "train"),
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without CUDA")

# --- a corpus ------------------------------------------------------------------------------------------------


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


def modernised(text: str) -> str:
    """Another wording of the same verses, standing in for a second translation."""
    for old, new in (("thou", "you"), ("thee", "you"), ("thy", "your"), ("unto", "to"), ("hath", "has")):
        text = text.replace(f" {old} ", f" {new} ")
    return text


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


# --- runs ----------------------------------------------------------------------------------------------------

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


def parse_settings(cls: type, arguments: Iterable[str], output_dir: Path | str) -> Any:
    """Settings of a trainer's command line, without preparing this process for training."""
    preparations = ("outlive_terminal", "set_process_environment", "setup_logging")
    with patch.multiple(command_line, **dict.fromkeys(preparations, DEFAULT)):
        return command_line.trainer_settings(
            cls, list(arguments), description="", epilog="", output_dir=Path(output_dir)
        )


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


def everything_on(model: str) -> dict[str, float]:
    """Settings that turn on dropout, gradient accumulation and all losses of the model."""
    losses = {"alignment_weight": 0.5, "coherence_weight": 0.3} if model == "simone_enhanced" else {}
    return {"dropout": 0.1, "gradient_accumulation_steps": 2, **losses}


def make_loop(model: str, settings: Any, ranks: Ranks = SINGLE_RANK, compiled: bool = False) -> TrainingLoop:
    """The training loop as the trainers build it, not yet started.

    Args:
        compiled: as a run on a GPU is.
    """
    recipe = recipe_of(model)
    hardware = choose_hardware(
        device=settings.device, precision=settings.precision, deterministic=settings.deterministic
    )
    if compiled:
        hardware = replace(hardware, compile=True, loss_kernel="compiled")
    text = prepare_text(settings, recipe.tokenizer_class)
    run = Run(recipe, settings, hardware, ranks)
    run.output_dir.mkdir(parents=True, exist_ok=True)
    return TrainingLoop(run, build_task(run, text))


def final_state(loop: TrainingLoop) -> tuple[dict, dict, list[dict], dict]:
    """Weights, optimizer tensors, history and state of a run's newest checkpoint; without times, hence reproducible."""
    checkpoint = newest_checkpoint(loop.checkpoints.root)
    history = [without_times(record) for record in read_history(loop.step_log.path)]
    return checkpoint.tensors("model"), checkpoint.tensors("optimizer"), history, without_times(checkpoint.state)


def assert_same_end(expected: tuple, found: tuple) -> None:
    """Assert that two results of ``final_state``, or their first parts, are bit-identical."""
    for tensors, others in zip(expected[:2], found[:2], strict=True):
        assert tensors and tensors.keys() == others.keys()
        differing = [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])]
        assert not differing, differing
    assert expected[2:] == found[2:], (expected[2:], found[2:])


class StopAfter(StopRequest):
    """A signal that arrives in the ``steps``-th step of this process."""

    def __init__(self, steps: int | None = None) -> None:
        super().__init__()
        self.steps, self.asked = steps, 0

    def defer(self) -> None:
        pass

    def is_set(self) -> bool:
        self.asked += 1  # the loop asks once a step
        if self.steps is not None and self.asked >= self.steps:
            self.signal_number = 15
        return self.signal_number is not None


class DelayedThread:
    """Replaces the checkpoint writer's thread: does its work when the loop waits for it.

    That is the latest possible moment, or with ``ended`` the earliest, at the loop's next step boundary.
    """

    ended = False

    def __init__(self, target: Callable[[], None], name: str) -> None:
        self.join = target

    def start(self) -> None:
        pass

    def is_alive(self) -> bool:
        return not self.ended


class ThreadOfOneStep(DelayedThread):
    ended = True


class ImmediateThread(ThreadOfOneStep):
    """Does its work when started, as if there were no thread."""

    def __init__(self, target: Callable[[], None], name: str) -> None:
        self.start = target

    def join(self) -> None:
        pass


# --- hostile input -------------------------------------------------------------------------------------------

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # lone surrogates and control characters too
HUGE = 10**400
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | ANY_TEXT
    | st.sampled_from([HUGE, -HUGE, 0, -1, "", "0", "nan", "../x", "/etc/passwd", "\ud800", "x" * 5000, 1e308])
)
ANY_JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3), max_leaves=8
)
# Files that are never valid JSON of the expected kind: fixed cases that random search would not find.
BROKEN_JSON = {
    "empty": b"",
    "cut": b'{"title": "In the begin',
    "not JSON": b"{title: yes}",
    "list": b"[1, 2]",
    "null": b"null",
    "number": b"7",
    "string": b'"split"',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep and closed": b"[" * 900 + b"]" * 900,
    "huge number": b'{"quality_score": ' + b"9" * 5000 + b"}",
    "huge exponent": b'{"quality_score": 1e999999999}x',
    "surrogate": b'{"split": "\\ud800", "book": "\\udfff"',
    "NUL": b'{"a": "\0"}',
    "UTF-16 without a mark": '{"split": "train"}'.encode("utf-16-le"),
    "UTF-16 cut": b"\xff\xfe{",
    "Latin-1": b'{"title": "caf\xe9"}',
    "two values": b'{"a": 1}{"b": 2}',
    "trailing comma": b'{"a": 1,}',
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00",
    "binary": bytes(range(256)),
}


def cases(count: int) -> settings:
    """Settings for ``count`` examples, the same ones in every run."""
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def damaged(data: bytes, seed: int, zeros: int = 64) -> bytes:
    """``data`` with one kind of damage: a flipped bit, a cut, an insertion, zeros or a repeated part."""
    rng, data = random.Random(seed), bytearray(data)
    place = rng.randrange(len(data))
    match rng.randrange(5):
        case 0:
            data[place] ^= 1 << rng.randrange(8)
        case 1:
            del data[place:]
        case 2:
            data[place:place] = rng.randbytes(rng.randrange(1, 600))
        case 3:
            data[place : place + zeros] = bytes(len(data[place : place + zeros]))
        case 4:
            data[place:place] = data[place // 2 : place]
    return bytes(data)


def with_a_value_replaced(value: Any, seed: int, new: Any) -> Any:
    """A copy of a JSON value with ``new`` in place of one of its parts, at any depth."""
    rng, copy = random.Random(seed), json.loads(json.dumps(value))
    parent, key, node = None, None, copy
    while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.8):
        parent, key = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = parent[key]
    if parent is None:
        return new
    parent[key] = new
    return copy


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail if the block takes longer."""

    def give_up(*_: object) -> None:
        raise AssertionError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def raises_only(kind: type[Exception], call: Callable[[], Any]) -> tuple[Any, str]:
    """The result of ``call``, or the message of ``kind`` if it is raised; other exceptions propagate."""
    try:
        return call(), ""
    except kind as error:
        assert str(error).strip()
        return None, str(error)


def executable(file: Path, text: str) -> Path:
    """Write an executable script."""
    file.write_text(text, encoding="utf-8")
    file.chmod(0o755)
    return file
