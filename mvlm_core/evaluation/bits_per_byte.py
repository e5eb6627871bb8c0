"""Bits per byte: the one measure of quality that compares models with different tokenizers. Lower is better."""

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


def bits_per_byte(nats: float, size: float) -> float:
    """Total nats over (ln 2 × bytes of text). NaN for no text."""
    return nats / (math.log(2) * size) if size else math.nan


@dataclass
class Score:
    """Negative log-likelihood of a text: for each document its nats, UTF-8 bytes and tokens."""

    documents: dict[str, tuple[float, int, int]] = field(default_factory=dict)

    @property
    def nats(self) -> float:
        return math.fsum(nats for nats, _, _ in self.documents.values())

    @property
    def bytes(self) -> int:
        return sum(size for _, size, _ in self.documents.values())

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.nats, self.bytes)

    def part(self, keep: Callable[[str], bool]) -> Score:
        """The score of the documents whose key ``keep`` accepts."""
        return Score({key: value for key, value in self.documents.items() if keep(key)})


@dataclass(frozen=True)
class BitsPerByte:
    """Bits per byte of all documents, and by book and translation of those that have one."""

    all: float
    books: dict[str, float]
    translations: dict[str, float]


def bits_per_byte_by_part(score: Score, documents: Sequence[Document]) -> BitsPerByte:
    """A score of ``documents``, keyed by path, in parts."""

    def by(attribute: str) -> dict[str, float]:
        groups: dict[str, set[str]] = defaultdict(set)
        for document in documents:
            if (name := getattr(document, attribute)) is not None:
                groups[name].add(document.path)
        return {name: score.part(paths.__contains__).bits_per_byte for name, paths in groups.items()}

    return BitsPerByte(score.bits_per_byte, by("book"), by("translation"))


@dataclass(frozen=True)
class _Window:
    """A stretch of a document: input tokens, their targets, and the index of the first target not yet scored."""

    key: str
    inputs: np.ndarray
    targets: np.ndarray
    first_new: int


def windows(key: str, ids: list[int], start_id: int, context: int) -> Iterator[_Window]:
    """Cut a document into windows so that each token is a new target exactly once.

    The first window scores all its targets. Each later one starts half a context further on and scores only what the
    previous one did not reach, so every target has at least half a context before it.
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
    """Score ``(key, text)`` pairs with a transformers causal language model, in the precision of its weights.

    Every token is scored once, the first one after ``start_id``; see ``windows``.

    Args:
        progress: called with the bytes of each document when it is cut into windows.
    """
    was_training = model.training
    model.eval()
    nats: dict[str, float] = {}
    sizes: dict[str, tuple[int, int]] = {}
    stride = max(1, context // 2)
    # Batches in the making, by how many last positions need logits (0: all). Full windows of which only the second
    # half is new are all alike and save half the logits; the first and last ones of documents have any length.
    batches: dict[int, list[_Window]] = {stride: [], 0: []}

    def score_batch(last: int) -> None:
        for window, value in zip(batches[last], _score_windows(model, batches[last], last, device), strict=True):
            nats[window.key] += value
        batches[last].clear()

    for key, text in documents:
        ids = encode(text)
        nats[key], sizes[key] = 0.0, (len(text.encode()), len(ids))
        for window in windows(key, ids, start_id, context):
            last = stride if len(window.inputs) == context and window.first_new == context - stride else 0
            batches[last].append(window)
            if len(batches[last]) == batch_size:
                score_batch(last)
        if progress is not None:
            progress(sizes[key][0])
    for last, batch in batches.items():
        if batch:
            score_batch(last)
    model.train(was_training)
    return Score({key: (nats[key], *sizes[key]) for key in sizes})


def _score_windows(model: Any, batch: list[_Window], last: int, device: str) -> list[float]:
    """Nats of each window's new targets, which lie in the ``last`` positions (0: anywhere)."""
    length = max(len(window.inputs) for window in batch)
    inputs = np.zeros((len(batch), length), dtype=np.int64)  # padded on the right, which causal models never see
    targets = np.zeros_like(inputs)
    new = np.zeros(inputs.shape, dtype=bool)
    for row, window in enumerate(batch):
        size = len(window.inputs)
        inputs[row, :size], targets[row, :size], new[row, window.first_new : size] = window.inputs, window.targets, True
    logits = model(input_ids=torch.from_numpy(inputs).to(device), use_cache=False, logits_to_keep=last).logits
    targets, new = targets[:, -last:], new[:, -last:]
    nll = token_nll(logits, torch.from_numpy(targets).to(device)).double().cpu()
    return (nll * torch.from_numpy(new)).sum(dim=1).tolist()


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats of ``targets [...]`` under ``logits [..., vocab]``, in float32."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def load_export(model_dir: Path | str, device: str = "cpu") -> tuple[Any, Any]:
    """Model and tokenizer of an export folder, from local files only.

    Runs the modelling code in that folder: ``export.file_checks`` checks folders of unknown origin.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hush_transformers()
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, trust_remote_code=True, local_files_only=True)
    # The tokenizer needs no code of its own, but transformers reads the model's configuration to find it and would
    # stop to ask about the code named there.
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True, local_files_only=True)
    return model.to(device).eval(), tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` by an export's tokenizer, without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def context_of(model: Any) -> int:
    """The model's context length in tokens."""
    return getattr(model.config, "max_position_embeddings", None) or model.config.n_positions


def score_loaded(
    model: Any,
    tokenizer: Any,
    documents: Iterable[tuple[str, str]],
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> Score:
    """``score_documents`` with what ``load_export`` returned."""
    return score_documents(
        model,
        lambda text: encode(tokenizer, text),
        documents,
        start_id=tokenizer.bos_token_id,
        context=context_of(model),
        batch_size=batch_size,
        device=str(model.device),
        progress=progress,
    )


def score_export(
    model_dir: Path | str,
    corpus: Corpus,
    *,
    split: str = "test",
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Score a split of the corpus with an export folder's weights; keys are the documents' paths."""
    documents = ((document.path, document.read()) for document in corpus.split(split))
    return score_loaded(*load_export(model_dir, device), documents, progress=progress)
