"""Faults of ``benchmarks/reliability/fault_injection.py``: killed, stopped, damaged runs end as undisturbed ones."""

import random
import signal

import pytest

from benchmarks.reliability import fault_injection
from tests.helpers import build_tiny_corpus


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    fault_injection.CONTEXT.set_forkserver_preload(fault_injection.PRELOAD)
    root = tmp_path_factory.mktemp("faults")
    return fault_injection.Bench("simone_enhanced", build_tiny_corpus(root / "corpus"), root)


def test_killed_at_random_moments(bench):
    outcome = bench.stop_at_random(signal.SIGKILL, 4, random.Random(0))
    assert outcome.tried == 4 and outcome.survived


def test_killed_between_file_operations(bench):
    outcome = bench.kill_at_writes(every=bench.events // 8)
    assert outcome.tried >= 8 and outcome.survived
    assert max(outcome.repeated) <= fault_injection.CHECKPOINT_INTERVAL


def test_damaged_newest_checkpoint(bench):
    outcome = bench.damage_newest(
        random.Random(1), files=("model.safetensors", "manifest.json"), damages=("flip a bit",)
    )
    assert outcome.tried == 2 and outcome.survived


def test_the_comparison_sees_a_difference(bench):
    place = bench.root / "again"
    assert bench.result(place) == bench.expected
    history = place / bench.model / "training_history.jsonl"
    history.write_text(history.read_text().replace('"step": 7,', '"step": 70,'))
    assert bench.result(place) != bench.expected
