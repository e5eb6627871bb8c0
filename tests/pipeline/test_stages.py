"""Single stages of the main job, called directly."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import psutil
import pytest

from mvlm_core.cost_estimate import PRICE_PER_HOUR
from mvlm_core.errors import Stopped, UserError
from mvlm_core.pipeline import job as jobs
from mvlm_core.pipeline import stages
from mvlm_core.pipeline.child_process import SignalForwarder
from mvlm_core.pipeline.summary import Summary
from mvlm_core.run_layout import Layout, training_history
from mvlm_core.signals import PARENT_VARIABLE
from tests.helpers import REPOSITORY

EVALUATOR = """
import json, sys
from pathlib import Path
place = sys.argv.index("--json") + 1
exports = [word for word in sys.argv[1:] if "/models/" in word and not word.endswith(".json")]
Path(sys.argv[place]).write_text(json.dumps({"results": {export: {"flags": sys.argv[1:]} for export in exports}}))
"""


def make_job(folder, **changes):
    script = folder / "script.py"
    values = {
        "layout": Layout(folder / "work"),
        "trainers": {"one": script, "two": script},
        "names": ["one", "two"],
        "preset": "smoke",
        "preset_reason": "requested",
        "data_dir": str(folder / "data"),
        "settings": {"device": "cpu", "quiet": True, "max_steps": 5},
        "fresh": False,
        "build_corpus": None,
        "scripts": dict.fromkeys(("evaluate", "validate", "report"), script),
        "prompt": "In the beginning",
    }
    (folder / "work" / "models").mkdir(parents=True, exist_ok=True)
    return jobs.Job(**(values | changes))


def test_trainer_and_script_commands_include_the_job_settings(tmp_path):
    job = make_job(tmp_path, fresh=True)
    command = job.trainer_command("two")
    assert command[:2] == [sys.executable, str(tmp_path / "script.py")]
    assert command[-5:] == ["cpu", "--quiet", "--max_steps", "5", "--fresh"]
    assert command[command.index("--output_dir") + 1] == str(job.layout.export("two"))
    assert command[command.index("--log_file") + 1] == str(job.layout.log_file("two"))
    assert job.script_command("validate", "--x", 1)[2:] == [
        "--x",
        "1",
        "--data_dir",
        job.data_dir,
        "--device",
        "cpu",
    ]


@pytest.mark.parametrize("preset, verses", [("smoke", "40"), ("cpu", "100"), ("h200", None)])
def test_evaluate_suite_returns_results_by_model_and_limits_verses_by_preset(tmp_path, preset, verses):
    (tmp_path / "script.py").write_text(EVALUATOR)
    job = make_job(tmp_path, preset=preset)
    with SignalForwarder() as signals:
        found = stages.evaluate_suite(job, ["two"], signals)
    assert list(found) == ["two"]
    flags = found["two"]["flags"]
    assert flags[0] == str(job.layout.export("two")) and ["--split", "test", "--no_bits_per_byte"] == flags[1:4]
    sizes = dict(zip(flags[4:-2:2], flags[5:-2:2], strict=True))
    assert sizes.get("--verses") == verses and flags[-2:] == ["--device", "cpu"]


def probe_dies(*_):
    os._exit(3)


def test_hardware_probe_reraises_user_errors_and_tolerates_a_crash(tmp_path, monkeypatch):
    found = jobs.probe_hardware(make_job(tmp_path))
    assert found["device"].startswith("cpu: ") and len(found["lines"]) > 2
    with pytest.raises(UserError, match="--attention_backend xformers"):
        jobs.probe_hardware(make_job(tmp_path, settings={"device": "cpu", "attention_backend": "xformers"}))
    monkeypatch.setattr(jobs, "_hardware", probe_dies)
    assert jobs.probe_hardware(make_job(tmp_path))["device"] == "unknown"


def test_only_sigint_and_sigterm_exit_codes_stop_the_job():
    signals = SignalForwarder()
    for code in (0, 1, 2, 128 + 9):
        signals.check(code)
    for number in (2, 15):
        with pytest.raises(Stopped) as caught:
            signals.check(128 + number)
        assert caught.value.signal_number == number


@pytest.mark.parametrize(
    "parent, where, expected", [("gone", "here", True), ("alive", "here", False), ("gone", "there", False)]
)
def test_orphans_write_to_the_export_and_have_lost_their_parent(tmp_path, parent, where, expected):
    command = [sys.executable, "-c", "input('ready\\n')", str(tmp_path / where)]
    environment = os.environ | {PARENT_VARIABLE: str(os.getpid() if parent == "alive" else 1)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()  # before that the process may have no command line yet
        assert stages._is_orphan(psutil.Process(child.pid), tmp_path / "here") is expected
        child.stdin.close()


# Writes one checkpoint more at each start, then ends as MODE says: with an exit code, or by a signal if it is negative.
FAILING = """
import os, sys
from pathlib import Path
export = Path(sys.argv[sys.argv.index("--output_dir") + 1])
place = export / os.environ["WHERE"] / "checkpoints"
count = len([*place.glob("step-*")]) + 1
(place / f"step-{count:08d}").mkdir(parents=True)
(place / f"step-{count:08d}" / os.environ["FILE"]).touch()
print(sys.argv[-1], file=open(export / "starts", "a"))
print("something went wrong", flush=True)
mode = int(os.environ["MODE"])
if mode < 0:
    os.kill(os.getpid(), -mode)
