"""``benchmarks/little_text.py``: lines that are valid, and a table of real runs, one shared by two processes."""

from dataclasses import replace

import pytest

from benchmarks.experiments import data_constrained as little_text
from benchmarks.experiments import runner as trials
from mvlm_core.errors import UserError
from tests.helpers import TINY


def options_of(tmp_path, *arguments):
    return little_text.parse_options(["--work_dir", str(tmp_path), *arguments])


def test_every_line_is_a_valid_run_on_the_king_james_text_alone(tmp_path):
    runs = little_text.plan(options_of(tmp_path, "--seeds", "2"))
    assert len({run.folder for run in runs}) == len(runs) == 2 * len(little_text.LINES)
    for run in runs:
        settings = run.settings().check()
        assert settings.data_subset == "bible/kjv" and not settings.train_mix and not settings.no_test_score
        assert settings.max_bytes is None, "the epochs given replace the preset's length"
    sweep = little_text.plan(options_of(tmp_path, "--only", ",".join(little_text.SWEEP)))
    values = [{name: run.values[name] for name in little_text.FIRST} for run in sweep]
    assert all(run.settings().check().no_test_score for run in sweep), "a choice must not read the test books"
    assert values[0] == little_text.FIRST and all(
        sum(one[name] != values[0][name] for name in one) == 1 for one in values[1:]
    )
    with pytest.raises(UserError, match="no such line.*committee"):
        little_text.plan(options_of(tmp_path, "--only", "committee,no such line"))
    with pytest.raises(UserError, match="--processes 0"):
        options_of(tmp_path, "--processes", "0")


def test_real_runs_make_a_table(tiny_corpus, tmp_path, monkeypatch, capsys):
    """A committee of two by two processes, GPT-2 by one, and a line of the sweep, which has no test score."""
    monkeypatch.setattr(trials, "setup_logging", lambda *_, **__: None)
    monkeypatch.setattr(trials, "outlive_terminal", lambda: None)
    plain = little_text.plan

    def tiny_plan(options):
        return [
            replace(run, values=run.values | TINY | {"seed": run.seed, "num_epochs": None}) for run in plain(options)
        ]

    monkeypatch.setattr(little_text, "plan", tiny_plan)
    for line, processes in (("committee", "2"), ("GPT-2", "1"), ("sweep decay", "1")):
        places = ["--data_dir", str(tiny_corpus), "--work_dir", str(tmp_path / "work")]
        assert little_text.main(["--only", line, "--processes", processes, *places]) == 0
        header, _, row = capsys.readouterr().out.strip().splitlines()
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[:2] == [line, "1"] and len(cells) == header.count("|") - 1
        assert 0 < float(cells[5]) < 8 and 1 < float(cells[6]) < 8
        assert cells[7] == "–" if line.startswith("sweep") else 1 < float(cells[7]) < 8
