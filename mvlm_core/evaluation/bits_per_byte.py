"""Bits per byte, which is comparable between models with different tokenizers. Lower is better."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_core.console import silence_transformers
from mvlm_core.data.corpus import Corpus, Document, named_texts


def bits_per_byte(nats: float, size: float) -> float:
    """Convert total nats to bits per byte of text; NaN without text."""
    return nats / (math.log(2) * size) if size else math.nan


@dataclass
class DocumentScore:
    """Negative log-likelihood of a document in nats, and the UTF-8 bytes of its text."""

    bytes: int
    nats: float = 0.0


@dataclass
class Score:
    """Negative log-likelihood of a text, by document."""

    documents: dict[str, DocumentScore] = field(default_factory=dict)

    @property
    def nats(self) -> float:
        return math.fsum(document.nats for document in self.documents.values())

    @property
    def bytes(self) -> int:
        return sum(document.bytes for document in self.documents.values())

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.nats, self.bytes)

    def part(self, keys: Collection[str]) -> Score:
        """Restrict the score to documents with these keys."""
        return Score({key: value for key, value in self.documents.items() if key in keys})


@dataclass(frozen=True)
class BitsPerByte:
    """Bits per byte of all documents, by book and by translation."""

    all: float
    books: dict[str, float]
    translations: dict[str, float]


def bits_per_byte_by_part(score: Score, documents: Sequence[Document]) -> BitsPerByte:
    """Break down a score of ``documents``, keyed by path."""

    def by(attribute: str) -> dict[str, float]:
        groups: dict[str, set[str]] = defaultdict(set)
        for document in documents:
            if (name := getattr(document, attribute)) is not None:
                groups[name].add(document.path)
        return {name: score.part(paths).bits_per_byte for name, paths in groups.items()}

    return BitsPerByte(score.bits_per_byte, by("book"), by("translation"))


@dataclass(frozen=True)
class Window:
    """A window of a document: input tokens, their targets, and the index of the first target not yet scored."""

    key: str
    inputs: np.ndarray
    targets: np.ndarray
    first_new: int


def windows(key: str, ids: list[int], start_id: int, context: int) -> Iterator[Window]:
    """Split a document into overlapping windows that score each token exactly once.

    The first window scores all its targets. Each later one starts half a context further and scores only targets that
    the previous one did not reach, so these have at least half a context of preceding tokens.
    """
    sequence = np.array([start_id, *ids], dtype=np.int64)
    begin = scored = 0
    while scored < len(ids):
        end = min(begin + context, len(ids))
        yield Window(key, sequence[begin:end], sequence[begin + 1 : end + 1], scored - begin)
        begin, scored = begin + max(1, context // 2), end


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

    Every token is scored once; the first one is conditioned on ``start_id``. See ``windows``.

    Args:
        progress: called with the bytes of each document once it is split into windows.
    """
    was_training = model.training
    model.eval()
    scores: dict[str, DocumentScore] = {}

    def all_windows() -> Iterator[Window]:
        for key, text in documents:
            scores[key] = DocumentScore(len(text.encode()))
            yield from windows(key, encode(text), start_id, context)
            if progress is not None:
                progress(scores[key].bytes)

    try:
        for window, nats in _window_nats(model, _batches(all_windows(), context, batch_size), batch_size, device):
            scores[window.key].nats += nats
    finally:
        model.train(was_training)
    return Score(scores)


def _window_nats(
    model: Any, batches: Iterable[list[Window]], batch_size: int, device: str
) -> Iterator[tuple[Window, float]]:
    """Yield each window and the nats of its new tokens; ``batch_size`` is halved when memory runs out."""
    left: list[Window] = []
    for batch in batches:
        left += batch
        while left:
            nats = _nats(model, left[:batch_size], device)
            if nats is None and batch_size == 1:
                raise torch.OutOfMemoryError("one window of the model's context does not fit in memory")
            if nats is None:
                batch_size = -(-batch_size // 2)
                continue
            yield from zip(left, nats, strict=False)
            del left[: len(nats)]


def _nats(model: Any, batch: list[Window], device: str) -> list[float] | None:
    """Nats of each window's new tokens; None if memory runs out."""
    try:
        logits, targets, new = window_logits(model, batch, device)
        return (token_nll(logits, targets).double().cpu() * new).sum(dim=1).tolist()
    except torch.OutOfMemoryError:
        return None


def _batches(windows: Iterable[Window], context: int, batch_size: int) -> Iterator[list[Window]]:
    """Batch full-length windows that score only their second half, which need half of the logits, separately from all
    other windows."""
    batches: dict[bool, list[Window]] = {True: [], False: []}
    for window in windows:
        batch = batches[len(window.inputs) == context and window.first_new == context - max(1, context // 2)]
        batch.append(window)
        if len(batch) == batch_size:
            yield batch
            batch.clear()
    yield from filter(None, batches.values())


def window_logits(model: Any, batch: list[Window], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Run the model on a batch of windows.

    Returns:
        Logits ``[window, position, vocab]`` and targets ``[window, position]`` on the device, and a mask of the new
        targets ``[window, position]`` on the CPU, all for the positions from the batch's first new target on.
    """
    length = max(len(window.inputs) for window in batch)
    inputs = np.zeros((len(batch), length), dtype=np.int64)  # right padding, which causal attention ignores
    targets = np.zeros_like(inputs)
    new = np.zeros(inputs.shape, dtype=bool)
    for row, window in enumerate(batch):
        size = len(window.inputs)
        inputs[row, :size], targets[row, :size], new[row, window.first_new : size] = window.inputs, window.targets, True
    last = length - min(window.first_new for window in batch)
    logits = model(input_ids=torch.from_numpy(inputs).to(device), use_cache=False, logits_to_keep=last).logits
    return logits, torch.from_numpy(targets[:, -last:]).to(device), torch.from_numpy(new[:, -last:])


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats of ``targets [...]`` under ``logits [..., vocab]``, in float32."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def load_export(model_dir: Path | str, device: str = "cpu") -> tuple[Any, Any]:
    """Load model and tokenizer of an export folder, from local files only.

    This runs the folder's modeling code; check folders of unknown origin with ``export.file_checks`` first.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    silence_transformers()
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, trust_remote_code=True, local_files_only=True)
    # The tokenizer needs no custom code, but transformers reads the model's config to find its class and would ask
    # whether to trust the code named there.
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True, local_files_only=True)
    return model.to(device).eval(), tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Encode ``text`` with an export's tokenizer, without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def context_of(model: Any) -> int:
    """The model's context length in tokens."""
    return model.config.max_position_embeddings


def score_loaded(
    model: Any,
    tokenizer: Any,
    documents: Iterable[tuple[str, str]],
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> Score:
    """``score_documents`` for a model and tokenizer from ``load_export``."""
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
    """Score a split of the corpus with an export's weights; keys are the documents' paths."""
    return score_loaded(*load_export(model_dir, device), named_texts(corpus.split(split)), progress=progress)