sys.exit(mode)
"""


@pytest.mark.parametrize(
    "mode, where, file, starts",
    [
        (1, ".", "optimizer.safetensors", 3),
        (-signal.SIGKILL, ".", "optimizer.safetensors", 3),
        (-signal.SIGABRT, "checkpoints/teachers/0", "optimizer.safetensors", 3),
        (1, ".", "model.safetensors", 1),
        (2, ".", "optimizer.safetensors", 1),
        (130, ".", "optimizer.safetensors", 1),
        (143, ".", "optimizer.safetensors", 1),
    ],
)
def test_a_failed_trainer_is_started_again_twice_if_it_gets_further(
    mode, where, file, starts, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(stages.log, "propagate", True)
    (tmp_path / "script.py").write_text(FAILING)
    for name, value in {"MODE": mode, "WHERE": where, "FILE": file}.items():
        monkeypatch.setenv(name, str(value))
    job = make_job(tmp_path, names=["one"], fresh=True)
    job.layout.logs.mkdir()
    summary = Summary(job.layout, job.names, preset="smoke", device="cpu")
    stopped = pytest.raises(Stopped) if mode in (130, 143) else nullcontext()
    with stopped, SignalForwarder() as signals:
        assert stages.train_model(job, "one", summary, signals) == (128 - mode if mode < 0 else mode)
    assert (job.layout.export("one") / "starts").read_text().split() == ["--fresh", *["5"] * (starts - 1)]
    assert summary.models["one"]["status"] == ("interrupted" if mode in (130, 143) else "failed")
    assert ("restarting from its newest checkpoint (retry 2 of 2)" in caplog.text) == (starts == 3)
    log = job.layout.log_file("one")
    assert (log.read_text().count("--- ended with exit code") if log.exists() else 0) == (0 if mode > 128 else starts)


# Cannot compile, as a trainer says it; writes an export without.
UNCOMPILABLE = """
import json, sys
from pathlib import Path
from mvlm_core.errors import COMPILATION_FAILED
from mvlm_core.export.manifest import write_manifest
from mvlm_core.files import sha256_file
export = Path(sys.argv[sys.argv.index("--output_dir") + 1])
export.mkdir(parents=True, exist_ok=True)
print(*sys.argv[-5:], file=open(export / "starts", "a"))
if "--no_compile" not in sys.argv or "ALWAYS" in sys.argv[0]:
    sys.exit(f"failed: {COMPILATION_FAILED} (no kernel): add --no_compile\\nand a last line")
