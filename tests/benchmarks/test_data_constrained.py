"""``benchmarks/experiments/data_constrained.py``: lines that are valid, and a table of real runs."""

from dataclasses import replace

import pytest

from benchmarks.experiments import data_constrained, runner
from mvlm_core.errors import UserError
from mvlm_core.metrics import PRIMARY_TEST_BPB
from tests.helpers import TINY


def options_of(tmp_path, *arguments):
    return data_constrained.parse_options(["--work_dir", str(tmp_path), *arguments])


def test_every_line_is_a_valid_run_on_the_primary_translation_alone(tmp_path):
    runs = data_constrained.plan(options_of(tmp_path, "--seeds", "2"))
    assert len({run.folder for run in runs}) == len(runs) == 2 * len(data_constrained.LINES)
    for run in runs:
        settings = run.settings().check()
        assert settings.data_subset == "bible/kjv" and not settings.train_mix and not settings.no_test_score
        assert settings.max_bytes is None, "the epochs given replace the preset's length"
    sweep = data_constrained.plan(options_of(tmp_path, "--only", ",".join(data_constrained.SWEEP)))
    values = [{name: run.values[name] for name in data_constrained.FIRST} for run in sweep]
    assert all(run.settings().check().no_test_score for run in sweep), "a choice must not read the test books"
    assert values[0] == data_constrained.FIRST and all(
        sum(one[name] != values[0][name] for name in one) == 1 for one in values[1:]
    )
    with pytest.raises(UserError, match="no such line.*ensemble"):
        data_constrained.plan(options_of(tmp_path, "--only", "ensemble,no such line"))
    with pytest.raises(UserError, match="--processes 0"):
        options_of(tmp_path, "--processes", "0")


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_finished_runs_make_a_table(finished, tmp_path, monkeypatch, capsys):
    run = finished["mvlm_gpt2"]
    monkeypatch.setattr(data_constrained, "plan", lambda options: [run])
    assert data_constrained.main(["--table", "--work_dir", str(tmp_path)]) == 0
    header, _, row = capsys.readouterr().out.splitlines()[:3]
    cells, result = cells_of(row), run.result()
    assert cells[:3] == ["mvlm_gpt2", "1", f"{result['parameters']:,}"] and len(cells) == len(cells_of(header))
    assert cells[6:] == [f"{result[name]:.4f}" for name in ("validation_bpb", PRIMARY_TEST_BPB)]
    assert float(cells[5]) == pytest.approx(result["validation_bpb"], abs=1), "train loss, in bits per byte as well"

    figures = data_constrained.figures(run)
    other = figures | {"seconds": figures["seconds"] + 120, PRIMARY_TEST_BPB: None}
    _, _, row = data_constrained.table({"both": {0: figures | {PRIMARY_TEST_BPB: None}, 1: other}}).splitlines()
    assert cells_of(row)[7] == "–" and cells_of(row)[4] == f"{figures['seconds'] / 60 + 1:.0f}"


@pytest.mark.integration
def test_real_runs_make_a_table(tiny_corpus, tmp_path, monkeypatch, capsys):
    """An ensemble of two by two CPU workers, GPT-2 by one, and a line of the sweep, which has no test score."""
    monkeypatch.setattr(runner, "setup_logging", lambda *_, **__: None)
    monkeypatch.setattr(runner, "outlive_terminal", lambda: None)
    plain = data_constrained.plan

    def tiny_plan(options):
        return [
            replace(run, values=run.values | TINY | {"seed": run.seed, "num_epochs": None}) for run in plain(options)
        ]

    monkeypatch.setattr(data_constrained, "plan", tiny_plan)
    for line, processes in (("ensemble", "2"), ("GPT-2", "1"), ("sweep decay", "1")):
        places = ["--data_dir", str(tiny_corpus), "--work_dir", str(tmp_path / "work")]
        assert data_constrained.main(["--only", line, "--processes", processes, *places]) == 0
        cells = cells_of(capsys.readouterr().out.strip().splitlines()[2])
        assert cells[:2] == [line, "1"] and 0 < float(cells[5]) < 8 and 1 < float(cells[6]) < 8
        assert cells[7] == "–" if line.startswith("sweep") else 1 < float(cells[7]) < 8
