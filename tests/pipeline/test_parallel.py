"""``parallel_map``: concurrent, in order, threads split between workers, and no processes left behind."""

import multiprocessing
import os
import subprocess
import sys
import time

import psutil
import pytest

from mvlm_core.errors import UserError
from mvlm_core.pipeline.parallel import parallel_map


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")


def wait_for(file):
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, f"{file.name} does not appear"
        time.sleep(0.01)


def meet(folder, name, other):
    """Wait until the other worker has started as well."""
    (folder / name).touch()
    wait_for(folder / other)
    return name, os.getpid(), os.environ["OMP_NUM_THREADS"]


def end(how, folder):
    if how == "raises":
        wait_for(folder / "started")
        raise UserError(["one problem", "another"])
    if how == "dies":
        os._exit(3)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (folder / "pid").write_text(str(child.pid))
        (folder / "started").touch()
        child.wait()
    finally:
        child.kill()
        child.wait()


def test_two_calls_run_concurrently_and_split_the_threads(tmp_path):
    each = [(tmp_path, "a", "b"), (tmp_path, "b", "a")]
    (a, *one), (b, *two) = parallel_map(meet, each, on_cpu=True)
    assert (a, b) == ("a", "b") and one[0] != two[0] and os.getpid() not in (one[0], two[0])
    assert one[1] == two[1] == "1" and os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("threads, on_cpu, each", [("1", True, 2), ("3", False, 2), ("3", True, 1)])
def test_one_thread_gpu_or_one_call_runs_in_the_current_process(tmp_path, monkeypatch, threads, on_cpu, each):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    found = list(parallel_map(meet, [(tmp_path, "a", "a")] * each, on_cpu=on_cpu))
    assert found == [("a", os.getpid(), threads)] * each


def test_worker_errors_are_reraised_and_end_the_other_workers_and_their_children(tmp_path):
    with pytest.raises(UserError) as caught:
        list(parallel_map(end, [("raises", tmp_path), ("waits", tmp_path)], on_cpu=True))
    assert caught.value.problems == ["one problem", "another"]
    assert not multiprocessing.active_children()
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_crashed_worker_raises_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        list(parallel_map(end, [("dies", tmp_path), ("dies", tmp_path)], on_cpu=True))


def test_killing_the_parent_ends_its_workers_and_their_children(tmp_path):
    code = f"""
import sys
from pathlib import Path
from mvlm_core.pipeline.parallel import parallel_map
from tests.pipeline.test_parallel import end
if __name__ == "__main__":
    list(parallel_map(end, [("waits", Path({str(tmp_path)!r}))] * 2, on_cpu=True))
"""
    (tmp_path / "parent.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], env=environment) as parent:
        wait_for(tmp_path / "started")
        below = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    psutil.wait_procs(below, timeout=20)
    assert len(below) >= 3 and not any(process.is_running() for process in below)