config = export / "training_config.json"
config.write_text(json.dumps({"results": {"steps": 9}}))
write_manifest(export, export.name, {config.name: sha256_file(config)})
"""


def test_a_model_that_cannot_be_compiled_is_trained_without_compilation(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(stages.log, "propagate", True)
    (tmp_path / "script.py").write_text(UNCOMPILABLE)
    (always := tmp_path / "ALWAYS.py").write_text(UNCOMPILABLE)
    trainers = {"one": tmp_path / "script.py", "two": always}
    job = make_job(tmp_path, trainers=trainers, settings={"loss_kernel": "compiled"}, fresh=True)
    job.layout.logs.mkdir()
    summary = Summary(job.layout, job.names, preset="smoke", device="cpu")
    with SignalForwarder() as signals:
        assert stages.train_models(job, summary, tmp_path / "job.log", signals) == [0, 1]
    for name in job.names:
        first, second = (job.layout.export(name) / "starts").read_text().splitlines()
        assert first.endswith("--loss_kernel compiled --fresh") and "--no_compile" not in first
        assert second.endswith("--loss_kernel blocks --no_compile"), "which --loss_kernel compiled would contradict"
        assert f"{name}: ended with exit code 1; its last output: failed: torch.compile failed (no" in caplog.text
        assert f"{name}: restarting without torch.compile, more slowly (retry 1 of 2)" in caplog.text
    assert summary.models["one"]["status"] == "finished" and summary.models["two"]["status"] == "failed"


# The real trainer of model 1, as a tiny model; the first start is killed while it writes its second checkpoint.
REAL = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
import mvlm_trainer
from mvlm_core.errors import run_main
killed = Path(__file__).with_name("killed")
def kill(event, arguments):
    if event == "os.rename" and Path(arguments[1]).name == "step-00000008" and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
sys.argv += ["--cache_dir", str(killed.with_name("cache"))]
sys.argv += "--hidden_dim 32 --num_heads 2 --ff_dim 64 --num_layers 2 --vocab_size 400".split()
run_main(mvlm_trainer.main)
"""


def test_a_trainer_killed_after_a_checkpoint_resumes_from_it(tmp_path, tiny_corpus, caplog, monkeypatch):
    monkeypatch.setattr(stages.log, "propagate", True)
    settings = {"device": "cpu", "quiet": True, "max_steps": 12, "max_length": 32, "batch_size": 4}
    settings |= {"checkpoint_interval": 4, "eval_interval": 4}
    (tmp_path / "script.py").write_text(REAL)
    job = make_job(tmp_path, data_dir=str(tiny_corpus), names=["one"], settings=settings, fresh=True)
    summary = Summary(job.layout, job.names, preset="smoke", device="unknown")
    with SignalForwarder() as signals:
        assert stages.train_models(job, summary, tmp_path / "job.log", signals) == [0]
    assert summary.models["one"]["status"] == "finished"
    assert [record["step"] for record in training_history(job.layout.export("one"))] == list(range(1, 13))
    assert caplog.text.count("ended with exit code 137 (killed by SIGKILL)") == 1
    log = job.layout.log_file("one").read_text()
    assert "--- ended with exit code 137" in log and log.count("resuming from") == 1 and "(step 4 of 12)" in log


PLANNER = """
import json, os
assert os.environ["MVLM_PLAN_AS_JSON"]
seconds = {"training steps": 1800.0, "export and test scores": 60.0}
items = [{"name": name, "seconds": value, "detail": ""} for name, value in seconds.items()]
print("a line of the log")
plan = {"lines": ["how it is"], "items": items, "steps": 9, "assumptions": ["a rate"], "gpus": 8}
print(json.dumps(plan | {"export_bytes": 3 * 10**7}))
"""


def test_planned_total_is_the_sum_of_models_and_stages(tmp_path, capsys):
    (tmp_path / "script.py").write_text(PLANNER)
    jobs.show_plan(make_job(tmp_path), corpus_is_ready=True)
    shown = capsys.readouterr().out
    assert shown.count("  a line of the log\n  how it is\n") == 2 and shown.count("a rate") == 1
    lines = [line.split() for line in shown[shown.index("total:") :].splitlines()]
    minutes = {
        " ".join(words[: words.index("min") - 1]): float(words[words.index("min") - 1])
        for words in lines
        if "min" in words
    }
    assert minutes["one"] == minutes["two"] == 31.0
    assert {"packages", "evaluation suite", "archives", "validation", "comparison and report"} < minutes.keys()
    total = next(line for line in shown.splitlines()[::-1] if line.startswith("  total "))
    dollars = float(total.split(" dollars")[0].split()[-1])
    assert dollars == pytest.approx(minutes["total"] / 60 * PRICE_PER_HOUR * 8, abs=0.05)
    assert total.endswith("at 4 dollars per GPU-hour × 8")
    together = minutes.pop("total")
    assert together == pytest.approx(sum(minutes.values()), abs=0.4) and together > 62
    jobs.show_plan(make_job(tmp_path), corpus_is_ready=False)
    assert "for an estimate, build the corpus first" in capsys.readouterr().out
