"""``benchmarks/mixes.py``: valid settings, and a table of real runs scored on all translations."""

import pytest

from benchmarks.experiments import mixes
from benchmarks.experiments import runner as trials
from benchmarks.experiments.runner import Run
from tests.helpers import TINY


def options_of(arguments):
    return trials.settled(trials.command_line("", "mixes").parse_args(arguments))


def test_every_mix_is_a_valid_run_of_its_own(tmp_path):
    runs = mixes.plan(options_of(["--seeds", "2", "--work_dir", str(tmp_path), "--max_bytes", "1000"]))
    assert len({run.folder for run in runs}) == len(runs) == 2 * len(mixes.MIXES)
    for run in runs:
        settings = run.settings().check()
        assert (settings.train_mix, settings.max_bytes) == (mixes.MIXES[run.label]["train_mix"], 1000)


def test_real_runs_are_scored_on_all_translations_once(tiny_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trials, "setup_logging", lambda *_, **__: None)
    monkeypatch.setattr(trials, "outlive_terminal", lambda: None)
    tiny = TINY | {"data_subset": None, "data_dir": str(tiny_corpus), "cache_dir": str(tmp_path / "cache")}
    run = Run("alike", "simone_enhanced", tiny | {"seed": 0, "output_dir": str(tmp_path / "run")})
    monkeypatch.setattr(mixes, "plan", lambda options: [run])
    arguments = ["--work_dir", str(tmp_path / "runs"), "--data_dir", str(tiny_corpus)]
    assert mixes.main(arguments) == 0
    table = capsys.readouterr().out
    found = mixes.score(run, tiny_corpus)
    assert f"| alike | 1 | {found['kjv']:.4f} | {found['all']:.4f} |" in table
    assert set(found["translations"]) == {"kjv", "plain"}
    assert found["kjv"] == pytest.approx(run.result()["validation_bpb"], rel=1e-4)
    monkeypatch.setattr("mvlm_core.evaluation.bits_per_byte.score_export", None)
    assert mixes.main(arguments) == 0 and capsys.readouterr().out == table, "nothing is scored twice"
