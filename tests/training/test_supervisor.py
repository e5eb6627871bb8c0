"""The supervisor: number of ranks, their environment, exit codes, and how a run with a dead rank ends."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from mvlm_core import hardware
from mvlm_core.errors import Stopped, TrainingError, UserError
from mvlm_core.export.manifest import TEACHERS, training_config, verify_folder
from mvlm_core.signals import PARENT_VARIABLE
from mvlm_core.training import supervisor
from mvlm_core.training.checkpoint import newest_checkpoint
from mvlm_core.training.history import read_history
from mvlm_core.training.run import run_training
from mvlm_core.training.supervisor import FOLDER_VARIABLE, Supervisor, describe_gpus, rank_count
from tests.helpers import REPOSITORY, TINY, StopAfter, make_loop, recipe_of, tiny_settings
from tests.training.test_distributed import in_ranks


def settings_with(tmp_path, **changes):
    return tiny_settings("mvlm_gpt2", tmp_path, tmp_path, **changes)


# --- how many -----------------------------------------------------------------------------------------------------


def test_all_gpus_are_used_unless_fewer_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "gpu_count", lambda: 8)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def count(**changes):
        return rank_count(settings_with(tmp_path, **changes))

    assert count(device="cuda", batch_size=32) == count(device="auto", batch_size=32) == 8
    assert count(device="cuda", batch_size=32, gpus=3) == 3
    assert count(device="cuda", batch_size=4) == 4, "a batch of four sequences has no part for the others"
    assert count(device="cpu", batch_size=32) == 1
    assert "across 8 of the 8 on this machine" in describe_gpus(settings_with(tmp_path, device="cuda", batch_size=32))
    assert "none here" in describe_gpus(settings_with(tmp_path, device="cpu"))
    for wrong in ({"gpus": 9, "device": "auto"}, {"gpus": 1}, {"processes": 2, "device": "auto"}):
        with pytest.raises(UserError):
            count(**wrong)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert count(device="cuda", batch_size=32) == 1, "a rank starts no ranks"
    with pytest.raises(UserError, match="without torchrun"):
        count(processes=2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    refusal = (
        "--num_models 2: not supported on several machines, as the student reads its teachers from one machine's disk"
    )
    with pytest.raises(UserError, match=refusal):
        count(num_models=2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert count(num_models=2) == 1
    monkeypatch.setenv(FOLDER_VARIABLE, "/somewhere")
    assert count(processes=2) == 1


def test_run_training_refuses_to_start_processes(tiny_corpus, tmp_path):
    with pytest.raises(UserError, match="command line"):
        run_training(recipe_of("mvlm_gpt2"), tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, processes=2))


# --- the supervisor, with small programs in the place of a trainer -------------------------------------------------

START = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in (("_POLL_SECONDS", 0.02), ("_GRACE_SECONDS", 0.5)):
        monkeypatch.setattr(supervisor, name, seconds)


def supervised(program, world=2, log_file=None, shares_memory=True):
    return Supervisor([sys.executable, "-c", START + program], world, log_file, shares_memory=shares_memory)


@pytest.mark.parametrize("code", [0, 1, 2, 130, 143])
def test_supervisor_returns_the_main_ranks_exit_code(code, quick):
    # If all ranks fail, the first one is the cause; so with code 1 only the main rank fails.
    other = "time.sleep(60)" if code == 1 else "sys.exit(1)"
    assert supervised(f"sys.exit({code}) if rank == 0 else {other}").run() == code


def test_ranks_get_their_environment_and_use_only_the_loopback(tmp_path, quick):
    program = f"""
