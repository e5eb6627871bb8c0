"""``benchmarks/reliability/power_loss.py``: a small run survives; what is not flushed, or forgotten, is found out."""

import random
import re
from dataclasses import replace

import pytest

from benchmarks.reliability import power_loss
from benchmarks.reliability.power_loss import DROPPED, MIXED, TORN, WAYS, Disk, Operation


@pytest.fixture(scope="module")
def recording(bench):
    return power_loss.Recording(bench, "from scratch", bench.root / "scratch")


def again(recording, operations):
    """A recording of the same run whose operations are ``operations``."""
    other = object.__new__(power_loss.Recording)
    vars(other).update(vars(recording), operations=operations, outcome=replace(recording.outcome, broken=0))
    return other


def test_a_run_survives_every_prefix(recording):
    outcome = recording.read_all(seed=0, every=4)
    assert outcome.prefixes > 60 and outcome.opened > outcome.prefixes and outcome.broken == 0
    outcome = recording.resume_some(1, seed=0)
    assert (outcome.resumed, outcome.differing) == (1, 0)


def test_the_record_holds_what_the_run_has_written(recording, bench):
    disk = Disk(recording.folders)
    for operation in recording.operations:
        disk.apply(operation)
    tree = disk.after_power_loss(DROPPED, random.Random(0))
    place = power_loss.lay_out(tree, bench.root / "all")
    assert bench.result(place) == bench.expected
    kinds = [operation.kind for operation in recording.operations]
    assert kinds.count("saved") == 7 and kinds[-1] == "archived" and "exported" in kinds


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (lambda one: one.kind == "sync", "checkpoint of step .* lost"),
        (lambda one: one.kind == "sync" and one.item == power_loss.ROOT, "lost"),
        (lambda one: one.kind == "write" and b"test_bpb" in one.content, "export lost"),
    ],
)
def test_what_is_not_flushed_or_not_written_is_found_out(recording, lost, said, capsys):
    kept = [operation for operation in recording.operations if not lost(operation)]
    assert len(kept) < len(recording.operations)
    assert again(recording, kept).read_all(seed=0, every=5).broken > 0
    out = capsys.readouterr().out
    assert re.search(said, out), out


def test_another_history_is_found_out(recording, capsys):
    def changed(one):
        return replace(one, content=one.content.replace(b'"step": 3,', b'"step": 3, "surprise": 1,'))

    operations = [changed(one) if one.kind == "write" else one for one in recording.operations]
    assert again(recording, operations).read_all(seed=0, every=5).broken > 0
    assert "the history is another one" in capsys.readouterr().out


def test_a_disk_by_hand():
    """A file of ten bytes, flushed after four; its name is flushed with its folder only."""
    disk = Disk({0})
    steps = [
        Operation("write", 1, content=b"0123"),
        Operation("entries", 0, entries={"a": 1}),
        Operation("sync", 1),
        Operation("write", 1, content=b"0123456789"),
        Operation("sync", 0),
        Operation("entries", 0, entries={"a": None, "b": 1}),
    ]
    found = []
    for step in steps:
        disk.apply(step)
        found.append({way: disk.after_power_loss(way, random.Random(1)) for way in WAYS})
    assert [each[DROPPED] for each in found] == [{}, {}, {}, {}, {"a": b"0123"}, {"a": b"0123"}]
    assert found[1][TORN] in ({"a": b"01"}, {"a": b"01\0\0"}) and found[2][TORN] == {"a": b"0123"}
    assert found[5][TORN] in ({"b": b"0123456"}, {"b": b"0123456\0\0\0"})
    assert all(len(each[MIXED]) <= 1 for each in found), "a name is renamed, never twice there"
    contents = {content for seed in range(50) for content in disk.after_power_loss(MIXED, random.Random(seed)).values()}
    assert all(content.startswith(b"0123") for content in contents) and len(contents) > 5
