"""``benchmarks/side_by_side.py``: the arithmetic of its table, and a figure of real runs."""

import pytest

from benchmarks.experiments import runner as trials
from benchmarks.experiments import side_by_side
from mvlm_core.errors import UserError
from tests.helpers import TINY


def finished(bits, *, size=1000.0, seconds=100.0, test=None):
    count = len(bits)
    return {
        "parameters": 10,
        "bytes": size,
        "seconds": seconds,
        "tokens_per_second": 5.0,
        "validation_bpb": min(bits),
        "test_bpb": test,
        "test_bpb_kjv": test,
        "evaluations": [
            {"validation_bpb": b, "bytes": size * (n + 1) / count, "seconds": seconds * (n + 1) / count}
            for n, b in enumerate(bits)
        ],
    }


def test_shares_until_the_other_model_is_reached():
    first = finished([2.0, 1.9, 1.8, 1.7])
    assert side_by_side.reached(first, finished([1.8, 1.7, 1.6, 1.5], seconds=200.0)) == {"bytes": 0.5, "seconds": 1.0}
    assert side_by_side.reached(first, finished([1.9, 1.8, 1.75])) is None


def test_table_by_hand():
    first, second = side_by_side.NAMES
    seeds = {
        0: {first: finished([2.0, 1.8], test=2.0), second: finished([1.7, 1.4], test=1.6)},
        1: {first: finished([2.0, 1.8], test=2.2), second: finished([1.9, 1.5], test=1.8)},
    }
    lines = side_by_side.table(seeds).splitlines()
    assert "| validation, bits per byte | 1.8000 | 1.4500 (1.4000 … 1.5000) | 0.806 (0.778 … 0.833) |" in lines
    assert (
        "| test, bits per byte | 2.1000 (2.0000 … 2.2000) | 1.7000 (1.6000 … 1.8000) | 0.809 (0.800 … 0.818) |" in lines
    )
    assert f"| share of {first}'s text until its final validation is reached | | 0.750 (0.500 … 1.000) | |" in lines


def test_real_runs_make_a_table_and_a_figure(tiny_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trials, "setup_logging", lambda *_, **__: None)
    monkeypatch.setattr(trials, "outlive_terminal", lambda: None)
    plain = side_by_side.plan

    def tiny_plan(options):
        return [
            side_by_side.Run(run.label, run.model, run.values | TINY | {"seed": run.seed}) for run in plain(options)
        ]

    monkeypatch.setattr(side_by_side, "plan", tiny_plan)
    places = [
        "--data_dir",
        str(tiny_corpus),
        "--work_dir",
        str(tmp_path / "runs"),
        "--plot",
        str(tmp_path / "plot.png"),
    ]
    assert side_by_side.main(["--preset", "smoke", "--seeds", "1", *places]) == 0
    table = capsys.readouterr().out
    assert "| 1 seeds" in table and "test, King James part" in table
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(UserError, match="--seeds 0"):
        side_by_side.parse_options(["--seeds", "0", "--work_dir", str(tmp_path)])
