"""The whole job with real trainers, as a user runs it; takes minutes, so `-m integration`."""

import hashlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from benchmarks.reliability.from_clone import shell_blocks
from mvlm_core.export.archive import check_archive
from mvlm_core.export.manifest import verify_folder
from mvlm_core.run_layout import Layout
from tests.helpers import REPOSITORY

pytestmark = pytest.mark.integration

JOB = [sys.executable, str(REPOSITORY / "train_all_models.py"), "--preset", "smoke"]
TRAINERS = {
    "mvlm_gpt2": [sys.executable, "mvlm_trainer.py"],
    "simone_enhanced": [sys.executable, "SIM-ONE Training/enhanced_train.py"],
}
LIMIT = 900


def run(command, cwd=REPOSITORY, **extra) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | extra,
        text=True,
        timeout=LIMIT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def weights(layout: Layout) -> dict[str, str]:
    return {
        name: hashlib.sha256((layout.export(name) / "model.safetensors").read_bytes()).hexdigest() for name in TRAINERS
    }


def wait_for(file: Path, pattern: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if file.exists() and re.search(pattern, file.read_text()):
            return
        assert process.poll() is None, f"ended with {process.returncode} before {pattern!r} came up in {file}"
        time.sleep(0.05)
    raise AssertionError(f"{pattern!r} never came up in {file}")


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Layout:
    """One uninterrupted run of the whole job."""
    layout = Layout(tmp_path_factory.mktemp("reference"))
    done = run([*JOB, "--work_dir", layout.root])
    assert done.returncode == 0, done.stdout
    return layout


def test_full_run_produces_all_promised_outputs(reference):
    summary = json.loads(reference.summary.read_text())
    assert summary["preset"] == "smoke" and list(summary["models"]) == list(TRAINERS)
    for name, entry in summary["models"].items():
        assert entry["status"] == "finished" and None not in entry.values()
        assert 1 < entry["test_bpb_kjv"] < 4 and entry["test_bpb"] == entry["test_bpb_kjv"]
        export = reference.export(name)
        assert verify_folder(export) == []
        for file in (
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "README.md",
            "training_config.json",
            "training_history.json",
            "training_plots.png",
        ):
            assert (export / file).stat().st_size > 0
        history = json.loads((export / "training_history.json").read_text())
        assert [record["step"] for record in history] == list(range(1, len(history) + 1))
        log = reference.log_file(name).read_text()
        assert "\r" not in log and "\x1b" not in log and re.search(r"step (1\d\d)/\1 ", log)
        assert check_archive(reference.archive(name)) == []
    baselines = summary["comparison"]["compression_baselines"]
    assert baselines["xz"] == pytest.approx(1.88, abs=0.03)
    assert baselines["ppmd_order_16"] == pytest.approx(1.51, abs=0.03)
    assert list(summary["comparison"]["evaluation_suite"]) == list(TRAINERS)
    report = json.loads(reference.validation_report.read_text())
    assert report["passed"] and report["rescored"] and all(len(m["samples"]) == 6 for m in report["models"].values())
    assert run(["sha256sum", "-c", "SHA256SUMS"], cwd=reference.downloads).returncode == 0
    assert json.loads((reference.downloads / "training_summary.json").read_text()) == summary
    assert len(list(reference.logs.glob("h200_training_*.log"))) == 1 and reference.comparison_plot.is_file()


def test_job_interrupted_in_both_models_resumes_bit_identically(reference, tmp_path):
    layout = Layout(tmp_path)
    for name, number in (("mvlm_gpt2", signal.SIGINT), ("simone_enhanced", signal.SIGTERM)):
        job = subprocess.Popen([*JOB, "--work_dir", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        wait_for(layout.log_file(name), r"step 45/", job)
        job.send_signal(number)
        assert job.wait(timeout=LIMIT) == 128 + number
        summary = json.loads(layout.summary.read_text())
        assert summary["models"][name]["status"] == "interrupted" and summary["finished"] is None
        assert not (layout.export(name) / "manifest.json").exists()
    done = run([*JOB, "--work_dir", tmp_path])
    assert done.returncode == 0, done.stdout
    for name in TRAINERS:
        assert "resuming from" in layout.log_file(name).read_text()
        steps = [record["step"] for record in json.loads((layout.export(name) / "training_history.json").read_text())]
        assert steps == list(range(1, len(steps) + 1))
    assert weights(layout) == weights(reference)

    archives = {path: path.read_bytes() for path in layout.downloads.glob("*.tar.gz")}
    again = run([*JOB, "--work_dir", tmp_path])  # finished: everything is kept
    assert again.returncode == 0 and again.stdout.count("already finished") == 2, again.stdout
    assert {path: path.read_bytes() for path in layout.downloads.glob("*.tar.gz")} == archives
    assert run([*JOB, "--work_dir", tmp_path, "--preset", "cpu"]).returncode == 2


def test_job_survives_a_closed_terminal_and_a_second_job_is_refused(tmp_path):
    layout = Layout(tmp_path)
    command = [*JOB, "--work_dir", str(tmp_path), "--models", "simone_enhanced", "--max_steps", "60"]
    pid, terminal = pty.fork()
    if pid == 0:  # a session with its own terminal, as over SSH
        os.execv(command[0], command)
    deadline, seen = time.monotonic() + LIMIT, b""
    termios.tcsetwinsize(terminal, (24, 120))  # without a width the progress bar is empty
    os.set_blocking(terminal, False)
    while b"tok/s" not in seen and time.monotonic() < deadline:
        try:
            seen += os.read(terminal, 65536)
        except BlockingIOError:
            time.sleep(0.05)
    second = run(command)
    assert second.returncode == 2 and str(pid) in second.stdout and "in use" in second.stdout
    os.close(terminal)  # SIGHUP to the job, EIO for whatever it writes
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert json.loads(layout.summary.read_text())["models"]["simone_enhanced"]["status"] == "finished"
    assert "=== done" in next(layout.logs.glob("h200_training_*.log")).read_text()


def test_killed_job_can_be_restarted_at_once_and_resumes(tmp_path):
    layout = Layout(tmp_path)
    command = [*JOB, "--work_dir", str(tmp_path), "--models", "mvlm_gpt2"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    wait_for(layout.log_file("mvlm_gpt2"), r"step 25/", job)
    job.kill()
    job.wait()
    done = run(command)
    assert done.returncode == 0, done.stdout
    assert "resuming from" in layout.log_file("mvlm_gpt2").read_text()


def test_failing_model_does_not_stop_the_other(tmp_path):
    layout = Layout(tmp_path)
    layout.export("mvlm_gpt2").mkdir(parents=True)
    (layout.export("mvlm_gpt2") / ".export").write_text("")  # where a folder must be made at the end
    done = run([*JOB, "--work_dir", tmp_path, "--max_steps", "20"])
    assert done.returncode == 1, done.stdout
    summary = json.loads(layout.summary.read_text())
    assert summary["models"]["mvlm_gpt2"]["status"] == "failed"
    assert "the export cannot be written" in summary["models"]["mvlm_gpt2"]["error"]
    assert summary["models"]["simone_enhanced"]["status"] == "finished"
    assert [path.name for path in layout.downloads.glob("*.gz")] == ["simone_enhanced_model.tar.gz"]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Path:
    """The bin folder of a new virtual environment with torch and transformers but nothing from this repository."""
    import torch

    folder = tmp_path_factory.mktemp("stranger") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / "bin" / "python"
    site = run([python, "-c", "import site; print(site.getsitepackages()[0])"]).stdout.strip()
    # A path in a .pth file is added without reading the .pth files in it, such as that of the editable install.
    (Path(site) / "packages.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    for module in ("mvlm_core", "simone_transformer", "prioritary_mvlm"):
        assert run([python, "-c", f"import {module}"], cwd=folder).returncode != 0
    return folder / "bin"


LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = tokenizer("In the beginning God created the heaven and the earth.", return_tensors="pt").input_ids
print(json.dumps(model(input_ids=ids).logits.double().flatten().tolist()))
"""


@pytest.mark.parametrize("name", list(TRAINERS))
def test_extracted_archive_gives_the_same_logits_with_plain_transformers(reference, stranger, tmp_path, name):
    subprocess.run(["tar", "-xzf", reference.archive(name), "-C", tmp_path], check=True)
    (tmp_path / name).rename(tmp_path / "something else.v2")
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    there = run(
        [stranger / "python", "-W", "ignore", "-c", LOGITS, tmp_path / "something else.v2"],
        cwd=tmp_path,
        **offline,
    )
    assert there.returncode == 0, there.stdout
    here = run([sys.executable, "-W", "ignore", "-c", LOGITS, reference.export(name)], HF_HUB_OFFLINE="1")
    first, second = (json.loads(done.stdout.strip().splitlines()[-1]) for done in (there, here))
    assert len(first) == len(second) > 1000
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) < 1e-5


def test_download_instructions_work_as_written(reference, stranger, tmp_path):
    shutil.copytree(reference.downloads, tmp_path / "d")
    blocks = shell_blocks((tmp_path / "d" / "DOWNLOAD_INSTRUCTIONS.md").read_text())
    assert len(blocks) == 3
    path = f"{stranger}:{os.environ['PATH']}"
    for block in blocks:
        done = run(
            ["bash", "-ec", block],
            cwd=tmp_path / "d",
            PATH=path,
            HF_HUB_OFFLINE="1",
            HF_HOME=str(tmp_path / "home"),
        )
        assert done.returncode == 0, done.stdout
    assert done.stdout.count("In the beginning God") == 2
    assert "[y/N]" not in done.stdout  # transformers asks before running remote code, and a script must not wait


def test_validator_finds_a_changed_byte_in_a_real_export(reference, tmp_path):
    shutil.copytree(reference.root, tmp_path / "w")
    file = tmp_path / "w" / "models" / "simone_enhanced" / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b"a", b"b", 1))
    done = run([sys.executable, "validate_models.py", "--work_dir", tmp_path / "w", "--quick"])
    assert done.returncode == 1
    assert "failed: simone_enhanced: hashes" in done.stdout and "failed: mvlm_gpt2" not in done.stdout


def test_trainer_runs_from_inside_its_own_folder(tmp_path):
    done = run(
        [
            sys.executable,
            "enhanced_train.py",
            "--preset",
            "smoke",
            "--data_dir",
            "../mvlm_training_dataset_complete",
            "--output_dir",
            tmp_path / "m",
            "--max_steps",
            "20",
        ],
        cwd=REPOSITORY / "SIM-ONE Training",
    )
    assert done.returncode == 0, done.stdout
    assert verify_folder(tmp_path / "m") == []


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd_places(tmp_path_factory, reference) -> Path:
    """Folders and files that are not usable as input."""
    place = tmp_path_factory.mktemp("odd")
    (place / "empty").mkdir()
    (place / "binaries").mkdir()
    (place / "binaries" / "a.txt").write_bytes(bytes(range(256)) * 50)
    (place / "binaries" / "b.bin").write_bytes(bytes(999))
    (place / "file").write_text("I am a file\n")
    checkpoint = max((reference.export("mvlm_gpt2") / "checkpoints").glob("step-*"))
    shutil.copytree(checkpoint, place / "truncated" / checkpoint.name)
    largest = max((place / "truncated" / checkpoint.name).iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    return place


BAD = [
    ["--data_dir", "{odd}/missing"],
    ["--data_dir", "{odd}/empty"],
    ["--data_dir", "{odd}/binaries"],
    ["--data_dir", "{odd}/file"],
    ["--max_length", "0"],
    ["--batch_size", "0"],
    ["--validation_split", "1.5"],
    ["--preset", "huge"],
    ["--output_dir", "{odd}/file"],
    ["--output_dir", "{odd}/file/below"],
    ["--learning_rate", "-1"],
    ["--hidden_dim", "100", "--num_heads", "12"],
    ["--vocab_size", "10"],
    ["--resume_from", "{odd}/empty"],
    ["--resume_from", "{odd}/missing"],
    ["--resume_from", "{odd}/truncated/{checkpoint}"],
]


def check_refused(command, flags, odd_places, out):
    checkpoint = next((odd_places / "truncated").iterdir()).name
    flags = [flag.format(odd=odd_places, checkpoint=checkpoint) for flag in flags]
    done = run([*command, *flags])
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stdout and "error: " in done.stdout
    written = [path for path in out.rglob("*") if path.is_file()] if out.exists() else []
    assert written == [] and (odd_places / "file").read_text() == "I am a file\n"


@pytest.mark.parametrize("flags", [["--data_dir", "{odd}/empty"], ["--work_dir", "{odd}/file"]], ids=" ".join)
def test_job_rejects_bad_arguments(flags, odd_places, tmp_path):
    check_refused([*JOB, "--work_dir", tmp_path / "w"], flags, odd_places, tmp_path / "w")


@pytest.mark.parametrize("flags", BAD, ids=" ".join)
@pytest.mark.parametrize("name", list(TRAINERS))
def test_trainers_reject_bad_arguments(name, flags, odd_places, tmp_path):
    check_refused(
        [*TRAINERS[name], "--preset", "smoke", "--output_dir", tmp_path / "o"],
        flags,
        odd_places,
        tmp_path / "o",
    )
