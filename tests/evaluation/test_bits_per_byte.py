"""Bits per byte, checked against a token-by-token reference."""

import math

import pytest
import torch

from mvlm_core.data.corpus import named_texts
from mvlm_core.evaluation import bits_per_byte
from mvlm_core.evaluation.bits_per_byte import (
    bits_per_byte_by_part,
    context_of,
    encode,
    score_documents,
    windows,
)
from prioritary_mvlm import AdvancedBPETokenizer
from simone_transformer import EnhancedSIMONEConfig, EnhancedSIMONEModel


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 12, 13, 40, 41])
def test_every_token_is_scored_exactly_once(length):
    context, ids = 8, list(range(100, 100 + length))
    scored = []
    for window in windows("x", ids, 0, context):
        assert len(window.inputs) == len(window.targets) <= context
        assert window.inputs[1:].tolist() == window.targets[:-1].tolist()
        if window.first_new:
            assert window.first_new >= context // 2, "a later window looks back on half a context at least"
        scored += window.targets[window.first_new :].tolist()
    assert scored == ids


@pytest.fixture(scope="module")
def small(real_text):
    tokenizer = AdvancedBPETokenizer.train(real_text, 500)
    torch.manual_seed(0)
    config = EnhancedSIMONEConfig(
        vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16
    )
    model = EnhancedSIMONEModel(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.5)
    return model, tokenizer


@torch.no_grad()
def by_hand(model, tokenizer, text, context):
    """One token at a time, each with the context its window gives it."""
    ids, nats = tokenizer.encode(text), 0.0
    sequence = [tokenizer.start_id, *ids]
    for position in range(1, len(sequence)):
        window = 0 if position <= context else -(-(position - context) // (context // 2))
        begin = window * (context // 2)
        logits = model(torch.tensor([sequence[begin:position]]), use_cache=False).logits[0, -1].double()
        nats -= torch.log_softmax(logits, dim=-1)[sequence[position]].item()
    return nats


def test_score_matches_a_token_by_token_reference(small, real_text):
    model, tokenizer = small
    documents = [(str(number), text[: 40 + 50 * number]) for number, text in enumerate(real_text[:5])] + [("empty", "")]
    score = score_documents(model, tokenizer.encode, documents, start_id=tokenizer.start_id, context=16, batch_size=3)
    for key, text in documents:
        found = score.documents[key]
        assert found.bytes == len(text.encode())
        assert found.nats == pytest.approx(by_hand(model, tokenizer, text, 16), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(score.nats / math.log(2) / sum(len(t.encode()) for _, t in documents))
    assert math.isnan(score.part({"empty"}).bits_per_byte)


def test_a_uniform_model_scores_log_vocabulary_size_per_token(small, real_text):
    model, tokenizer = small
    with torch.no_grad():
        weight, pointer = model.lm_head.weight.clone(), model.pointer
        model.lm_head.weight.zero_()
        model.pointer = None  # it would copy tokens, and the prediction would not be uniform
        score = score_documents(model, tokenizer.encode, [("a", real_text[0])], start_id=2, context=16)
        model.lm_head.weight.copy_(weight)
        model.pointer = pointer
    assert score.nats / len(tokenizer.encode(real_text[0])) == pytest.approx(math.log(500), rel=1e-6)


def test_score_does_not_depend_on_the_batch_size(small, real_text):
    model, tokenizer = small
    documents = [(str(number), text[: 90 + 70 * number]) for number, text in enumerate(real_text[:9])]
    one, many = (
        score_documents(model, tokenizer.encode, documents, start_id=2, context=16, batch_size=size) for size in (1, 32)
    )
    assert one.nats == pytest.approx(many.nats, rel=1e-6)


def test_batches_are_halved_when_memory_runs_out(small, real_text, monkeypatch):
    model, tokenizer = small
    real, sizes, most = bits_per_byte.window_logits, [], 2

    def window_logits(model, batch, device):
        sizes.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, batch, device)

    def score():
        documents = [(str(number), text[:400]) for number, text in enumerate(real_text[:5])]
        return score_documents(model, tokenizer.encode, documents, start_id=2, context=16, batch_size=7)

    expected = score()
    monkeypatch.setattr(bits_per_byte, "window_logits", window_logits)
    assert score().nats == pytest.approx(expected.nats, rel=1e-6) and sizes[:4] == [7, 4, 2, 2] and max(sizes[3:]) == 2
    most = 0
    model.train()
    with pytest.raises(torch.OutOfMemoryError, match="one window"):
        score()
    assert model.training
    model.eval()


def test_scores_by_book_and_translation_average_to_the_total(corpus, tokenizer, overfitted):
    documents = [d for split in ("validation", "test") for d in corpus.split(split)]
    texts = named_texts(documents)
    start, context = tokenizer.bos_token_id, context_of(overfitted)
    score = score_documents(overfitted, lambda text: encode(tokenizer, text), texts, start_id=start, context=context)
    found = bits_per_byte_by_part(score, documents)
    assert set(found.books) == {"Ruth", "Ecclesiastes"} and set(found.translations) == {"kjv", "plain"}
    for attribute, parts in (("book", found.books), ("translation", found.translations)):
        weighted = sum(parts[getattr(d, attribute)] * d.size for d in documents) / sum(d.size for d in documents)
        assert weighted == pytest.approx(found.all, rel=1e-9)
    assert found.translations["plain"] > found.translations["kjv"], "the one it was not trained on"
