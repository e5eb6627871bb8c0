"""Shared fixtures: no network, a fixed number of threads, and real text that does not need the built corpus."""

from __future__ import annotations

import os
import pty
import signal
import socket
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvlm_core.data.corpus import Corpus, load_corpus
from tests.export.exports import copy_export
from tests.helpers import MODELS, REPOSITORY, build_tiny_corpus, recipe_of, sample_books, tiny_settings

IN_PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
LOCAL_ADDRESSES = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root folder."""
    return REPOSITORY


def pytest_configure(config: pytest.Config) -> None:
    """One thread for subprocesses of a test when tests run in parallel (pytest-xdist)."""
    if IN_PARALLEL:
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process per core; the slow tests, which use every core, and a single file run in this process."""
    slow = "integration" in config.option.markexpr and "not integration" not in config.option.markexpr
    one_file = len(config.option.file_or_dir) == 1 and ".py" in config.option.file_or_dir[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if slow or one_file or cores == 1 else min(cores, 4)


@pytest.fixture(scope="session", autouse=True)
def fixed_threads() -> None:
    """A fixed number, because sums are split by it: golden losses differ by 3e-7 between one thread and two."""
    import torch

    torch.set_num_threads(1 if IN_PARALLEL else 2)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Blocks connections to other machines in this process, except for integration tests, which install packages."""
    if "integration" in request.keywords:
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        local = isinstance(address, tuple) and address[0] in LOCAL_ADDRESSES
        if self.family != socket.AF_UNIX and not local:
            raise AssertionError(f"a test tried to reach the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def real_text() -> list[str]:
    """44 chapters of the King James Bible, each of 0.5 to 6 KB, 98 KB in all."""
    passages = []
    for text in sample_books().values():
        passages += [chapter.strip() + "\n" for chapter in text.split("\n\n")]
    return passages


@pytest.fixture
def tiny_corpus(tmp_path: Path) -> Path:
    """Two translations, laid out like the real corpus, with train, validation and test books."""
    return build_tiny_corpus(tmp_path / "corpus")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The tiny corpus; read-only."""
    return load_corpus(build_tiny_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny real exports of both models, by name; read-only."""
    from mvlm_core.training.run import run_training

    work = tmp_path_factory.mktemp("trained")
    corpus = build_tiny_corpus(work / "corpus")
    for model in MODELS:
        run_training(recipe_of(model), tiny_settings(model, corpus, work))
    return work


@pytest.fixture
def export(trained: Path, tmp_path: Path) -> Path:
    """A copy of model 1's tiny export at <work_dir>/models/mvlm_gpt2, which a test may change."""
    return copy_export(trained / "mvlm_gpt2", tmp_path / "work" / "models" / "mvlm_gpt2")


@pytest.fixture
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of one empty folder, for a test's own nvidia-smi; no other trace of a GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    from mvlm_core import machine

    monkeypatch.setattr(machine, "NVIDIA_TRACES", ())
    monkeypatch.setattr(machine, "DEVICE_FILE", str(folder / "no such device"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


@pytest.fixture
def no_thread_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a pseudo-terminal that changes nothing; the test closes the second one, the program's."""
    leader, follower = pty.openpty()
    tty.setraw(follower)
    yield leader, follower
    os.close(leader)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Restores the handlers of SIGINT and SIGTERM after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