keys = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE {FOLDER_VARIABLE} {PARENT_VARIABLE} GLOO_SOCKET_IFNAME".split()
memory = os.fstat(int(os.environ["{supervisor.MEMORY_VARIABLE}"])).st_size
folder = os.environ["{FOLDER_VARIABLE}"]
mode = oct(os.stat(folder).st_mode & 0o777)
open(f"{tmp_path}/seen{{rank}}", "w").write(" ".join([os.environ[key] for key in keys] + [str(memory), mode]))
print("hello of", rank)
"""
    assert supervised(program, 3, str(tmp_path / "logs" / "train.log")).run() == 0
    seen = [(tmp_path / f"seen{rank}").read_text().split() for rank in range(3)]
    folder = seen[0][4]
    size = str(3 * supervisor.SHARED_BYTES)
    assert seen == [
        [str(r), "3", str(r), "3", folder, str(os.getpid()), "lo", size, oct(stat.S_IRWXU)] for r in range(3)
    ]
    assert not Path(folder).exists()
    assert (tmp_path / "logs" / "train.log.rank2").read_text() == "hello of 2\n"


@pytest.mark.parametrize(("own", "expected"), [(None, "8"), ("7", "7")])
def test_ranks_share_the_compilers_workers_unless_the_user_sets_their_number(
    own, expected, tmp_path, quick, monkeypatch
):
    """The supervisor, like the job before it, has already set the number for a single process."""
    monkeypatch.setattr(hardware, "available_threads", lambda: (24, ""))
    monkeypatch.setenv(hardware.COMPILE_THREADS, own or "placeholder")
    if own is None:
        monkeypatch.delenv(hardware.COMPILE_THREADS)
    hardware.set_process_environment()
    program = f"open(f'{tmp_path}/seen{{rank}}', 'w').write(os.environ['{hardware.COMPILE_THREADS}'])"
    assert supervised(program, 3, str(tmp_path / "log")).run() == 0
    assert [(tmp_path / f"seen{rank}").read_text() for rank in range(3)] == [expected] * 3


def test_killed_rank_is_reported_with_its_last_log_lines(quick):
    program = "print('line of', rank, flush=True)\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    started = time.monotonic()
    with pytest.raises(
        TrainingError, match=r"(?s)process 1 of 3 was killed by SIGKILL.*rank1\.log.*line of 1"
    ) as error:
        supervised(program, 3).run()
    assert time.monotonic() - started < 20
    kept = Path(str(error.value).split("the end of ")[1].split(":")[0])
    assert kept.exists()
    for file in kept.parent.iterdir():
        file.unlink()
    kept.parent.rmdir()


def test_unresponsive_rank_is_blamed_instead_of_the_waiting_ones(quick, tmp_path):
    """As when an exchange times out: the waiting ranks report it and exit, the hung one does not."""
    program = f"""
if rank == 1: time.sleep(60)
open(os.environ["{FOLDER_VARIABLE}"] + f"/lost.{{rank}}", "w")
sys.exit(1)
"""
    with pytest.raises(TrainingError, match="process 1 of 3 does not respond"):
        supervised(program, 3, str(tmp_path / "log")).run()


@pytest.mark.parametrize("on_cpu", [True, False])
def test_ranks_that_lost_each_other_get_advice_about_nccl_only_on_gpus(on_cpu, quick, tmp_path):
    program = f"""
open(os.environ["{FOLDER_VARIABLE}"] + f"/lost.{{rank}}", "w")
sys.exit(1)
"""
    with pytest.raises(TrainingError, match="the 2 processes lost contact with each other") as error:
        supervised(program, 2, str(tmp_path / "log"), shares_memory=on_cpu).run()
    assert ("--gpus 1 trains without NCCL; in Docker, --shm-size=1g may help" in str(error.value)) is not on_cpu


def test_main_rank_failure_is_not_blamed_on_waiting_ranks(quick):
    """Ranks that still wait for it, as on GPUs, are not the cause."""
    assert supervised("sys.exit(1) if rank == 0 else time.sleep(60)").run() == 1


def send_soon(*signals):
    def send():
        for number in signals:
            time.sleep(1)
            os.kill(os.getpid(), number)

    threading.Thread(target=send).start()


def test_signals_reach_only_the_main_rank_and_only_once(quick, handlers, tmp_path):
    program = f"""
