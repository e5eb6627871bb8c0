"""How good a model is, in bits per byte: the one number that compares models with different tokenizers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_core.console import hush_transformers
from mvlm_core.data.corpus import Corpus, Document


@dataclass
class Score:
    """What scoring some text gave.

    Attributes:
        nats: total negative log-likelihood.
        bytes: UTF-8 bytes of the text.
        documents: per document, its nats, bytes and tokens.
    """

    documents: dict[str, tuple[float, int, int]] = field(default_factory=dict)

    @property
    def nats(self) -> float:
        return math.fsum(nats for nats, _, _ in self.documents.values())

    @property
    def bytes(self) -> int:
        return sum(size for _, size, _ in self.documents.values())

    @property
    def tokens(self) -> int:
        return sum(tokens for _, _, tokens in self.documents.values())

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.nats, self.bytes)

    def part(self, keep: Callable[[str], bool]) -> Score:
        """The score of the documents whose key ``keep`` accepts."""
        return Score({key: value for key, value in self.documents.items() if keep(key)})


def bits_per_byte(nats: float, size: float) -> float:
    """Total nats over (ln 2 × bytes of text); lower is better. NaN for no text."""
    return nats / (math.log(2) * size) if size else math.nan


@dataclass(frozen=True)
class BitsPerByte:
    """Bits per byte of all documents, of each book and of each translation; lower is better."""

    all: float
    books: dict[str, float]
    translations: dict[str, float]


def bits_per_byte_by_part(score: Score, documents: Sequence[Document]) -> BitsPerByte:
    """A score of ``documents`` in parts. Documents without a book or translation count in ``all`` only."""

    def by(attribute: str) -> dict[str, float]:
        groups: dict[str, set[str]] = defaultdict(set)
        for document in documents:
            if (name := getattr(document, attribute)) is not None:
                groups[name].add(document.path)
        return {name: score.part(paths.__contains__).bits_per_byte for name, paths in groups.items()}

    return BitsPerByte(score.bits_per_byte, by("book"), by("translation"))


@dataclass(frozen=True)
class _Window:
    """One stretch of a document: inputs, their targets, and from where on the targets are new."""

    key: str
    inputs: np.ndarray
    targets: np.ndarray
    first_new: int


def windows(key: str, ids: list[int], start_id: int, context: int) -> Iterator[_Window]:
    """Cut a document so that each token is a new target exactly once.

    The first window scores all its targets, each later one starts half a context further on and scores what the one
    before it did not reach, with at least half a context to look back on.
    """
    sequence = np.array([start_id, *ids], dtype=np.int64)
    stride, scored, begin = max(1, context // 2), 0, 0
    while scored < len(ids):
        end = min(begin + context, len(ids))
        yield _Window(key, sequence[begin:end], sequence[begin + 1 : end + 1], scored - begin)
        scored, begin = end, begin + stride


@torch.inference_mode()
def score_documents(
    model: Any,
    encode: Callable[[str], list[int]],
    documents: Iterable[tuple[str, str]],
    *,
    start_id: int,
    context: int,
    batch_size: int = 16,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Score ``(key, text)`` pairs with a transformers causal language model, in the weights' own precision.

    Every token of a text is scored once, the first one after ``start_id``; windows are ``context`` long, half of it
    apart, and only their new half counts.

    Args:
        progress: called with the bytes of each document when it is cut up.
    """
    was_training = model.training
    model.eval()
    score, totals = Score(), {}
    later: list[_Window] = []  # full windows with an old first half: all alike, so their logits can be halved
    others: list[_Window] = []  # first and last windows of documents, of any length
    half = context - max(1, context // 2)

    def flush(group: list[_Window], keep: int) -> None:
        if group:
            for window, nats in zip(group, _score_windows(model, group, keep, device), strict=True):
                totals[window.key] += nats
            group.clear()

    for key, text in documents:
        ids = encode(text)
        score.documents[key] = (0.0, len(text.encode()), len(ids))
        totals[key] = 0.0
        for window in windows(key, ids, start_id, context):
            alike = len(window.inputs) == context and window.first_new == half
            (later if alike else others).append(window)
            if len(later) == batch_size:
                flush(later, context - half)
            if len(others) == batch_size:
                flush(others, 0)
        if progress is not None:
            progress(score.documents[key][1])
    flush(later, context - half)
    flush(others, 0)
    model.train(was_training)
    score.documents = {key: (totals[key], size, tokens) for key, (_, size, tokens) in score.documents.items()}
    return score


def _score_windows(model: Any, group: list[_Window], keep: int, device: str) -> list[float]:
    """Nats of each window's new targets. ``keep``: only the logits of so many last positions are needed (0: all)."""
    length = max(len(window.inputs) for window in group)
    inputs = np.zeros((len(group), length), dtype=np.int64)  # padding stands on the right: causal models never see it
    targets = np.zeros_like(inputs)
    new = np.zeros(inputs.shape, dtype=bool)
    for row, window in enumerate(group):
        size = len(window.inputs)
        inputs[row, :size], targets[row, :size], new[row, window.first_new : size] = window.inputs, window.targets, True
    logits = model(input_ids=torch.from_numpy(inputs).to(device), use_cache=False, logits_to_keep=keep).logits
    if keep:
        targets, new = targets[:, -keep:], new[:, -keep:]
    nll = token_nll(logits, torch.from_numpy(targets).to(device)).double().cpu()
    return (nll * torch.from_numpy(new)).sum(dim=1).tolist()


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats of ``targets [...]`` under ``logits [..., vocab]``, in float32."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def load_export(model_dir: Path | str, device: str = "cpu") -> tuple[Any, Any]:
    """Model and tokenizer of an export folder, from local files only; model 2 brings its code along."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hush_transformers()
    model = AutoModelForCausalLM.from_pretrained(model_dir, trust_remote_code=True, local_files_only=True)
    # The tokenizer needs no code of its own, but transformers reads the model's configuration on the way to it and
    # would stop to ask about that.
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True, local_files_only=True)
    return model.to(device).eval(), tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token numbers of ``text`` by an export's tokenizer, nothing added."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def context_of(model: Any) -> int:
    """The most tokens the model was trained to read at once."""
    return getattr(model.config, "max_position_embeddings", None) or model.config.n_positions


def score_export(
    model_dir: Path | str,
    corpus: Corpus,
    *,
    split: str = "test",
    translation: str | None = None,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Score:
    """``score_loaded`` of a split of the corpus, or of one translation's part of it, by an export folder's weights."""
    documents = [d for d in corpus.split(split) if translation is None or d.translation == translation]
    return score_loaded(*load_export(model_dir, device), documents, progress=progress)


def score_loaded(
    model: Any, tokenizer: Any, documents: Iterable[Document], *, progress: Callable[[int], None] | None = None
) -> Score:
    """Score documents with what ``load_export`` gave; keys of the score are the documents' paths."""
    return score_documents(
        model,
        lambda text: encode(tokenizer, text),
        ((document.path, document.read()) for document in documents),
        start_id=tokenizer.bos_token_id,
        context=context_of(model),
        device=str(model.device),
        progress=progress,
    )
