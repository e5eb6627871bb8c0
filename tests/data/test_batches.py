"""Batches are a pure function of the step: each token comes once per epoch, and every epoch has its own order."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from mvlm_core.data.batches import BatchSource
from mvlm_core.data.token_store import TokenStore, document_coverage
from mvlm_core.errors import UserError

CONTEXT = 16


def make_store(lengths=(100, 37, 250, 8, 90), repeats=None):
    total = sum(lengths)
    return TokenStore(
        tokens=np.arange(total, dtype=np.uint16),  # each token is its own number, so it can be recognized
        starts=np.concatenate(([0], np.cumsum(lengths))),
        repeats=np.array(repeats or [1] * len(lengths)),
        weights=np.linspace(0.5, 1.5, len(lengths)),
        token_bytes=np.full(total, 3),
        text_bytes=3 * total,
        bytes_per_token=3.0,
    )


def source(**changes):
    return BatchSource(make_store(), **{"context": CONTEXT, "batch_size": 4, "seed": 0, **changes})


def test_batches_depend_only_on_seed_and_number():
    forwards = [source().batch(number) for number in range(12)]
    one = source()
    backwards = [one.batch(number) for number in reversed(range(12))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert np.array_equal(a.inputs, b.inputs) and np.array_equal(a.targets, b.targets)
        assert np.array_equal(a.weights, b.weights) and a.text_bytes == b.text_bytes == 4 * CONTEXT * 3
    assert not np.array_equal(forwards[0].inputs, source(seed=1).batch(0).inputs)


def test_micro_batches_are_slices_of_the_batch():
    whole, parts = source().batch(5), [source().batch(5, first, 1) for first in range(4)]
    assert np.array_equal(whole.inputs, np.concatenate([part.inputs for part in parts]))
    assert whole.text_bytes == sum(part.text_bytes for part in parts)


def test_each_token_is_a_target_once_per_epoch():
    batches = source(batch_size=1)
    seen = []
    for epoch in range(3):
        numbers = range(epoch * batches.sequences_per_epoch, (epoch + 1) * batches.sequences_per_epoch)
        targets = np.concatenate([batches.batch(number).targets.ravel() for number in numbers])
        assert len(np.unique(targets)) == len(targets)
        assert len(batches.store.tokens) - len(targets) <= CONTEXT
        seen.append(targets)
    assert not np.array_equal(seen[0], seen[1]), "the order must change from epoch to epoch"


def test_targets_are_shifted_inputs_with_their_documents_weight():
    batches = source()
    batch = batches.batch(3)
    assert np.array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    document = np.searchsorted(batches.store.starts, batch.targets, side="right") - 1
    np.testing.assert_allclose(batch.weights, batches.store.weights[document], rtol=1e-6)
    inside = document[:, 1:] == document[:, :-1]
    assert np.all((batch.targets[:, 1:] == batch.targets[:, :-1] + 1)[inside]), "documents must stay in one piece"


def test_a_mix_repeats_documents_as_often_as_specified():
    store = make_store(repeats=[1, 0, 2, 3, 1])
    batches = BatchSource(store, context=CONTEXT, batch_size=1, seed=0)
    assert batches.tokens_per_epoch == 100 + 2 * 250 + 3 * 8 + 90
    targets = np.concatenate([batches.batch(number).targets.ravel() for number in range(batches.sequences_per_epoch)])
    times = np.bincount(targets, minlength=485)
    wanted = np.repeat(store.repeats, np.diff(store.starts))
    assert np.all(times <= wanted) and wanted.sum() - times.sum() <= CONTEXT


def test_replay_is_evenly_interleaved_and_keeps_each_data_order():
    old = source(seed=1)
    mixed = source(replay=old, replay_share=Fraction("0.3"))
    rows = [mixed.batch(n // 4, n % 4, 1).targets[0] for n in range(100)]
    whole = np.concatenate([mixed.batch(n).targets for n in range(25)])
    assert np.array_equal(rows, whole), "a function of the number alone"
    replayed = [n for n in range(100) if (n + 1) * 3 // 10 > n * 3 // 10]
    assert len(replayed) == 30 and replayed[:3] == [3, 6, 9]
    new = [n for n in range(100) if n not in replayed]
    for numbers, alone in ((replayed, old), (new, source())):
        expected = [alone.batch(n // 4, n % 4, 1).targets[0] for n in range(len(numbers))]
        assert np.array_equal([rows[n] for n in numbers], expected)
    assert mixed.epoch_at(25) == pytest.approx(70 / 30) and mixed.steps_for_epochs(2) == round(60 / 0.7 / 4)


def test_epochs_are_counted_in_sequences():
    batches = source()
    assert batches.sequences_per_epoch == (485 - 1) // CONTEXT == 30
    assert batches.epoch_at(15) == pytest.approx(2.0)
    assert batches.steps_for_epochs(2) == 15


def test_the_expected_share_read_of_a_document_is_what_batches_contain():
    repeats = [1] * 20 + [4] * 20 + [0] * 20
    store, documents = make_store((300,) * 60, repeats), [SimpleNamespace(path=str(number)) for number in range(60)]
    found = []
    for seed in range(10):
        batches = BatchSource(store, context=CONTEXT, batch_size=4, seed=seed)
        steps = batches.steps_for_epochs(0.2)
        seen = np.unique([batches.batch(number).targets for number in range(steps)])
        found.append(np.bincount(seen // 6000, minlength=3) / 6000)
    shares = document_coverage(documents, store.repeats, batches.epoch_at(steps))
    expected = [shares["0"], shares["20"], shares["40"]]
    assert np.mean(found, axis=0) == pytest.approx(expected, abs=0.01) and expected[2] == 0
    assert expected[:2] == pytest.approx([0.2, 1 - 0.8**4], abs=0.002)
    assert list(document_coverage(documents, store.repeats, 1.5).values()) == [1.0] * 40 + [0.0] * 20


def test_text_shorter_than_one_sequence_is_refused():
    with pytest.raises(UserError, match="fewer than one sequence of --max_length"):
        BatchSource(make_store((5, 4)), context=CONTEXT, batch_size=1, seed=0)