def note(number, frame): open("{tmp_path}/got", "a").write(f"{{rank}}:{{number}} ")
signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGINT, note)
time.sleep(3)
sys.exit(143)
"""
    send_soon(signal.SIGTERM, signal.SIGTERM)
    assert supervised(program).run() == 143
    assert (tmp_path / "got").read_text() == f"0:{int(signal.SIGTERM)} "


def test_second_sigint_kills_the_ranks(quick, handlers):
    send_soon(signal.SIGINT, signal.SIGINT)
    started = time.monotonic()
    program = "signal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    assert supervised(program).run() == 130
    assert time.monotonic() - started < 20


def test_missing_parent_process_counts_as_sigterm(quick, monkeypatch):
    monkeypatch.setenv(PARENT_VARIABLE, "999999")
    assert supervised("time.sleep(60)").run() == 143


# --- real trainings ------------------------------------------------------------------------------------------------


def started(corpus, work, steps, wait_for, **changes):
    """A run of ``steps`` steps that has reached step ``wait_for``, and its ranks' processes."""
    values = TINY | {"data_dir": corpus, "output_dir": work / "out", "cache_dir": work / "cache", "processes": 2}
    values |= changes | {"max_steps": steps}
    flags = [f"--{name}={value}" for name, value in values.items() if name != "quiet"]
    command = [sys.executable, REPOSITORY / "SIM-ONE Training/enhanced_train.py", *flags, "--quiet"]
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    history = work / "out" / "training_history.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (history.exists() and len(history.read_text().splitlines()) >= wait_for):
        assert program.poll() is None, program.stderr.read()
        time.sleep(0.05)
    return program, psutil.Process(program.pid).children()


def test_sigterm_writes_a_checkpoint_and_the_run_resumes_bit_identically(tiny_corpus, tmp_path):
    program, children = started(tiny_corpus, tmp_path / "a", 100_000, wait_for=4)
    addresses = {one.laddr.ip for child in children for one in child.net_connections()}
    assert len(children) == 2 and addresses == {"127.0.0.1"}
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 128 + signal.SIGTERM, program.stderr.read()
    assert not any(child.is_running() for child in children)
    assert len(read_history(tmp_path / "a/out/training_history.jsonl")) >= 4
    stopped_at = newest_checkpoint(tmp_path / "a/out/checkpoints").step
    for work, steps in (("a", 5), ("b", stopped_at + 5)):
        changes = {"max_steps": 100_000, "output_dir": str(tmp_path / work / "out"), "processes": 2}
        settings = tiny_settings("simone_enhanced", tiny_corpus, tmp_path / work, **changes)

        def train(ranks, settings=settings, steps=steps):
            with pytest.raises(Stopped):
                make_loop("simone_enhanced", settings, ranks).run(StopAfter(steps))

        in_ranks(2, train)
    ends = [newest_checkpoint(tmp_path / work / "out/checkpoints") for work in ("a", "b")]
    assert ends[0].step == ends[1].step == stopped_at + 5
    for name in ("model", "optimizer"):
        first, second = (end.tensors(name) for end in ends)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_two_ranks_train_teachers_and_resume_the_student(tiny_corpus, tmp_path):
    """All ranks must wait for a teacher's export, and leave the process group of a teacher that is already finished."""
    changes = {"num_models": 3, "max_hours": 1, "teacher_epochs": 0.2}
    program, _ = started(tiny_corpus, tmp_path, 150, wait_for=2, **changes)
    output = tmp_path / "out"
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 128 + signal.SIGTERM, program.stderr.read()
    again = subprocess.run(program.args, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("already finished") == 2
    teachers = [output / TEACHERS / str(number) for number in range(2)]
    assert not any(verify_folder(folder) for folder in (output, *teachers))
    hours = [training_config(folder)["settings"]["max_hours"] for folder in (*teachers, output)]
    assert hours[0] == hours[1] == pytest.approx(1 / 6) and 0.9 < hours[2] < 1


@pytest.mark.integration
def test_a_stopped_rank_ends_a_real_run_within_two_minutes(tiny_corpus, tmp_path):
    program, children = started(tiny_corpus, tmp_path, 100_000, wait_for=4)
    children[1].suspend()
    assert program.wait(120) == 1
    assert "process 1 of 2 does not respond" in program.stderr.read()
    assert not any(child.is_running() for child in children)
    assert newest_checkpoint(tmp_path / "out" / "checkpoints").step >= 0


@pytest.mark.parametrize("victim", ["supervisor", "rank"])
def test_supervisor_and_ranks_do_not_outlive_each_other(victim, tiny_corpus, tmp_path):
    program, children = started(tiny_corpus, tmp_path, 100_000, wait_for=4)
    (program if victim == "supervisor" else children[1]).kill()
    if victim == "rank":
        assert program.wait(60) == 1
        assert "process 1 of 2 was killed by SIGKILL" in program.stderr.read()
    program.wait(60)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
