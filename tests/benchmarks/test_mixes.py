"""``benchmarks/experiments/mixes.py``: valid settings, and a table of a real run scored on all translations."""

import shutil
from dataclasses import replace

import pytest

from benchmarks.experiments import mixes, runner


def test_every_mix_has_valid_settings_and_its_own_folder(tmp_path):
    parser = runner.command_line("", "mixes", mixes.VARIANTS)
    options = runner.checked(parser.parse_args(["--work_dir", str(tmp_path), "--max_bytes", "1000"]))
    runs = runner.make_runs(mixes.VARIANTS, options, runner.shared_values(options))
    assert len({run.folder for run in runs}) == len(runs) == 3 * len(mixes.VARIANTS)
    settings = {run.label: run.settings().check() for run in runs}
    assert [one.train_mix for one in settings.values()] == ["", "bible/kjv=4", "bible/kjv=16", "bible/kjv=64", ""]
    assert [one.data_subset for one in settings.values()] == [None] * 4 + ["bible/kjv"]


def test_a_finished_run_is_scored_on_all_translations_only_once(finished, tmp_path, monkeypatch, capsys):
    run = finished["simone_enhanced"]
    folder = shutil.copytree(run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    run = replace(run, label="all alike", values=run.values | {"output_dir": str(folder)})
    monkeypatch.setattr(runner, "make_runs", lambda variants, *_: [run] if list(variants) == ["all alike"] else [])
    arguments = ["--table", "--only", "all alike", "--work_dir", str(tmp_path), "--data_dir", run.values["data_dir"]]
    assert mixes.main(arguments) == 0
    table = capsys.readouterr().out
    scores = mixes.score(run, run.values["data_dir"])
    assert f"| all alike | 1 | {scores['primary']:.4f} | {scores['all']:.4f} |" in table
    assert set(scores["translations"]) == {"kjv", "plain"} and scores["all"] != scores["primary"]
    assert scores["primary"] == pytest.approx(run.result()["validation_bpb"], rel=1e-4)
    other = shutil.copytree(run.values["data_dir"], tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr("mvlm_core.evaluation.bits_per_byte.score_export", None)
        assert mixes.main(arguments) == 0 and capsys.readouterr().out == table, "nothing is scored twice"
        assert mixes.score(run, other) == scores, "a copy of the same text"
    (other / "bible" / "kjv" / "08-ruth.txt").write_text("Now it came to pass in the days of the judges.\n")
    assert mixes.score(run, other)["primary"] != scores["primary"], "another corpus is scored anew"
