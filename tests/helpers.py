"""Shared helpers: a tiny real corpus, tiny real runs, and hostile input."""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
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
from benchmarks.experiments.runner import recipe_of
from benchmarks.reliability.fault_injection import DelayedThread, ThreadOfOneStep, without_times  # noqa: F401
from benchmarks.reliability.tiny_runs import (  # noqa: F401  tests import them from here
    MODELS,
    TINY,
    build_tiny_corpus,
    sample_books,
    tiny_settings,
)
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
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without CUDA")
needs_peak_reset = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel resets no peak here"
)


def touched(size: int) -> mmap.mmap:
    """Memory mapped directly from the system, with every page in use; malloc might keep what is freed."""
    memory = mmap.mmap(-1, size)
    for page in range(0, size, mmap.PAGESIZE):
        memory[page] = 1
    return memory


# --- runs ----------------------------------------------------------------------------------------------------


def parse_settings(cls: type, arguments: Iterable[str], output_dir: Path | str) -> Any:
    """Settings of a trainer's command line, without preparing this process for training."""
    preparations = ("outlive_terminal", "set_process_environment", "setup_logging")
    with patch.multiple(command_line, **dict.fromkeys(preparations, DEFAULT)):
        return command_line.trainer_settings(
            cls, list(arguments), description="", epilog="", output_dir=Path(output_dir)
        )


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


def read_all(descriptor: int) -> bytes:
    """Everything up to the end of the last program that writes to it."""
    seen = []
    while not seen or seen[-1]:
        try:
            seen.append(os.read(descriptor, 1 << 16))
        except OSError:  # how a pseudo-terminal signals its end
            break
    return b"".join(seen)


def executable(file: Path, text: str) -> Path:
    """Write an executable script."""
    file.write_text(text, encoding="utf-8")
    file.chmod(0o755)
    return file
