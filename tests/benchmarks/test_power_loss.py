"""``benchmarks/reliability/power_loss.py``: a small run survives; missing flushes and writes are detected."""

import random
import re
from dataclasses import replace

import pytest

from benchmarks.reliability import power_loss
from benchmarks.reliability.power_loss import DROPPED, MIXED, TORN, WAYS, Disk, Operation, Promised


@pytest.fixture(scope="module")
def recording(bench):
    return power_loss.Recording(bench, "from scratch", bench.root / "scratch")


def again(recording, operations):
    """A recording of the same run whose operations are ``operations``."""
    other = object.__new__(power_loss.Recording)
    vars(other).update(vars(recording), operations=operations, outcome=replace(recording.outcome, broken=0))
    return other


def test_a_run_survives_power_loss_at_sampled_operations(recording):
    outcome = recording.open_all(seed=0, every=4)
    assert outcome.prefixes > 60 and outcome.opened > outcome.prefixes and outcome.broken == 0
    outcome = recording.resume_some(1, seed=0)
    assert (outcome.resumed, outcome.differing) == (1, 0)


def test_replaying_the_recording_reproduces_the_finished_run(recording, bench):
    disk = Disk()
    for operation in recording.operations:
        disk.apply(operation)
    tree = disk.after_power_loss(DROPPED, random.Random(0))
    place = power_loss.lay_out(tree, bench.root / "all")
    assert bench.result(place) == bench.expected
    promises = [operation.value for operation in recording.operations if operation.kind == "promise"]
    assert [promised.step for promised in promises] == [0, 4, 8, 12, 16, 20, 24, 24, 24]
    assert promises[-2:] == [Promised(24, exported=True), Promised(24, True, True)]


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (lambda one: one.kind == "sync", "checkpoint of step .* lost"),
        (lambda one: one.kind == "sync" and one.item == power_loss.ROOT, "lost"),
        (lambda one: isinstance(one.value, bytes) and b"test_bpb" in one.value, "export lost"),
    ],
)
def test_missing_flushes_and_writes_are_detected(recording, lost, said, capsys):
    operations = [one for one in recording.operations if not (one.kind == "sync" and lost(one))]
    operations = [one._replace(value=b"") if lost(one) else one for one in operations]
    assert operations != recording.operations
    assert again(recording, operations).open_all(seed=0, every=5).broken > 0
    out = capsys.readouterr().out
    assert re.search(said, out), out


def test_a_changed_training_history_is_detected(recording, capsys):
    def changed(one):
        return one._replace(value=one.value.replace(b'"step": 3,', b'"step": 3, "surprise": 1,'))

    operations = [changed(one) if isinstance(one.value, bytes) else one for one in recording.operations]
    assert again(recording, operations).open_all(seed=0, every=5).broken > 0
    assert "the history differs from the uninterrupted run's" in capsys.readouterr().out


def test_simulated_disk_contents_after_power_loss():
    """A ten-byte file, flushed after four bytes; its name is durable only once its folder is flushed."""
    disk = Disk()
    steps = [
        Operation("write", 1, b"0123"),
        Operation("write", 0, {"a": 1}),
        Operation("sync", 1),
        Operation("write", 1, b"0123456789"),
        Operation("sync", 0),
        Operation("write", 0, {"b": 1}),
    ]
    trees = []
    for step in steps:
        disk.apply(step)
        trees.append({way: disk.after_power_loss(way, random.Random(1)) for way in WAYS})
    assert [each[DROPPED] for each in trees] == [{}, {}, {}, {}, {"a": b"0123"}, {"a": b"0123"}]
    assert trees[1][TORN] in ({"a": b"01"}, {"a": b"01\0\0"}) and trees[2][TORN] == {"a": b"0123"}
    assert trees[5][TORN] in ({"b": b"0123456"}, {"b": b"0123456\0\0\0"})
    assert all(len(each[MIXED]) <= 1 for each in trees), "a name is renamed, never twice there"
    contents = {content for seed in range(50) for content in disk.after_power_loss(MIXED, random.Random(seed)).values()}
    assert all(content.startswith(b"0123") for content in contents) and len(contents) > 5
