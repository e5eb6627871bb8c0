"""Read a folder of `.txt` files, each with an optional `.json`, as documents with a split and two scores.

The built corpus and user data follow the same rules. `.txt` files are found at any depth; hidden files and folders
(`.name`) are ignored. `Corpus.skipped` lists with the reason: unusable files, train files whose text is held out
elsewhere, and invalid values in a `.json`, which are replaced by defaults.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from mvlm_core.data.decoding import decode
from mvlm_core.errors import UserError, printable
from mvlm_core.files import read_json, read_regular

SPLITS = ("train", "validation", "test")
NO_TEST_TEXT = 'no test text; to hold out a file as test text, set "split": "test" in the .json file of the same name'
MANIFEST_NAME = "corpus_manifest.json"  # in a built corpus; optional in a user's folder
MAX_SCORE = 10.0
VALIDATION_SUBSET_BYTES = 65_536
METADATA_LIMIT = 16 << 20  # bytes; the largest in the built corpus is 60 kilobytes
_LINK = "a symbolic link; copy the text itself"
_BUILD_IT = "build the corpus with `python prepare_dataset.py`"


@dataclass(frozen=True)
class Document:
    """One text file, identified by `path` (POSIX, relative to the data folder). `size` and `sha256` refer to the UTF-8
    bytes of the text that `read` returns; scores range from 0 to 10."""

    path: str
    file: Path
    split: str
    quality_score: float
    biblical_alignment: float
    translation: str | None
    book: str | None
    size: int
    sha256: str
    metadata: dict[str, Any]

    def read(self) -> str:
        """Read the text: NFC, no byte-order mark, "\\n" line endings. Raises UserError if it has changed."""
        try:
            text = decode(read_regular(self.file))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.file} can no longer be read: {_reason(error)}") from error
        if hashlib.sha256(text.encode()).hexdigest() != self.sha256:
            raise UserError(f"{self.file} changed during the run: restore it to continue, or start over with --fresh")
        return text


@dataclass(frozen=True)
class SkippedFile:
    """A file that was skipped or whose metadata was only partly used, with the reason."""

    path: str
    reason: str


@dataclass(frozen=True)
class Corpus:
    """All documents of a data folder, sorted by path.

    Attributes:
        fingerprint: changes when any byte, split or score changes.
        primary_translation: the translation that is also scored separately; None if the corpus manifest names none.
    """

    root: Path
    documents: tuple[Document, ...]
    skipped: tuple[SkippedFile, ...]
    fingerprint: str
    primary_translation: str | None = None

    def split(self, name: str) -> list[Document]:
        """The documents of one split, in path order."""
        return [document for document in self.documents if document.split == name]

    def primary_part(self, split: str) -> list[Document]:
        """The primary translation's documents of one split; empty if the corpus has no primary translation."""
        return [d for d in self.split(split) if d.translation is not None and d.translation == self.primary_translation]


def load_corpus(
    data_dir: Path | str,
    *,
    validation_split: float = 0.05,
    validation_dir: Path | str | None = None,
    only: str | None = None,
) -> Corpus:
    """Read the documents below `data_dir`.

    A document's split comes from its metadata. If it has none, a hash of its path (the same on every machine)
    assigns it to validation or test with probability `validation_split` each, and otherwise to train.

    Args:
        validation_split: fraction of documents without a split to assign to validation, and as many to test; 0 to 0.5.
        validation_dir: a folder whose files form the validation split (their paths begin with "validation_dir/");
            validation documents of `data_dir` then become train documents.
        only: use only this subfolder of `data_dir`.

    Raises:
        UserError: no such folder, no readable text in it, or no training or validation text.
    """
    if not 0 <= validation_split <= 0.5:
        raise UserError(
            f"--validation_split must be between 0 and 0.5 (test gets the same fraction), not {validation_split}"
        )
    root = Path(data_dir).resolve()
    documents, skipped = _FolderReader(root, validation_split).read(
        "data folder", f"{_BUILD_IT} or choose another folder", only or ""
    )
    if validation_dir is not None:
        own, more_skipped = _FolderReader(Path(validation_dir).resolve(), 0.0).read(
            "validation folder", "choose it with --validation_dir"
        )
        held_out = {d.file.resolve() for d in own}  # a validation folder inside the data folder is not trained on
        documents = [d for d in documents if d.file.resolve() not in held_out]
        documents = [replace(d, split="train") if d.split == "validation" else d for d in documents]
        documents += [replace(d, path=f"validation_dir/{d.path}", split="validation") for d in own]
        skipped += [SkippedFile(f"validation_dir/{s.path}", s.reason) for s in more_skipped]
    documents.sort(key=lambda d: d.path)
    documents = _with_every_needed_split(documents, root)
    documents, copies = _without_held_out_copies(documents, root)
    skipped += copies
    fingerprint = hashlib.sha256()
    for d in documents:
        fingerprint.update(json.dumps([d.path, d.split, d.quality_score, d.biblical_alignment, d.sha256]).encode())
    primary = read_json(root / MANIFEST_NAME).get("primary_translation")
    return Corpus(
        root,
        tuple(documents),
        tuple(sorted(skipped, key=lambda s: s.path)),
        fingerprint.hexdigest(),
        primary if isinstance(primary, str) else None,
    )


