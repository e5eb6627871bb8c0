"""How programs end: exit codes, and no traceback where a reader has seen enough."""

import signal
import subprocess
import sys

import pytest

from tests.helpers import REPOSITORY

PROGRAM = "from mvlm_core.errors import *; run_main(lambda: {})"


def run(body, **pipes):
    return subprocess.Popen([sys.executable, "-c", PROGRAM.format(body)], stderr=subprocess.PIPE, text=True, **pipes)


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("None", 0, ""),
        ("1", 1, ""),
        ("(_ for _ in ()).throw(UserError(['a is bad', 'b\\x1b too']))", 2, "error: a is bad\nerror: b\\x1b too\n"),
        ("(_ for _ in ()).throw(TrainingFailed('the disk is full'))", 1, "failed: the disk is full\n"),
        (
            "(_ for _ in ()).throw(Stopped(15))",
            143,
            "stopped by SIGTERM; run the same command again to resume\n",
        ),
    ],
)
def test_each_end_has_its_exit_code_and_words(body, code, said):
    program = run(body)
    assert program.communicate()[1] == said
    assert program.returncode == code


def test_a_pipe_that_is_closed_early_ends_it_quietly():
    program = run("[print(number) for number in range(10**6)]", stdout=subprocess.PIPE)
    assert program.stdout.readline() == "0\n"
    program.stdout.close()
    assert program.stderr.read() == ""
    assert program.wait() == 128 + signal.SIGPIPE


@pytest.mark.parametrize("script", ["train_all_models.py", "mvlm_trainer.py", "generate.py"])
def test_outside_the_environment_a_program_says_how_to_start(script):
    """``-S`` leaves the installed packages out, as another Python does."""
    done = subprocess.run(
        [sys.executable, "-S", REPOSITORY / script, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "setup_environment.sh" in done.stderr and ".venv/bin/python" in done.stderr
