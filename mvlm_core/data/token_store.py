"""Tokenized training text: memory-mapped token files, cached under a hash of corpus and tokenizer."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvlm_core.console import progress
from mvlm_core.data.corpus import Corpus, Document
from mvlm_core.data.tokenizer import ByteLevelBPE
from mvlm_core.errors import UserError
from mvlm_core.files import fsync_path, leftovers, load_json_object, sha256_file, temporary_folder, write_json_atomic

FORMAT = 3
_ENCODE_BYTES = 4 << 20  # text per tokenizer call: enough to keep all cores busy with little memory
log = logging.getLogger("mvlm")


@dataclass(frozen=True)
class TokenStore:
    """The training text as one array of token ids, document after document.

    Attributes:
        tokens: ``[total]``, memory-mapped; each document is ``start, its tokens, end`` (if the tokenizer has one).
        starts: ``[documents + 1]``, offset of each document; the last entry is the total.
        repeats: ``[documents]``, how often one epoch reads each document.
        weights: ``[documents]`` float64, content-alignment weights with mean 1 over the tokens of an epoch.
        token_bytes: ``[vocab]``, UTF-8 bytes of each token (0 for special tokens).
        text_bytes: UTF-8 bytes of all documents, each counted once.
        bytes_per_token: UTF-8 bytes per token over an epoch.
    """

    tokens: np.ndarray
    starts: np.ndarray
    repeats: np.ndarray
    weights: np.ndarray
    token_bytes: np.ndarray
    text_bytes: int
    bytes_per_token: float


def parse_mix(mix: str | None) -> dict[str, int]:
    """Parse ``"folder=8,another/folder=2"`` into folder → repeats.

    Raises:
        UserError: not of that form, or a negative number.
    """
    repeats = {}
    for part in mix.split(",") if mix else []:
        folder, _, number = part.strip().rpartition("=")
        if not folder or not number.isdecimal():
            raise UserError(f"--train_mix {mix}: expected FOLDER=TIMES, separated by commas")
        repeats[folder.strip("/")] = int(number)
    return repeats


def document_repeats(documents: list[Document], mix: str | None) -> np.ndarray:
    """How often an epoch reads each document: the count in ``mix`` for its deepest matching folder, or else once.

    Raises:
        UserError: a folder without training documents, or no text left to train on.
    """
    counts = parse_mix(mix)
    repeats = np.ones(len(documents), dtype=np.int64)
    for folder in sorted(counts, key=len):
        inside = np.array([document.path.startswith(f"{folder}/") for document in documents], dtype=bool)
        if not inside.any():
            raise UserError(f"--train_mix {folder}={counts[folder]}: no training document below {folder}")
        repeats[inside] = counts[folder]
    if not repeats.any():
        raise UserError(f"--train_mix {mix} leaves no text to train on")
    return repeats


def document_coverage(documents: list[Document], repeats: np.ndarray, epochs: float) -> dict[str, float]:
    """Expected share of each document, by path, that ``epochs`` of training read.

    The copies of a document lie at independent, random places of an epoch, so one of r is missed with (1 − epochs)^r.
    """
    shares = 1 - (1 - min(epochs, 1.0)) ** repeats.astype(np.float64)
    return dict(zip((document.path for document in documents), shares.tolist(), strict=True))


def alignment_weights(documents: list[Document], lengths: np.ndarray) -> np.ndarray:
    """Weight of each document: ``quality_score × biblical_alignment``, scaled to mean 1 over all tokens.

    If every product is 0, all documents get weight 1.

    Args:
        lengths: ``[documents]``, tokens of each document in an epoch.
    """
    raw = np.array([document.quality_score * document.biblical_alignment for document in documents], dtype=np.float64)
    mean = float((raw * lengths).sum() / max(1, lengths.sum()))
    return raw / mean if mean > 0 else np.ones_like(raw)


def _texts(documents: Iterable[Document]) -> Iterator[list[str]]:
    """Yield the documents' texts in groups of about ``_ENCODE_BYTES``, so that memory does not grow with the corpus."""
    group, size = [], 0
    for document in documents:
        group.append(document.read())
        size += document.size
        if size >= _ENCODE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def token_folder(corpus: Corpus, tokenizer: ByteLevelBPE, cache_dir: Path | str) -> Path:
    """Cache folder of ``build_token_store`` for this corpus and tokenizer."""
    key = hashlib.sha256(f"{FORMAT}:{corpus.fingerprint}:{tokenizer.sha256}".encode()).hexdigest()[:32]
    return Path(cache_dir) / "tokens" / key