def named_texts(documents: Iterable[Document]) -> Iterator[tuple[str, str]]:
    """Yield the path and the text of each document."""
    return ((document.path, document.read()) for document in documents)


def validation_subset(corpus: Corpus, validation_text: str = "primary") -> list[tuple[Document, str]]:
    """Validation text scored during training, as (document, text): all validation documents for "all".

    For "primary", the primary translation's if there are any; otherwise the first 65,536 bytes of all validation
    documents in path order, cut at the end of a line (or of a character if one line is longer).
    """
    if validation_text == "all":
        return [(d, d.read()) for d in corpus.split("validation")]
    if primary := corpus.primary_part("validation"):
        return [(d, d.read()) for d in primary]
    subset, left = [], VALIDATION_SUBSET_BYTES
    for document in corpus.split("validation"):
        text = document.read()
        data = text.encode()
        if len(data) > left:
            head = data[:left]
            cut = head.rfind(b"\n") + 1
            text = (head[:cut] if cut else head).decode(errors="ignore")
        if text:
            subset.append((document, text))
        left -= len(data)
        if left <= 0:
            break
    return subset


class _FolderReader:
    """Reads the documents below ``root`` and collects ``skipped`` files."""

    def __init__(self, root: Path, validation_split: float) -> None:
        self.root = root
        self.validation_split = validation_split
        self.skipped: list[SkippedFile] = []

    def read(self, what: str, if_missing: str, only: str = "") -> tuple[list[Document], list[SkippedFile]]:
        """Return the documents below the subfolder ``only`` and the skipped files. Raises UserError if there are none.

        Args:
            what: name of the folder, for error messages.
            if_missing: what to do if there is no such folder.
        """
        root, start = self.root, self.root / only
        if printable(str(root)) != str(root):  # the name goes into logs and the export's training_config.json
            raise UserError(f"{what} {root}: its path has control characters or is not valid UTF-8; rename it")
        if not root.is_dir():
            missing = "is not a folder" if root.exists() else "does not exist"
            raise UserError(f"{what} {root} {missing}; {if_missing}")
        if not start.is_dir() or not start.resolve().is_relative_to(root):
            raise UserError(f"{what} {root} has no folder {only} (--data_subset); {_BUILD_IT}")
        documents = [document for file in self._text_files(start) if (document := self._read_document(file))]
        if not documents:
            lines = [f"{what} {start} holds no readable .txt file"]
            lines += [f"{s.path}: {s.reason}" for s in self.skipped[:10]]
            if len(self.skipped) > 10:
                lines.append(f"and {len(self.skipped) - 10} more files that cannot be used")
            raise UserError(lines)
        return documents, self.skipped

    def _skip(self, file: Path, reason: str) -> None:
        self.skipped.append(SkippedFile(printable(self._relative(file)), reason))

    def _relative(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def _text_files(self, start: Path) -> Iterator[Path]:
        """Yield every `.txt` file below `start`, without following symbolic links."""

        def unreadable(error: OSError) -> None:
            self._skip(Path(error.filename), _reason(error))

        for folder, folders, files in os.walk(start, onerror=unreadable):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for path in [Path(folder, name) for name in folders]:
                if os.path.islink(path):
                    self._skip(path, _LINK)
                elif path.suffix.lower() == ".txt":
                    self._skip(path, "a folder named like a text file")
            texts = [Path(folder, name) for name in sorted(files) if not name.startswith(".")]
            for path in [path for path in texts if path.suffix.lower() == ".txt"]:
                if os.path.islink(path):
                    self._skip(path, _LINK)
                else:
                    yield path  # `_read_document` refuses what is not a regular file

    def _read_document(self, file: Path) -> Document | None:
        path = self._relative(file)
        try:
            if path.encode(errors="replace") != os.fsencode(path):
                raise ValueError("a file name that is not UTF-8")
            text = decode(read_regular(file, psutil.virtual_memory().total // 4))  # decoding needs several copies
            if not text.strip():
                raise ValueError("empty")
        except (OSError, ValueError) as error:
            self._skip(file, _reason(error))
            return None
        metadata = self._read_metadata(file.with_suffix(".json"))
        problems: list[str] = []

        def value(key: str, is_valid: Callable[[Any], bool], expected: str, default: Any = None) -> Any:
            given = metadata.get(key)
            if given is None or is_valid(given):
                return default if given is None else given
            problems.append(f"{key} {reprlib.repr(given)} is not {expected}")
            return default

        split = value("split", lambda given: given in SPLITS, f"one of {', '.join(SPLITS)}")
        quality = value("quality_score", _is_score, "a number from 0 to 10", MAX_SCORE)
        alignment = value("biblical_alignment", _is_score, "a number from 0 to 10", MAX_SCORE)
        translation, book = (value(key, _is_text, "text") for key in ("translation", "book"))
        if problems:
            self._skip(file.with_suffix(".json"), "; ".join(problems) + "; the text is used with defaults")
        data = text.encode()
        split = split or _split_by_hash(path, self.validation_split)
        sha256 = hashlib.sha256(data).hexdigest()
        scores = float(quality), float(alignment)
        return Document(path, file, split, *scores, translation, book, len(data), sha256, metadata)

    def _read_metadata(self, file: Path) -> dict[str, Any]:
        if not os.path.lexists(file):
            return {}
        try:
            if not file.resolve(strict=True).is_relative_to(self.root):
                raise ValueError("a symbolic link out of the data folder")
            text = decode(read_regular(file, METADATA_LIMIT))
            metadata = json.loads(text)
            if not isinstance(metadata, dict):
                raise ValueError("not a JSON object")
            if "\\u" in text:
                json.dumps(metadata, ensure_ascii=False).encode()  # an escape may be a lone surrogate
        except UnicodeEncodeError:
            self._skip(file, "metadata ignored: a lone surrogate in a string; the text is used")
            return {}
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: nested too deeply, or a symlink loop
            self._skip(file, f"metadata ignored: {_reason(error)}; the text is used")
            return {}
        return metadata


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_score(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value <= MAX_SCORE  # False for NaN


def _hash_share(path: str) -> float:
    """Hash a path to a number from 0 to 1."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8]) / 2**64


def _split_by_hash(path: str, validation_split: float) -> str:
    share = _hash_share(path)
    if share < validation_split:
        return "validation"
    return "test" if share < 2 * validation_split else "train"


def _with_every_needed_split(documents: list[Document], root: Path) -> list[Document]:
    """Move one document if a folder is so small that the hash left train or validation empty."""
    missing = {"train", "validation"} - {d.split for d in documents}
    free = sorted((d for d in documents if d.metadata.get("split") not in SPLITS), key=lambda d: _hash_share(d.path))
    free = [d for d in free if not d.path.startswith("validation_dir/")]
    for split in sorted(missing):
        # Train gets the document least likely to be held out, validation the most likely one.
        candidates = free if split == "validation" else free[::-1]
        needed = "train" if split == "validation" else "validation"
        spare = [d for d in candidates if d.split != needed or sum(e.split == needed for e in documents) > 1]
        if not spare:
            raise UserError(
                f"{root}: no text for the {split} split; add a second .txt file, use --validation_dir, "
                f'or set "split": "{split}" in the .json of a file'
            )
        moved = replace(spare[0], split=split)
        documents = [moved if d.path == moved.path else d for d in documents]
        free = [moved if d.path == moved.path else d for d in free]
    return documents


def _without_held_out_copies(documents: list[Document], root: Path) -> tuple[list[Document], list[SkippedFile]]:
    """Drop train documents whose text is also in validation or test: training on them would invalidate the scores.

    Raises:
        UserError: no train document is left.
    """
    held_out = {d.sha256: d for d in documents if d.split != "train"}
    kept, copies = [], []
    for d in documents:
        original = held_out.get(d.sha256)
        if d.split != "train" or original is None:
            kept.append(d)
            continue
        reason = f"the same text as {printable(original.path)}, which is held out for {original.split}"
        copies.append(SkippedFile(printable(d.path), reason))
    if not any(d.split == "train" for d in kept):
        raise UserError(f"{root}: all train text is a copy of held-out text; add other texts or remove the copies")
    return kept, copies


def _reason(error: BaseException) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error) or type(error).__name__
