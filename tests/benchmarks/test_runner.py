"""``benchmarks/experiments/runner.py``: runs are planned seed by seed, executed once and reported."""

import json
import logging
import sys
from dataclasses import asdict, replace

import pytest

from benchmarks.experiments import runner
from benchmarks.experiments.runner import Run, Variant
from mvlm_core.errors import UserError
from tests.helpers import TINY


def options_of(tmp_path, *arguments):
    parser = runner.command_line("", "experiment", ["one", "two"])
    return runner.checked(parser.parse_args(["--work_dir", str(tmp_path), *arguments]))


def test_runs_are_made_seed_by_seed(tmp_path):
    variants = {
        "a b": Variant("mvlm_gpt2", overrides={"dropout": 0.2}),
        "c": Variant("simone_enhanced", component_swap="gelu"),
    }
    options = options_of(tmp_path, "--seeds", "2", "--max_bytes", "1000")
    runs = runner.make_runs(variants, options, runner.shared_values(options) | {"dropout": 0.1})
    assert [run.name for run in runs] == ["a b, seed 0", "c, seed 0", "a b, seed 1", "c, seed 1"]
    assert [run.values["dropout"] for run in runs[:2]] == [0.2, 0.1], "a variant's overrides beat the shared settings"
    assert runs[3].component_swap == "gelu" and runs[2].folder == tmp_path / "cpu-1000" / "a-b" / "seed1"
    for run in runs:
        settings = run.settings().check()
        assert settings.max_bytes == 1000 and settings.num_epochs is None and settings.no_test_score
    assert not runner.shared_values(options, test_score=True)["no_test_score"]


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(UserError, match="--seeds 0"):
        options_of(tmp_path, "--seeds", "0")
    bad = Run("bad", "mvlm_gpt2", TINY | {"learning_rate": -1.0, "output_dir": str(tmp_path / "bad")})
    with pytest.raises(UserError, match="--learning_rate -1.0: must be above 0"):
        runner.run_all([bad], tmp_path / "work", options_of(tmp_path))
    assert not (tmp_path / "work").exists(), "nothing is written before the settings are known to be good"


def test_only_a_run_with_the_same_settings_counts_as_finished(finished):
    run = finished["simone_enhanced"]
    result = run.result()
    assert result["steps"] == TINY["max_steps"] and 1 < result["validation_bpb"] < 9
    assert result["origin"]["precision"] == "fp32" and "device" not in result["origin"]
    assert replace(run, values=run.values | {"output_head": "tied"}).result() is None
    assert replace(run, values=run.values | {"cache_dir": "/elsewhere"}).result() == result


def test_finished_runs_are_skipped_and_failures_are_logged(trained, finished, tmp_path, caplog, capsys, monkeypatch):
    """One good run with a swapped component and one bad one, each in its own process."""
    monkeypatch.setattr(runner, "setup_logging", lambda *_, **__: None)  # caplog listens instead
    monkeypatch.setattr(runner, "outlive_terminal", lambda: None)
    monkeypatch.setattr(runner, "set_process_environment", lambda: None)
    caplog.set_level(logging.INFO, "mvlm")
    monkeypatch.setattr(runner.log, "propagate", True)
    options = options_of(tmp_path, "--seeds", "1")
    shared = finished["simone_enhanced"].values | {"no_test_score": True}
    variants = {
        "good": Variant("simone_enhanced", overrides={"max_steps": 3}, component_swap="layer_norm"),
        "bad": Variant("mvlm_gpt2", overrides={"data_subset": "no/such"}),
    }
    good, bad = runner.make_runs(variants, options, shared)
    assert good.result() is None

    shown = []
    runs = [good, bad, finished["mvlm_gpt2"]]
    assert runner.run_experiment(runs, options, lambda results: shown.append(results) or "TABLE") == 1
    assert "1 already finished" in caplog.text and f"{bad.name} failed: exit code 2" in caplog.text
    assert "no/such" in caplog.text, "the end of the run's log is shown"
    assert "TABLE" in (out := capsys.readouterr().out) and "2 of 3 runs finished" in out
    assert shown == [{"good": {0: good.result()}, "mvlm_gpt2": {0: finished["mvlm_gpt2"].result()}}]
    result = good.result()
    assert result["steps"] == 3 and not list(good.folder.rglob("step-*"))
    assert result["parameters"] != finished["simone_enhanced"].result()["parameters"], "LayerNorm has biases"
    tests = {name: value for name, value in result.items() if name.startswith("test")}
    assert tests and not any(tests.values()), "the test books are not read"

    monkeypatch.setattr(sys, "argv", ["runner.py", json.dumps(asdict(replace(good, component_swap=None)))])
    runner.run_one()
    assert f"already finished: {good.folder}" in caplog.text


def test_table_option_runs_nothing_and_warns_of_differing_origins(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "run_all", None)
    here = finished["mvlm_gpt2"]
    options = options_of(tmp_path, "--table")
    runs = [here, replace(here, values=here.values | {"seed": 7})]
    assert runner.run_experiment(runs, options, lambda results: str(list(results))) == 0
    out = capsys.readouterr().out
    assert out.startswith("['mvlm_gpt2']") and "1 of 2 runs" in out and "not to be compared" not in out
    result = here.result()
    monkeypatch.setattr(Run, "result", lambda run: result | {"origin": {"precision": run.seed}})
    runner.run_experiment([here, replace(here, values=here.values | {"seed": 7})], options, str)
    assert 'not to be compared:\n  {"precision": 0}\n  {"precision": 7}' in capsys.readouterr().out


def test_parallel_runs_save_a_checkpoint_and_stop_at_the_deadline(finished, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(runner, "setup_logging", lambda *_, **__: None)
    monkeypatch.setattr(runner, "outlive_terminal", lambda: None)
    monkeypatch.setattr(runner.log, "propagate", True)
    caplog.set_level(logging.INFO, "mvlm")
    options = options_of(tmp_path, "--seeds", "2", "--jobs", "2", "--hours", "1")
    values = finished["mvlm_gpt2"].values | {"no_test_score": True, "max_steps": 100_000}
    endless = runner.make_runs({"endless": Variant("mvlm_gpt2")}, options, values)

    def both_are_training():
        return all(" validation " in run.log_file.read_text() for run in endless if run.log_file.exists())

    class Deadline(float):  # passed as soon as both runs have made a step
        def __le__(self, _now):
            return all(run.log_file.exists() for run in endless) and both_are_training()

    options.deadline = Deadline()
    assert runner.run_all(endless, tmp_path, options) == []
    assert "--hours reached with 2 runs left" in caplog.text
    assert all(list((run.folder / "checkpoints").glob("step-*")) for run in endless), "both saved a checkpoint"

    short = runner.make_runs({"short": Variant("mvlm_gpt2")}, options, values | {"max_steps": 2})
    options.deadline = float("inf")
    assert runner.run_all(short, tmp_path, options) == [] and all(run.result() for run in short)


@pytest.mark.parametrize("arguments", (["--jobs", "0"], ["--hours", "0"], ["--hours", "nan"]))
def test_invalid_jobs_and_hours_are_refused(tmp_path, arguments):
    with pytest.raises(UserError, match=arguments[0]):
        options_of(tmp_path, *arguments)