def build_token_store(
    corpus: Corpus,
    tokenizer: ByteLevelBPE,
    cache_dir: Path | str,
    *,
    mix: str | None = None,
    excluded: Collection[str] = (),
    quiet: bool = False,
) -> TokenStore:
    """Tokenize the corpus's training split, or load it from the cache if corpus and tokenizer are unchanged.

    Args:
        mix: how often an epoch reads each folder; see ``document_repeats``.
        excluded: SHA-256 of documents that are never read.
    """
    documents = corpus.split("train")
    folder = token_folder(corpus, tokenizer, cache_dir)
    index = _intact_index(folder, len(documents))
    if index is None:
        _write(documents, tokenizer, folder, quiet)
        if (index := _intact_index(folder, len(documents))) is None:
            raise UserError(f"{folder} changed while it was read; restart the run")
    repeats = document_repeats(documents, mix)
    repeats[[document.sha256 in excluded for document in documents]] = 0
    lengths = np.array(index["lengths"], dtype=np.int64)
    sizes = np.array([document.size for document in documents], dtype=np.int64)
    return TokenStore(
        tokens=np.memmap(folder / "tokens.bin", dtype=index["dtype"], mode="r"),
        starts=np.concatenate(([0], np.cumsum(lengths))),
        repeats=repeats,
        weights=alignment_weights(documents, lengths * repeats),
        token_bytes=tokenizer.token_bytes(),
        text_bytes=int(sizes.sum()),
        bytes_per_token=float((sizes * repeats).sum() / max(1, (lengths * repeats).sum())),
    )


def _write(documents: list[Document], tokenizer: ByteLevelBPE, folder: Path, quiet: bool) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    for leftover in leftovers(folder.parent, "*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = temporary_folder(folder.parent, folder.name)
    lengths: list[int] = []
    try:
        total = sum(document.size for document in documents)
        with (
            open(temporary / "tokens.bin", "wb") as file,
            progress(total, "tokens", "B", quiet=quiet, unit_scale=True) as bar,
        ):
            for group in _texts(documents):
                for ids in tokenizer.encode_batch(group):
                    ids = [tokenizer.start_id, *ids, *([] if tokenizer.end_id is None else [tokenizer.end_id])]
                    np.asarray(ids, dtype=dtype).tofile(file)
                    lengths.append(len(ids))
                bar.update(sum(len(text.encode()) for text in group))
            file.flush()
            os.fsync(file.fileno())
        index = {"dtype": np.dtype(dtype).name, "lengths": lengths, "sha256": sha256_file(temporary / "tokens.bin")}
        write_json_atomic(temporary / "index.json", index)
        _move_into_place(temporary, folder, len(documents))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_into_place(temporary: Path, folder: Path, documents: int) -> None:
    """Rename ``temporary`` to ``folder``, unless ``folder`` is already intact, as another run may be reading it."""
    try:
        os.rename(temporary, folder)
    except OSError:
        if _intact_index(folder, documents) is not None:
            return
        damaged = temporary.with_name(f"{temporary.name}-damaged")
        os.rename(folder, damaged)
        shutil.rmtree(damaged, ignore_errors=True)
        os.rename(temporary, folder)
    fsync_path(folder.parent)


def _intact_index(folder: Path, documents: int) -> dict[str, Any] | None:
    """Read the index in ``folder``; None if it is missing or the tokens are damaged."""
    file = folder / "index.json"
    if not file.exists():
        return None
    try:
        index = load_json_object(file)
        if index.get("dtype") not in ("uint16", "uint32"):
            raise ValueError(f"{file.name} is not a token index")
        lengths = index.get("lengths")
        if not isinstance(lengths, list) or len(lengths) != documents or not all(type(n) is int for n in lengths):
            raise ValueError(f"{file.name} does not give the lengths of {documents} documents")
        if index.get("sha256") != sha256_file(folder / "tokens.bin"):
            raise ValueError("tokens.bin has changed since it was written (its SHA-256 differs)")
    except (OSError, ValueError) as error:
        log.warning("tokens in %s are damaged and will be rebuilt: %s", folder, error)
        return None
    return index
