"""The main job with stand-ins for the scripts it starts: order, summary, failures, signals, lock, arguments."""

import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

import train_all_models
from mvlm_core.data.corpus import load_corpus
from mvlm_core.errors import UserError
from mvlm_core.export import formats
from mvlm_core.export.archive import check_archive, read_checksums, sha256_file
from mvlm_core.files import LOCK_NAME
from mvlm_core.run_layout import Layout
from mvlm_core.training import supervisor
from tests.helpers import REPOSITORY, executable, read_all, without_cuda

# Acts like a trainer; MODE_<model> in the environment selects what it does.
TRAINER = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
if "--dry_run" in sys.argv:
    print("an hour,")
    plan = {"lines": ["2 GB"], "items": [], "steps": int(os.environ.get("STEPS", 9)), "assumptions": []}
    print(json.dumps(plan | {"gpus": 0, "export_bytes": 0}))
    sys.exit(os.environ.get("MODE_dry_run"))
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, name = Path(flags["--output_dir"]), Path(flags["--output_dir"]).name
out.mkdir(parents=True, exist_ok=True)
mode = os.environ.get(f"MODE_{name}", "ok")
log = open(flags["--log_file"], "a", buffering=1)
def say(text):
    print(text, flush=True); print(text, file=log)
signals = []
def handle(number, frame):
    signals.append(number); say(f"received {number}")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, handle)
(out / "pid").write_text(str(os.getpid()))
say(f"{name} starts, terminal {sys.stderr.isatty()}")
if mode == "fail":
    raise RuntimeError("the loss went up in smoke")
if mode == "bad":
    sys.exit(2)
if mode == "loud":
    print("a progress bar\\n" * 10_000)
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if mode in ("slow", "deaf") and not (out / "checkpoint").exists():
    say("waiting")
    while mode == "deaf" or not signals:
        time.sleep(0.02)
    time.sleep(0.1)
    (out / "checkpoint").write_text(json.dumps(signals))
    sys.exit(128 + signals[0])
time.sleep(float(os.environ.get("SECONDS_EACH", 0)))
second = name == "simone_enhanced"
results = {
    "parameters": 1010 if second else 1000, "steps": 9, "tokens": 500, "bytes": 2000,
    "seconds": float(os.environ.get("SECONDS_TAKEN", 3)),
    "tokens_per_second": 166.0, "validation_bpb": 1.9 if second else 2.0, "test_bpb": 1.8 if second else 1.9,
    "test_bpb_kjv": 1.7, "peak_memory_bytes": 10**8,
}
if "UNTESTED" in os.environ:
    results["test_bpb"] = results["test_bpb_kjv"] = None
config = {
    "model": name, "preset": flags["--preset"], "settings": {"seed": 0}, "results": results,
    "data": {"fingerprint": os.environ["FINGERPRINT"], "only": None}, "hardware": {"device": "cpu"},
}
history = [
    {"bytes": 1000, "seconds": 1.0, "train_loss": 5.0},
    {"bytes": 2000, "seconds": 3.0, "train_loss": 4.0, "validation_bpb": 2.0},
]
files = {
    "training_config.json": json.dumps(config),
    "training_history.json": json.dumps(history),
    "model.safetensors": f"{name} {mode}",
}
for file, text in files.items():
    (out / file).write_text(text)
digests = {file: hashlib.sha256(text.encode()).hexdigest() for file, text in files.items()}
if mode == "incomplete":
    (out / "model.safetensors").unlink()
(out / "manifest.json").write_text(json.dumps({"format": 1, "name": name, "files": digests}))
say("finished")
"""

VALIDATOR = """
import json, os, sys
from pathlib import Path
models = Path(sys.argv[sys.argv.index("--work_dir") + 1]) / "models"
if os.environ.get("VALIDATOR") == "crash":
    sys.exit("out of luck")
bad = os.environ.get("VALIDATOR", "").split(",")
asked = json.loads((models / "training_summary.json").read_text())["models"]
found = {}
for name, entry in asked.items():
    if entry["status"] == "finished":
        check = {"name": "hashes", "passed": name not in bad, "detail": "differs"}
        found[name] = {"passed": name not in bad, "checks": [check]}
(models / "validation_report.json").write_text(json.dumps({"models": found}))
sys.exit(any(name in bad for name in found) or len(found) < len(asked))
"""

# Writes the requested formats of any export; fails for the export named by FORMATS_FAIL.
FORMATS = """
import os, sys
from pathlib import Path
from mvlm_core.export.formats import RECORD, manifest_sha256
from mvlm_core.export.manifest import write_manifest
from mvlm_core.files import sha256_file, write_json_atomic
export, output = Path(sys.argv[1]), Path(sys.argv[3])
assert sys.argv[2] == "--output" and not output.exists()
if export.name == os.environ.get("FORMATS_FAIL"):
    sys.exit("the graph says something else")
