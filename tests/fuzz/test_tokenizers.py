"""Damaged and forged tokenizer files: each is refused by name or lossless."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mvlm_trainer
from mvlm_core.data.tokenizer import ByteLevelBPE
from mvlm_core.errors import UserError
from prioritary_mvlm import AdvancedBPETokenizer
from tests.helpers import ANY_JSON, BROKEN_JSON, SCALARS, cases, damaged, raises_only, with_a_value_replaced, within

TEXT = "In the beginning  God\n\u2018created\u2019 <eos> \U0001f54a"
KINDS = {"simone": AdvancedBPETokenizer, "gpt2": mvlm_trainer.tokenizer_class()}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, real_text) -> ByteLevelBPE:
    return KINDS[request.param].train(real_text[:5], 300)


def judge(kind, path):
    """Load a tokenizer: a UserError that names the file, or a lossless tokenizer."""
    with within(20):
        found, message = raises_only(UserError, lambda: kind.load(path))
    if found is None:
        assert str(path) in message, message
        return message
    ids = found.encode(TEXT)
    assert found.decode(ids) == TEXT and max(ids) < found.vocab_size == len(found.token_bytes())
    assert found.encode_batch([TEXT]) == [ids] and found.for_transformers(16) is not None
    return ""


@cases(150)
@given(data=st.binary(max_size=200), value=ANY_JSON, is_json=st.booleans())
def test_random_bytes_and_json_are_refused(tmp_path, data, value, is_json):
    """Random bytes or arbitrary JSON as `tokenizer.json`."""
    (tmp_path / "tokenizer.json").write_bytes(json.dumps(value).encode() if is_json else data)
    assert judge(AdvancedBPETokenizer, tmp_path)


@pytest.mark.parametrize("kind", BROKEN_JSON)
def test_malformed_tokenizer_files_are_refused(tmp_path, kind):
    (tmp_path / "tokenizer.json").write_bytes(BROKEN_JSON[kind])
    assert judge(AdvancedBPETokenizer, tmp_path)


@cases(250)
@given(
    seed=st.integers(0, 2**40), value=SCALARS | ANY_JSON | st.sampled_from([2**31, 2**32 - 1, 0, "a", "((((", "(a*)*b"])
)
def test_tokenizers_with_one_value_replaced_are_lossless_or_refused(trained, tmp_path, seed, value):
    """Any value anywhere in the file of a real tokenizer of each kind."""
    changed = with_a_value_replaced(json.loads(trained.tokenizer.to_str()), seed, value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    judge(type(trained), tmp_path)


@cases(60)
@given(seed=st.integers(0, 2**40))
def test_corrupted_tokenizers_are_lossless_or_refused(trained, tmp_path, seed):
    """A flipped bit, truncation, insertion, zeros or repetition in a real tokenizer's file of each kind."""
    (tmp_path / "tokenizer.json").write_bytes(damaged(trained.tokenizer.to_str().encode(), seed))
    judge(type(trained), tmp_path)


def shuffled_ids(tokenizer, chance):
    vocabulary = tokenizer["model"]["vocab"]
    ids = list(vocabulary.values())
    chance.shuffle(ids)
    tokenizer["model"]["vocab"] = dict(zip(vocabulary, ids, strict=True))


TRUNCATION = {"max_length": 60, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
PADDING = {
    **{"strategy": {"Fixed": 999}, "direction": "Right", "pad_to_multiple_of": None},
    **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
}
ENDLESS = {"type": "Split", "pattern": {"Regex": "(\\w+\\s?)+$"}, "behavior": "Isolated", "invert": False}
CHANGES = {
    "truncation": lambda t, r: t.update(truncation=TRUNCATION),
    "padding": lambda t, r: t.update(padding=PADDING),
    "lower case": lambda t, r: t.update(normalizer={"type": "Lowercase"}),
    "stripped": lambda t, r: t.update(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
    "no pieces": lambda t, r: t.update(pre_tokenizer=None),
    "no decoder": lambda t, r: t.update(decoder=None),
    "gap in the ids": lambda t, r: t["model"]["vocab"].update(a=2**31 - 1),
    "id twice": lambda t, r: t["model"]["vocab"].update(a=5),
    "no letters": lambda t, r: t["model"].update(vocab={}, merges=[]),
    "no special tokens": lambda t, r: t.update(added_tokens=[]),
    "another model": lambda t, r: t.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
    "a prefix at which the library panics": lambda t, r: t["model"].update(continuing_subword_prefix="##"),
    "chance": lambda t, r: t["model"].update(dropout=0.5),
    "shuffled ids": shuffled_ids,
    "endless pattern": lambda t, r: t.update(pre_tokenizer=ENDLESS),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tokenizers_with_changed_rules_are_lossless_or_refused(trained, tmp_path, change):
    """Intact files with other settings; none may lose text."""
    tokenizer = json.loads(trained.tokenizer.to_str())
    CHANGES[change](tokenizer, random.Random(0))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = judge(type(trained), tmp_path)
    if change == "truncation":
        loaded = type(trained).load(tmp_path)
        assert not message and loaded.decode(loaded.encode(TEXT * 50)) == TEXT * 50
    if change in ("lower case", "stripped", "gap in the ids", "id twice", "no letters", "another model", "chance"):
        assert message
