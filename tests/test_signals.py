"""Signals: the first one lets the step finish, a second SIGINT exits at once, and checkpoints stay intact."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mvlm_core.errors import Stopped
from mvlm_core.signals import PARENT_VARIABLE, StopRequest
from mvlm_core.training.checkpoint import newest_checkpoint
from tests.helpers import MODELS, REPOSITORY


def test_signals_are_deferred_until_raise_at_once(handlers, capfd):
    stop = StopRequest()
    stop.defer()
    assert not stop.is_set()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.is_set() and stop.number == signal.SIGTERM
    assert "SIGTERM: finishing this step" in capfd.readouterr().err
    with pytest.raises(Stopped) as caught:
        stop.raise_at_once()
    assert caught.value.signal_number == signal.SIGTERM
    with pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_signals_raise_within_the_context_and_earlier_handlers_are_restored(handlers):
    earlier = signal.signal(signal.SIGTERM, lambda *_: None)
    mine = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is mine and earlier is not mine
    answers = []

    def in_a_thread():
        with StopRequest() as stop:
            stop.defer()
            answers.append(stop.is_set())

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert answers == [False] and signal.getsignal(signal.SIGTERM) is mine


def test_missing_parent_process_counts_as_sigterm(monkeypatch):
    monkeypatch.setenv(PARENT_VARIABLE, str(os.getppid()))
    assert not StopRequest().is_set()
    monkeypatch.setenv(PARENT_VARIABLE, "999999")
    stop = StopRequest()
    assert stop.is_set() and stop.number == signal.SIGTERM


@pytest.mark.parametrize(
    "script, work",
    [
        ("prepare_dataset.py", "bible_corpus.build.build_corpus"),
        ("make_report.py", "mvlm_core.pipeline.report.make_report"),
    ],
)
def test_scripts_without_checkpoints_clean_up_after_sigterm(tmp_path, script, work):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/training_summary.json").write_text('{"models": {}}')
    place = "--data_dir" if script == "prepare_dataset.py" else "--work_dir"
    code = (
        "import runpy, sys, time\nfrom pkgutil import resolve_name\n"
        "def work(*_, **__):\n    try: print('working', flush=True); time.sleep(60)\n    finally: print('cleaned up')\n"
        f"module, name = {work!r}.rsplit('.', 1)\nsetattr(resolve_name(module), name, work)\n"
        f"sys.argv = ['x', {place!r}, {str(tmp_path)!r}]\nrunpy.run_path({script!r}, run_name='__main__')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[0] == "cleaned up\n" and process.returncode == 143
    finally:
        process.kill()


def test_second_sigint_exits_at_once_and_keeps_the_checkpoint(tiny_corpus, tmp_path):
    """A step that never ends, as on a hung GPU: the first SIGINT waits for it, the second does not."""
    script = tmp_path / "hangs.py"
    script.write_text(
        "import time\nfrom tests import helpers\nfrom tests.training import distributed_run\n"
        "from mvlm_core.signals import StopRequest\n"
        "from mvlm_core.training.gradients import GradientAccumulator\n"
        "helpers.StopAfter.defer = StopRequest.defer\n"
        "real = GradientAccumulator.run_micro_batch\n"
        "def hanging(self, step, *arguments, **named):\n"
        "    while step == 12: print('hanging', flush=True); time.sleep(0.2)\n"
        "    return real(self, step, *arguments, **named)\n"
        "GradientAccumulator.run_micro_batch = hanging\n"
        "distributed_run.main()\n"
    )
    command = [sys.executable, str(script), str(tiny_corpus), str(tmp_path), MODELS[0], "99"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "hanging\n", process.stderr.read()
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None, "the first one waits for the step"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.communicate()
    assert newest_checkpoint(tmp_path / MODELS[0] / "checkpoints").step == 10
