"""Tiny models with known abilities, on real text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mvlm_core.data.verses import Verse, verses_of
from mvlm_core.evaluation.bits_per_byte import encode
from prioritary_mvlm import AdvancedBPETokenizer
from simone_transformer import EnhancedSIMONEConfig, EnhancedSIMONEModel
from tests.evaluation import CONTEXT, KNOWN, VOCABULARY


@pytest.fixture(scope="session")
def tokenizer(real_text) -> Any:
    return AdvancedBPETokenizer.train(real_text, VOCABULARY).for_transformers(CONTEXT)


@pytest.fixture(scope="session")
def make(tokenizer) -> Any:
    """A function that creates an untrained model of either kind."""

    def make(name: str = "simone", width: int = 64) -> Any:
        torch.manual_seed(0)
        ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
        if name == "gpt2":
            shape = {"n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}
            return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **shape, **ids)).eval()
        shape = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = EnhancedSIMONEConfig(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, **shape, **ids)
        return EnhancedSIMONEModel(config).eval()

    return make


@pytest.fixture(scope="session")
def couples(corpus, tokenizer) -> list[tuple[Verse, Verse]]:
    """Short documents of two neighboring verses each, from the primary translation's train books."""
    verses = [v for v in verses_of(corpus.primary_part("train")) if v.text[0].isalpha()]
    found = []
    for first, second in zip(verses[::2], verses[1::2], strict=False):
        text = f"{first.text}\n{second.text}\n"
        if len(encode(tokenizer, text)) < CONTEXT - 8 and min(len(v.text.split()) for v in (first, second)) >= 6:
            cut = len(first.text) + 1
            found.append((Verse(text, 0, cut - 1, "first", "kjv"), Verse(text, cut, len(text) - 1, "second", "kjv")))
    return found


@pytest.fixture(scope="session")
def overfitted(make, tokenizer, couples) -> Any:
    """A model overfitted to the first ``KNOWN`` couples, each after the start token."""
    model = make()
    texts = [first.document for first, _ in couples[:KNOWN]]
    rows = [[tokenizer.bos_token_id, *encode(tokenizer, text)] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (length - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    order = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(140):
        batch = torch.randperm(KNOWN, generator=order)[:8]
        model(input_ids=ids[batch], labels=labels[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
