"""``benchmarks/experiments/side_by_side.py``: the arithmetic of its table, and a plot of real runs."""

import pytest

from benchmarks.experiments import side_by_side
from mvlm_core.metrics import BY_NAME, PRIMARY_TEST_BPB

FIRST, SECOND = side_by_side.NAMES


def figures(bits, *, size=1000.0, seconds=100.0, test=None):
    count = len(bits)
    times = {"parameters": 10, "bytes": size, "seconds": seconds, "tokens_per_second": 5.0}
    evaluations = [
        {"validation_bpb": b, "bytes": size * (n + 1) / count, "seconds": seconds * (n + 1) / count}
        for n, b in enumerate(bits)
    ]
    scores = {"validation_bpb": min(bits), "test_bpb": test, PRIMARY_TEST_BPB: test}
    return times | scores | {"evaluations": evaluations}


def test_share_of_bytes_and_seconds_to_reach_the_other_model():
    first = figures([2.0, 1.9, 1.8, 1.7])
    assert side_by_side.reached(first, figures([1.8, 1.7, 1.6, 1.5], seconds=200.0)) == {"bytes": 0.5, "seconds": 1.0}
    assert side_by_side.reached(first, figures([1.75, 1.5, 1.4, 1.3])) == pytest.approx({"bytes": 0.3, "seconds": 0.3})
    assert side_by_side.reached(first, figures([1.6, 1.5])) == {"bytes": 0.5, "seconds": 0.5}, "the first evaluation"
    assert side_by_side.reached(first, figures([1.9, 1.8, 1.75])) is None


def test_table_matches_hand_computed_values():
    results = {
        FIRST: {0: figures([2.0, 1.8], test=2.0), 1: figures([2.0, 1.8], test=2.2), 2: figures([9.0], test=9.0)},
        SECOND: {1: figures([1.9, 1.5], test=1.8), 0: figures([1.7, 1.4], test=1.6)},
    }
    lines = side_by_side.table(results).splitlines()
    assert lines[0].startswith("| 2 seeds: mean (min … max) |"), "seeds that both have finished"
    assert "| validation, bits per byte | 1.8000 | 1.4500 (1.4000 … 1.5000) | 0.806 (0.778 … 0.833) |" in lines
    assert (
        "| test, bits per byte | 2.1000 (2.0000 … 2.2000) | 1.7000 (1.6000 … 1.8000) | 0.809 (0.800 … 0.818) |" in lines
    )
    assert f"| share of {FIRST}'s text to reach its final validation |  | 0.562 (0.500 … 0.625) |  |" in lines
    untested = side_by_side.table({name: {0: figures([2.0])} for name in (FIRST, SECOND)})
    assert BY_NAME["validation_bpb"].title in untested and BY_NAME["test_bpb"].title not in untested


def test_finished_runs_make_a_table_and_a_plot(finished, tmp_path, monkeypatch, capsys):
    runs = side_by_side.make_runs(side_by_side.parse_options(["--seeds", "2", "--work_dir", str(tmp_path)]))
    assert [run.label for run in runs] == [FIRST, SECOND, FIRST, SECOND]
    assert not any(run.settings().check().no_test_score for run in runs)
    monkeypatch.setattr(side_by_side, "make_runs", lambda options: list(finished.values()))
    places = ["--work_dir", str(tmp_path), "--plot", str(tmp_path / "plot.png")]
    assert side_by_side.main(["--table", *places]) == 0
    table = capsys.readouterr().out
    assert "| 1 seeds" in table and BY_NAME[PRIMARY_TEST_BPB].title in table
    assert f"| {finished[FIRST].result()['validation_bpb']:.4f} |" in table
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
