"""How programs end: exit codes, and short messages instead of tracebacks."""

import signal
import subprocess
import sys

import pytest

from tests.helpers import REPOSITORY

PROGRAM = "from mvlm_core.errors import *; run_main(lambda: {})"


def run(body, **pipes):
    return subprocess.Popen([sys.executable, "-c", PROGRAM.format(body)], stderr=subprocess.PIPE, text=True, **pipes)


def test_refused_run_creates_no_log_file(tmp_path):
    (tmp_path / "empty").mkdir()
    command = [sys.executable, str(REPOSITORY / "mvlm_trainer.py"), "--preset", "smoke", "--device", "cpu"]
    command += ["--output_dir", str(tmp_path / "out"), "--log_file", str(tmp_path / "logs" / "run.log")]
    command += ["--resume_from", str(tmp_path / "empty")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and f"--resume_from {tmp_path / 'empty'}" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("None", 0, ""),
        ("1", 1, ""),
        ("(_ for _ in ()).throw(UserError(['a is bad', 'b\\x1b too']))", 2, "error: a is bad\nerror: b\\x1b too\n"),
        ("(_ for _ in ()).throw(TrainingError('the disk is full'))", 1, "failed: the disk is full\n"),
        (
            "open('/dev/full', 'wb', buffering=0).write(b'x')",
            1,
            "failed: [Errno 28] No space left on device; free space or fix the permissions, then run the same command "
            "again\n",
        ),
        ("open('/dev/null/x')", 1, "failed: [Errno 20] Not a directory: '/dev/null/x'\n"),
        ("(_ for _ in ()).throw(ConnectionResetError(104, 'reset'))", 1, "failed: [Errno 104] reset\n"),
        (
            "(_ for _ in ()).throw(Stopped(15))",
            143,
            "stopped by SIGTERM; run the same command again, without --fresh and --resume_from, to resume\n",
        ),
    ],
)
def test_exit_codes_and_stderr_messages(body, code, said):
    program = run(body)
    assert program.communicate()[1] == said
    assert program.returncode == code


def test_closed_stdout_pipe_exits_quietly_with_sigpipe():
    program = run("[print(number) for number in range(10**6)]", stdout=subprocess.PIPE)
    assert program.stdout.readline() == "0\n"
    program.stdout.close()
    assert program.stderr.read() == ""
    assert program.wait() == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    "script",
    [
        *("train_all_models.py", "mvlm_trainer.py", "generate.py"),
        *("SIM-ONE Training/enhanced_train.py", "SIM-ONE Training/train.py"),
    ],
)
def test_running_without_installed_packages_prints_setup_instructions(script):
    """``-S`` leaves out the installed packages, as another Python would, and ``-E`` PYTHONPATH."""
    done = subprocess.run(
        [sys.executable, "-SE", REPOSITORY / script, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "setup_environment.sh" in done.stderr and ".venv/bin/python" in done.stderr
