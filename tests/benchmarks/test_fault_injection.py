"""Faults of ``benchmarks/reliability/fault_injection.py``: disturbed runs end like undisturbed ones."""

import random
import signal

import pytest

from benchmarks.reliability import fault_injection


def test_runs_killed_at_random_moments_end_like_undisturbed_ones(bench):
    outcome = bench.stop_at_random(signal.SIGKILL, 2, random.Random(0))
    assert outcome.tried == 2 and outcome.survived


@pytest.mark.parametrize("points", [3, pytest.param(12, marks=pytest.mark.integration)])
def test_runs_killed_between_file_operations_end_like_undisturbed_ones(bench, points):
    outcome = bench.kill_at_writes(every=bench.events // points)
    assert outcome.tried >= points and outcome.survived
    assert max(outcome.repeated) <= fault_injection.CHECKPOINT_INTERVAL


@pytest.mark.parametrize("file", ["model.safetensors", pytest.param("manifest.json", marks=pytest.mark.integration)])
def test_runs_with_a_damaged_newest_checkpoint_end_like_undisturbed_ones(bench, file):
    outcome = bench.damage_newest(random.Random(1), [(file, "flip a bit")])
    assert outcome.tried == 1 and outcome.survived


@pytest.mark.integration
def test_runs_killed_or_stopped_often_end_like_undisturbed_ones(bench):
    for number in (signal.SIGKILL, signal.SIGTERM):
        outcome = bench.stop_at_random(number, 6, random.Random(2))
        assert outcome.tried == 6 and outcome.survived


def test_comparison_detects_a_changed_history(bench):
    place = bench.root / "again"
    assert bench.result(place) == bench.expected
    history = place / bench.model / "training_history.jsonl"
    history.write_text(history.read_text().replace('"step": 7,', '"step": 70,'))
    assert bench.result(place) != bench.expected