output.mkdir()
kinds = [flag.removeprefix("--") for flag in sys.argv[4:]]
write_json_atomic(output / RECORD, {"source": manifest_sha256(export), "formats": kinds})
write_manifest(output, output.name, {RECORD: sha256_file(output / RECORD)})
"""

# The evaluation suite and the report: their failures are logged and do not stop the job.
OPTIONAL = "import sys; sys.exit('not today')"


class Job:
    """The real train_all_models.py in a subprocess, with the stand-ins as its scripts."""

    def __init__(self, folder: Path, data_dir: Path, whole: bool = False):
        self.work_dir, self.data_dir = folder / "work", data_dir
        self.layout = Layout(self.work_dir)
        stand_ins = {"trainer": TRAINER, "validator": VALIDATOR, "optional": OPTIONAL, "formats": FORMATS}
        for name, text in stand_ins.items():
            (folder / f"{name}.py").write_text(text)
        self.runner = folder / "runner.py"
        self.runner.write_text(
            textwrap.dedent(f"""
            import os, sys
            sys.path.insert(0, {str(REPOSITORY)!r})
            from pathlib import Path
            import train_all_models as entry
            from mvlm_core.errors import run_main
            from mvlm_core.pipeline import stages
            here = Path({str(folder)!r})
            entry.TRAINERS = dict.fromkeys(entry.TRAINERS, here / "trainer.py")
            own = {{"validate": here / "validator.py", "formats": here / "formats.py"}}
            entry.SCRIPTS = dict.fromkeys(entry.SCRIPTS, here / "optional.py") | own
            entry.missing_packages = lambda formats: []
            if not {whole}:     # torch and matplotlib take seconds to import; one test has them
                entry.probe_hardware = lambda job: {{"device": "cpu: some", "lines": []}}
                stages.plots.plot_comparison = stages.compression_baselines = (
                    lambda *given: 1 / 0 if "FAULTY_COMPARISON" in os.environ else {{}}
                )
            if __name__ == "__main__":  # the hardware probe starts a process
                run_main(entry.main)
        """)
        )

    def command(self, *flags: str) -> list[str]:
        places = ["--data_dir", str(self.data_dir), "--work_dir", str(self.work_dir)]
        return [sys.executable, str(self.runner), "--preset", "smoke", *places, *flags]

    def environment(self, **extra: str) -> dict:
        return os.environ | {"FINGERPRINT": load_corpus(self.data_dir).fingerprint} | extra

    def run(self, *flags: str, **extra: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*flags), env=self.environment(**extra), text=True, capture_output=True, timeout=60
        )

    def start(self, *flags: str, stdout=subprocess.PIPE, **extra: str) -> subprocess.Popen:
        environment = self.environment(**extra)
        return subprocess.Popen(
            self.command(*flags), env=environment, text=True, stdout=stdout, stderr=subprocess.STDOUT
        )

    def summary(self) -> dict:
        return json.loads(self.layout.summary.read_text())

    def statuses(self) -> set[str]:
        return {entry["status"] for entry in self.summary()["models"].values()}

    def offered(self) -> list[str]:
        return sorted(path.name for path in self.layout.downloads.glob("*.gz"))

    def wait_for(self, name: str, text: str) -> None:
        deadline, log = time.monotonic() + 30, self.layout.log_file(name)
        while time.monotonic() < deadline:
            if log.exists() and text in log.read_text():
                return
            time.sleep(0.02)
        raise AssertionError(f"{name} never said {text!r}")


@pytest.fixture
def job(tmp_path, tiny_corpus):
    return Job(tmp_path, tiny_corpus)


ARCHIVES = ["mvlm_gpt2_model.tar.gz", "simone_enhanced_model.tar.gz"]
CONTRACT = """
status parameters tokens bytes seconds tokens_per_second validation_bpb test_bpb test_bpb_kjv peak_memory_bytes
size_bytes archive
""".split()


def test_full_run_then_rerun_keeps_the_archives(tmp_path, tiny_corpus):
    job = Job(tmp_path, tiny_corpus, whole=True)
    done = job.run()
    assert done.returncode == 0, done.stdout + done.stderr
    summary = job.summary()
    assert list(summary) == ["device", "preset", "started", "finished", "models", "comparison"]
    assert summary["preset"] == "smoke" and summary["device"].startswith("cpu")
    assert summary["finished"] >= summary["started"]
    assert list(summary["models"]) == ["mvlm_gpt2", "simone_enhanced"]
    for name, entry in summary["models"].items():
        assert set(entry) == set(CONTRACT) and None not in entry.values()
        assert entry["status"] == "finished" and entry["archive"] == f"models_for_download/{name}_model.tar.gz"
        assert check_archive(job.work_dir / entry["archive"]) == []
        files = [path for path in job.layout.export(name).iterdir() if path.name != "pid"]
        assert entry["size_bytes"] == sum(path.stat().st_size for path in files)
    assert summary["comparison"]["test_bpb"]["ratio"] == pytest.approx(1.8 / 1.9)
    assert summary["comparison"]["parameters"]["equal_within_2_percent"] is True
    assert summary["comparison"]["compression_baselines"]["translation"] == "kjv"
    notes = {"SHA256SUMS", "training_summary.json", "DOWNLOAD_INSTRUCTIONS.md"}
    assert {path.name for path in job.layout.downloads.iterdir()} == notes | set(ARCHIVES)
    subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=job.layout.downloads, check=True, capture_output=True)
    assert json.loads((job.layout.downloads / "training_summary.json").read_text()) == summary
    assert job.layout.comparison_plot.read_bytes().startswith(b"\x89PNG")
    assert done.stdout.index("mvlm_gpt2 starts") < done.stdout.index("simone_enhanced starts")
    stages = [done.stdout.index(f"=== {stage}") for stage in ("comparison", "archives", "validation", "report", "done")]
    assert stages == sorted(stages)
    assert "scp -r" in done.stdout and "test, bits per byte" in done.stdout
    for what in ("evaluation suite", "report"):
        assert f"the {what} failed with exit code 1: not today" in done.stdout
    (log,) = job.layout.logs.glob("h200_training_*.log")
    assert "=== validation" in log.read_text()

    before = {path.name: (path.stat().st_mtime_ns, sha256_file(path)) for path in job.layout.downloads.glob("*.gz")}
    again = Job(tmp_path, tiny_corpus).run()
    assert again.returncode == 0 and again.stdout.count("kept, already up to date") == 2
    assert {p.name: (p.stat().st_mtime_ns, sha256_file(p)) for p in job.layout.downloads.glob("*.gz")} == before


def test_models_of_text_without_a_test_split_are_compared_by_their_validation_scores(job, tmp_path):
    job.data_dir = tmp_path / "my texts"
    job.data_dir.mkdir()
    for name in ("a", "b"):
        (job.data_dir / f"{name}.txt").write_text(f"The text of {name}.\n")
    done = job.run(UNTESTED="1")
    assert done.returncode == 0, done.stdout
    advice = 'no test text; to hold out a file as test text, set "split": "test" in the .json file of the same name'
    assert "1 train, 1 validation, 0 test documents" in done.stdout and f"  corpus: {advice}\n" in done.stdout
    comparison = job.summary()["comparison"]
    headline = "On the validation text simone_enhanced scores 1.9000 bits per byte, mvlm_gpt2 2.0000: 5.0% lower."
    assert comparison["sentences"][0] == headline and comparison["sentences"][-1] == f"There is {advice}."
    assert comparison["test_bpb"] == {"mvlm_gpt2": None, "simone_enhanced": None, "ratio": None}
    assert comparison["evaluation_suite"] == {} and "the evaluation suite failed" not in done.stdout
    (job.data_dir / "a.json").write_text('{"split": "test"}')
    (job.data_dir / "c.txt").write_text("The text of c.\n")
    done = job.run("--fresh")
    assert done.returncode == 0 and "no test text" not in done.stdout
    assert job.summary()["comparison"]["sentences"][0].startswith("On the test text simone_enhanced scores 1.8000")
    assert "the evaluation suite failed" in done.stdout


def test_dates_are_those_of_the_last_run_that_trained_something(job):
    old = {"started": "2020-01-01T00:00:00+00:00", "finished": "2020-01-01T01:00:00+00:00"}

    def dates_after(*flags, earlier=old, **extra):
        job.layout.summary.write_text(json.dumps(job.summary() | earlier))
        job.run(*flags, **extra)
        copy = json.loads((job.layout.downloads / "training_summary.json").read_text())
        assert copy == job.summary()
        return {key: copy[key] for key in old}

    assert job.run().returncode == 0
    assert dates_after() == dates_after("--models", "mvlm_gpt2") == old
    longer, failing = {"SECONDS_TAKEN": "4.5"}, {"MODE_mvlm_gpt2": "fail"}
    for extra in ({"earlier": old | {"finished": None}}, longer, failing, failing):
        new = dates_after(**extra)
        assert old["finished"] < new["started"] <= new["finished"], extra


@without_cuda
def test_job_that_would_train_on_the_cpu_instead_of_a_gpu_is_refused(tmp_path, tiny_corpus):
    job, tools = Job(tmp_path, tiny_corpus, whole=True), tmp_path / "bin"
    tools.mkdir()
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    refused = job.run("--preset", "h200")
    assert refused.returncode == 2 and "--preset h200 would train on the CPU: " in refused.stderr
    assert not job.work_dir.exists()
    executable(tools / "nvidia-smi", "#!/bin/sh\nexit 0\n")
    refused = job.run("--preset", "auto", PATH=path)
    assert refused.returncode == 2 and "--preset auto would train on the CPU: torch " in refused.stderr
    assert not job.work_dir.exists()
    assert job.run("--preset", "auto", "--dry_run", PATH=path).returncode == 0
    done = job.run("--preset", "auto", "--device", "cpu", "--models", "mvlm_gpt2", PATH=path)
    assert done.returncode == 0 and job.summary()["preset"] == "cpu", done.stderr


def test_failing_model_is_recorded_and_the_other_runs(job):
    done = job.run(MODE_mvlm_gpt2="fail")
    assert done.returncode == 1
    models = job.summary()["models"]
    assert models["mvlm_gpt2"]["status"] == "failed" and models["mvlm_gpt2"]["archive"] is None
    assert "RuntimeError: the loss went up in smoke" in models["mvlm_gpt2"]["error"]
    assert "RuntimeError: the loss went up in smoke" in job.layout.log_file("mvlm_gpt2").read_text()
    assert models["simone_enhanced"]["status"] == "finished"
    assert list(read_checksums(job.layout.checksums)) == job.offered() == ARCHIVES[1:]

    again = job.run()
    assert again.returncode == 0 and "error" not in job.summary()["models"]["mvlm_gpt2"]
    assert len(read_checksums(job.layout.checksums)) == 2


def test_killed_trainer_incomplete_export_and_bad_input_are_reported(job):
    done = job.run(MODE_mvlm_gpt2="killed", MODE_simone_enhanced="incomplete")
    assert done.returncode == 1 and "SIGKILL" in job.summary()["models"]["mvlm_gpt2"]["error"]
    assert "its export is incomplete" in job.summary()["models"]["simone_enhanced"]["error"]
    assert job.statuses() == {"failed"} and "no finished model to compare" in done.stdout
    assert job.run(MODE_mvlm_gpt2="bad", MODE_simone_enhanced="bad").returncode == 2


def test_refused_trainers_leave_finished_models_as_they_were(job):
    assert job.run().returncode == 0
    before, archives = job.summary(), read_checksums(job.layout.checksums)
    assert job.run(MODE_mvlm_gpt2="bad", MODE_simone_enhanced="bad").returncode == 2
    assert job.summary() == before and read_checksums(job.layout.checksums) == archives
    done = job.run(MODE_mvlm_gpt2="bad")
    assert done.returncode == 1 and "the finished model in" in done.stdout
    assert job.statuses() == {"finished"} and job.offered() == ARCHIVES
    assert read_checksums(job.layout.checksums)[ARCHIVES[0]] == archives[ARCHIVES[0]]


def test_interrupted_fresh_run_resumes_without_fresh(job):
    """It has deleted both models, so the second one is neither kept nor refused."""
    assert job.run().returncode == 0
    (job.data_dir / "bible" / "kjv" / "01-genesis.txt").write_text("Something else altogether.\n")
    refused = job.run("--fresh", MODE_dry_run="out of disk space")
    assert refused.returncode == 2 and "out of disk space" in refused.stderr and job.offered() == ARCHIVES
    assert all((job.layout.export(name) / "manifest.json").is_file() for name in job.summary()["models"])
    running = job.start("--fresh", MODE_mvlm_gpt2="slow")
    job.wait_for("mvlm_gpt2", "waiting")
    running.terminate()
    assert running.wait(timeout=20) == 143
    assert not (job.layout.export("simone_enhanced") / "manifest.json").exists()
    assert job.run(MODE_mvlm_gpt2="slow", MODE_simone_enhanced="new").returncode == 0
    assert (job.layout.export("simone_enhanced") / "model.safetensors").read_text() == "simone_enhanced new"


def test_dry_run_says_whether_a_finished_model_is_kept_or_trained_on(job):
    assert job.run().returncode == 0
    assert job.run("--dry_run").stdout.count("9 steps; kept") == 2
    gone = job.run("--dry_run", STEPS="20").stdout
    assert gone.count("9 steps, but no checkpoint to continue from") == gone.count("REFUSED") == 2
    for name in ("mvlm_gpt2", "simone_enhanced"):
        (job.layout.export(name) / "checkpoints" / "step-00000009").mkdir(parents=True)
    assert job.run("--dry_run", STEPS="20").stdout.count("9 steps; continues to 20") == 2


def test_archive_of_a_deleted_model_is_not_offered(job):
    assert job.run().returncode == 0
    running = job.start("--fresh", MODE_mvlm_gpt2="slow")
    job.wait_for("mvlm_gpt2", "waiting")
    running.terminate()
    running.wait(timeout=20)
    done = job.run("--models", "mvlm_gpt2")
    assert done.returncode == 0 and f"{ARCHIVES[1]}: removed, as this run does not offer its model" in done.stdout
    assert list(read_checksums(job.layout.checksums)) == job.offered() == ARCHIVES[:1]


def test_archives_copied_from_elsewhere_are_kept_but_not_listed(job):
    job.layout.downloads.mkdir(parents=True)
    job.layout.archive("simone_enhanced").write_bytes(b"downloaded from another machine")
    assert job.run("--models", "mvlm_gpt2").returncode == 0
    assert job.offered() == ARCHIVES and list(read_checksums(job.layout.checksums)) == ARCHIVES[:1]


def test_model_of_another_text_is_not_packed_beside_a_kept_one(job):
    assert job.run().returncode == 0
    (job.data_dir / "bible" / "kjv" / "01-genesis.txt").write_text("Something else altogether.\n")
    only = ("--models", "simone_enhanced", "--fresh")
    planned, done = job.run("--dry_run", *only), job.run(*only)
    assert planned.returncode == done.returncode == 2
    for told in (planned.stdout, done.stderr):
        assert "mvlm_gpt2: trained on different text" in told and "simone_enhanced: trained" not in told
    assert job.offered() == ARCHIVES and job.statuses() == {"finished"}


def test_report_and_plot_of_an_earlier_run_do_not_outlast_a_failure(job):
    assert job.run().returncode == 0
    for file in (job.layout.report, job.layout.comparison_plot):
        file.write_text("old")
    done = job.run()
    assert done.returncode == 0 and "the report failed" in done.stdout and "open in a browser" not in done.stdout
    assert not job.layout.report.exists() and not job.layout.comparison_plot.exists()


@pytest.mark.parametrize("name, number", [("mvlm_gpt2", signal.SIGINT), ("simone_enhanced", signal.SIGTERM)])
def test_signal_is_forwarded_once_and_the_next_run_resumes(job, name, number):
    running = job.start(**{f"MODE_{name}": "slow"})
    job.wait_for(name, "waiting")
    running.send_signal(number)
    running.wait(timeout=20)
    assert running.returncode == 128 + number
    assert json.loads((job.layout.export(name) / "checkpoint").read_text()) == [number]
    summary = job.summary()
    assert summary["models"][name]["status"] == "interrupted" and summary["finished"] is None
    assert job.offered() == []
    again = job.run(**{f"MODE_{name}": "slow"})
    assert again.returncode == 0, again.stdout
    assert job.statuses() == {"finished"}


def test_second_sigint_kills_the_trainer_and_exits_at_once(job):
    running = job.start(MODE_mvlm_gpt2="deaf")
    job.wait_for("mvlm_gpt2", "waiting")
    pid = int((job.layout.export("mvlm_gpt2") / "pid").read_text())
    running.send_signal(signal.SIGINT)
    job.wait_for("mvlm_gpt2", "received 2")
    assert running.poll() is None
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=10) == 130
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the trainer outlived its pipeline")


def test_job_survives_sighup_and_a_closed_output_pipe(job):
    read_end, write_end = os.pipe()
    running = job.start(stdout=write_end, SECONDS_EACH="0.5")
    os.close(write_end)
    job.wait_for("mvlm_gpt2", "starts")
    os.close(read_end)  # the reader of the output is gone
    running.send_signal(signal.SIGHUP)
    assert running.wait(timeout=60) == 0
    assert job.statuses() == {"finished"}


def test_job_runs_with_closed_standard_streams(job):
    shell = " ".join(f"'{word}'" for word in job.command("--models", "mvlm_gpt2")) + " <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", shell], env=job.environment(), timeout=60).returncode == 0
    assert job.summary()["models"]["mvlm_gpt2"]["status"] == "finished"


def test_terminal_is_forwarded_to_the_trainers(job):
    leader, follower = pty.openpty()
    command = job.command("--models", "mvlm_gpt2")
    running = subprocess.Popen(command, env=job.environment(), stdout=follower, stderr=follower)
    os.close(follower)
    seen = read_all(leader)
    os.close(leader)
    assert running.wait(timeout=30) == 0
    assert b"mvlm_gpt2 starts, terminal True" in seen


def test_a_terminal_that_does_not_read_stops_neither_the_trainers_nor_the_job(job, terminal):
    _, follower = terminal
    running = job.start("--models", "mvlm_gpt2", stdout=follower, MODE_mvlm_gpt2="loud")
    os.close(follower)
    assert running.wait(timeout=60) == 0
    assert job.statuses() == {"finished"}


def test_second_job_in_the_same_folder_is_refused(job):
    first = job.start(MODE_mvlm_gpt2="slow")
    job.wait_for("mvlm_gpt2", "waiting")
    second = job.run()
    assert second.returncode == 2 and str(first.pid) in second.stderr and "in use" in second.stderr
    first.terminate()
    assert first.wait(timeout=20) == 143


def test_all_folders_in_use_are_named_before_training(job):
    folders = [job.layout.models, job.layout.export("mvlm_gpt2") / "checkpoints" / "teachers" / "1"]
    folders.append(job.layout.export("simone_enhanced"))
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / LOCK_NAME).write_text(json.dumps({"pid": os.getpid()}))
    before = sorted(job.work_dir.rglob("*"))
    done, told = job.run(), f"in use by process {os.getpid()} on this machine"
    assert done.returncode == 2 and done.stderr.count(told) == len(folders)
    assert all(f"delete {folder / LOCK_NAME})" in done.stderr for folder in folders)
    assert sorted(job.work_dir.rglob("*")) == before
    for folder in folders:
        (folder / LOCK_NAME).unlink()
    assert job.run().returncode == 0


def test_failed_validation_withdraws_the_archive(job):
    done = job.run(VALIDATOR="simone_enhanced")
    assert done.returncode == 1
    entry = job.summary()["models"]["simone_enhanced"]
    assert entry["status"] == "failed" and "hashes: differs" in entry["error"] and entry["archive"] is None
    assert job.offered() == list(read_checksums(job.layout.checksums)) == ARCHIVES[:1]


def test_archives_are_kept_if_validation_cannot_run(job):
    done = job.run(VALIDATOR="crash")
    assert done.returncode == 1 and "no validation report was written (exit code 1): out of luck" in done.stdout
    assert "the archives are unverified" in done.stdout.split("=== done")[1]
    assert job.statuses() == {"finished"} and job.offered() == list(read_checksums(job.layout.checksums)) == ARCHIVES
    done = job.run()
    assert done.returncode == 0 and "unverified" not in done.stdout


def test_a_fault_in_the_comparison_does_not_cost_the_archives(job):
    done = job.run(FAULTY_COMPARISON="1")
    assert done.returncode == 1 and "ZeroDivisionError" in next(job.layout.logs.glob("h200_training_*.log")).read_text()
    assert "comparison failed; see the error above" in done.stdout
    assert job.statuses() == {"finished"} and job.offered() == list(read_checksums(job.layout.checksums)) == ARCHIVES
    assert json.loads(job.layout.validation_report.read_text())["models"].keys() == job.summary()["models"].keys()
    copy = job.layout.downloads / "training_summary.json"
    assert json.loads(copy.read_text())["models"] == job.summary()["models"]
    assert job.run().returncode == 0 and json.loads(copy.read_text()) == job.summary()
    assert job.summary()["comparison"]["sentences"]


def test_archive_that_cannot_be_written_fails_only_its_model(job):
    assert job.run().returncode == 0
    (job.layout.downloads / f".{ARCHIVES[0]}.partial").mkdir()
    done = job.run(MODE_mvlm_gpt2="new")
    assert done.returncode == 1 and "mvlm_gpt2: not packed: [Errno 21] Is a directory" in done.stdout
    assert "FAILED: mvlm_gpt2: not packed: [Errno 21] Is a directory" in done.stdout.split("=== done")[1]
    assert "free space" not in done.stdout, "the disk is not full"
    assert job.offered() == list(read_checksums(job.layout.checksums)) == ARCHIVES[1:]


def test_models_trained_separately_share_one_summary(job):
    assert job.run("--models", "mvlm_gpt2").returncode == 0
    assert list(job.summary()["models"]) == ["mvlm_gpt2"]
    assert job.run("--models", "simone_enhanced").returncode == 0
    summary = job.summary()
    assert set(summary["models"]) == {"mvlm_gpt2", "simone_enhanced"}
    assert summary["comparison"]["parameters"]["ratio"] == pytest.approx(1.01)
    assert len(read_checksums(job.layout.checksums)) == 2


def test_text_without_the_folder_that_a_finished_model_read_is_different_text(export, tmp_path):
    (own := tmp_path / "own").mkdir()
    (own / "own.txt").write_text("My own words.\n")
    places = ["--work_dir", str(export.parent.parent), "--data_dir", str(own)]
    options = train_all_models.parse(["--preset", "smoke", "--models", "mvlm_gpt2", *places])
    (line,) = train_all_models.make_job(options).differences("mvlm_gpt2")
    assert line.startswith("mvlm_gpt2: trained on different text (4 training documents in ")
    assert line.endswith(f"this run has no text of bible/kjv in {own}")


def test_finished_models_refuse_a_different_preset_seed_or_text(job):
    assert job.run().returncode == 0
    before = job.summary()
    (job.data_dir / "bible" / "kjv" / "01-genesis.txt").write_text("Something else altogether.\n")
    planned = job.run("--dry_run")
    assert planned.returncode == 2 and planned.stdout.count("trained on different text") == 2
    done = job.run()
    assert done.returncode == 2 and "trained on different text" in done.stderr and "--fresh" in done.stderr
    assert before == job.summary()
    planned = job.run("--dry_run", "--preset", "cpu", "--seed", "3").stdout
    assert planned.count("REFUSED") == 2 and "; kept" not in planned
    done = job.run("--preset", "cpu", "--seed", "3")
    assert done.returncode == 2
    lines = [line.removeprefix("error: ").strip("- ") for line in done.stderr.splitlines()]
    refusal = [line for line in lines if "finished with" in line or "trained on different text" in line]
    assert len(refusal) == 4 and all(line in planned for line in refusal), "the dry run says what the run will"
    for name in before["models"]:
        assert f"{name}: finished with --preset smoke; this run asks for cpu" in done.stderr
        assert f"{name}: finished with --seed 0; this run asks for 3" in done.stderr
    assert job.summary() == before
    assert job.run("--fresh").returncode == 0


def test_format_archives_are_packed_kept_and_withdrawn(job):
    two = [f"{name}_formats.tar.gz" for name in ("mvlm_gpt2", "simone_enhanced")]
    assert job.run().returncode == 0 and job.offered() == ARCHIVES
    assert job.run("--formats", "onnx,gguf", FORMATS_FAIL="mvlm_gpt2").returncode == 1
    assert job.statuses() == {"finished"}, "a model is good without them"
    assert job.offered() == sorted([*ARCHIVES, two[1]])
    done = job.run("--formats", "onnx,gguf")
    assert done.returncode == 0 and "no GGUF: only a GPT-2" in done.stdout
    assert job.offered() == sorted(ARCHIVES + two) == sorted(read_checksums(job.layout.checksums))
    assert [check_archive(job.layout.downloads / name) for name in two] == [[], []]
    steps = (job.layout.downloads / "DOWNLOAD_INSTRUCTIONS.md").read_text()
    assert all(f"tar -xzf {name}" in steps for name in two) and steps.index("For other programs") > steps.index("END")
    before = [(job.layout.downloads / name).stat().st_mtime_ns for name in two]
    assert job.run().returncode == 0, "without the flag they are kept"
    assert [(job.layout.downloads / name).stat().st_mtime_ns for name in two] == before
    assert job.run("--models", "mvlm_gpt2", MODE_mvlm_gpt2="other").returncode == 0, "made of an export that is gone"
    assert job.offered() == sorted([*ARCHIVES, two[1]]) and not job.layout.formats("mvlm_gpt2").exists()
    assert job.run(VALIDATOR="simone_enhanced").returncode == 1
    assert job.offered() == ARCHIVES[:1], "both are withdrawn"


# --- arguments ----------------------------------------------------------------------------------------------


def test_max_hours_is_divided_between_the_models(tiny_corpus):
    places = ["--preset", "smoke", "--data_dir", str(tiny_corpus)]
    for models, each in (("mvlm_gpt2,simone_enhanced", 0.25), ("simone_enhanced", 0.5)):
        options = train_all_models.parse(["--max_hours", "0.5", "--models", models, *places])
        command = train_all_models.make_job(options).trainer_command("simone_enhanced")
        assert command[command.index("--max_hours") + 1] == str(each)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--preset", "huge"], "--preset huge"),
        (["--max_hours", "0"], "--max_hours 0"),
        (["--models", "gpt5"], "gpt5"),
        (["--models", ","], "--models"),
        (["--data_dir", "/no/such/folder"], "/no/such/folder"),
        (["--data_dir", __file__], "test_train_all_models.py: no such folder"),
        (["--data_dir", ""], "--data_dir: an empty path"),
        (["--work_dir", ""], "--work_dir: an empty path"),
        (["--max_length", "0"], "--max_length 0"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["--validation_split", "1.5"], "--validation_split 1.5"),
        (["--device", "abacus"], "--device abacus"),
        (["--seed", "-1"], "--seed -1"),
        (["--formats", "onnx,zip"], "--formats zip: unknown; choose from onnx, gguf"),
        (["--formats", "gguf", "--models", "simone_enhanced"], "--formats gguf: only a GPT-2"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, tiny_corpus, flags, words):
    with pytest.raises(UserError) as caught:
        train_all_models.main(["--work_dir", str(tmp_path / "w"), "--data_dir", str(tiny_corpus), *flags])
    assert any(words in problem for problem in caught.value.problems)
    assert not (tmp_path / "w").exists()


def test_processes_on_a_machine_with_gpus_are_refused_before_anything_is_written(tmp_path, tiny_corpus, monkeypatch):
    monkeypatch.setattr(supervisor, "gpu_count", lambda: 1)
    monkeypatch.setattr(train_all_models, "probe_hardware", lambda job: pytest.fail("not refused"))
    flags = ["--work_dir", str(tmp_path / "w"), "--data_dir", str(tiny_corpus), "--preset", "smoke", "--processes", "2"]
    with pytest.raises(UserError, match="--processes 2 is for CPU training"):
        train_all_models.main(flags)
    assert not (tmp_path / "w").exists()
    with pytest.raises(pytest.fail.Exception):
        train_all_models.main([*flags, "--device", "cpu"])


def test_missing_format_packages_are_reported_before_training(tmp_path, tiny_corpus, monkeypatch):
    monkeypatch.setitem(formats.PACKAGES, "onnx", ("json", "onnx_not_here"))
    with pytest.raises(UserError, match="--formats onnx needs onnx_not_here: .*pip install -r requirements-extras.txt"):
        train_all_models.main(["--work_dir", str(tmp_path / "w"), "--data_dir", str(tiny_corpus), "--formats", "onnx"])
    assert not (tmp_path / "w").exists()


def test_all_problems_are_reported_in_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    flags = ["--preset", "x", "--models", "a,b", "--batch_size", "0"]
    places = ["--data_dir", str(tmp_path / "no"), "--work_dir", str(tmp_path / "file" / "below")]
    with pytest.raises(UserError) as caught:
        train_all_models.parse([*flags, *places])
    assert len(caught.value.problems) == 6


def test_empty_and_binary_data_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train_all_models, "probe_hardware", lambda job: {})
    data = tmp_path / "data"
    data.mkdir()
    for content in (None, bytes(range(256)) * 20):
        if content:
            (data / "picture.txt").write_bytes(content)
        with pytest.raises(UserError):
            train_all_models.main(["--work_dir", str(tmp_path / "w"), "--data_dir", str(data), "--preset", "smoke"])
        assert not (tmp_path / "w").exists()


def test_dry_run_shows_the_estimates_and_writes_nothing(job, tmp_path, tiny_corpus, monkeypatch, capsys):
    monkeypatch.setattr(train_all_models, "TRAINERS", dict.fromkeys(train_all_models.TRAINERS, tmp_path / "trainer.py"))
    places = ["--work_dir", str(tmp_path / "w"), "--data_dir", str(tiny_corpus)]
    flags = ["--dry_run", "--preset", "smoke", *places, "--quiet", "--max_steps", "7"]
    assert train_all_models.main([*flags, "--fresh"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--max_steps 7 --quiet") + shown.count("--quiet --max_steps 7") == 2
    assert shown.count("starts from scratch (--fresh)") == shown.count("--fresh\n") == 2
    assert shown.count("\n  an hour,\n  2 GB\n") == 2 and shown.startswith("preset:   smoke (requested)\n")
    monkeypatch.setenv("MODE_dry_run", "no such place")
    assert train_all_models.main(flags) == 1, "the code of the trainers"
    shown = capsys.readouterr().out
    assert shown.count("  no estimate: no such place") == 2 and "--fresh" not in shown
    assert not (tmp_path / "w").exists()
