"""Import a user's texts into the corpus: clean them and reject duplicates and copies of held-out text."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from bible_corpus.ngram_overlap import LENGTH, NgramHasher
from mvlm_core.console import text_table
from mvlm_core.data.corpus import SPLITS, Corpus, Document
from mvlm_core.data.decoding import decode
from mvlm_core.errors import UserError, printable
from mvlm_core.files import output_folder_problems, read_json, read_regular

FOLDER = "added"  # in the data folder; one subfolder per import
SUFFIXES = (".txt", ".md", ".markdown")
SIZE_LIMIT = 1 << 30  # bytes per file
# A text, or an import, containing more than this fraction of a held-out document is a copy, not a quotation: all train
# books of the corpus together contain at most 0.5 % of any held-out book (leak audit in the corpus's README).
LEAK_LIMIT = 0.01


@dataclass(frozen=True)
class ImportedText:
    """A text that can be added.

    Attributes:
        shared: number of its n-grams that also occur in held-out text.
        metadata: content of the ``.json`` file of the same name.
    """

    path: str
    title: str
    text: str
    shared: int
    metadata: dict[str, Any]


@dataclass
class Import:
    """Contents of a folder to import: texts to add, and rejected paths with the reason.

    ``split`` is "train" if the corpus already has held-out text; None assigns splits by the hash of the path.
    """

    source: Path
    split: str | None
    texts: list[ImportedText] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def plain_text(markdown: str) -> str:
    """Convert Markdown to plain text: one line per heading and list item, blank lines between paragraphs.

    Drops markup, code blocks, HTML, and front matter between ``---`` lines at the start.
    """
    from markdown_it import MarkdownIt

    markdown = re.sub(r"\A---\n.*?\n(?:---|\.\.\.)\n", "", markdown, flags=re.S)
    blocks = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "inline":
            parts = [
                "\n" if child.type in ("softbreak", "hardbreak") else child.content
                for child in token.children or ()
                if child.type in ("text", "code_inline", "softbreak", "hardbreak")
            ]
            blocks.append("".join(parts))
    return "\n\n".join(blocks)


def cleaned(text: str) -> str:
    """Remove control characters and trailing spaces, collapse blank lines, and end with one line break."""
    text = re.sub(r"[^\S\n]+\n", "\n", text.replace("\t", " ") + "\n")
    text = "".join(c for c in text if c == "\n" or c.isprintable() or c.isspace())
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def title_of(path: str, text: str, is_markdown: bool) -> str:
    """Return the first heading of a Markdown text, otherwise the file name as words."""
    heading = re.search(r"^#\s+(.+?)\s*#*$", text, re.M) if is_markdown else None
    return heading[1] if heading else re.sub(r"[-_]+", " ", Path(path).stem)


def gather(source: Path, corpus: Corpus | None) -> Import:
    """Collect the texts in ``source`` that can be added to ``corpus`` (None if there is no corpus yet).

    Raises:
        UserError: the folder does not exist.
    """
    if not source.is_dir():
        raise UserError(f"--add {source}: no such folder")
    result = Import(source, "train" if corpus else None)
    known = {d.sha256: d.path for d in corpus.documents} if corpus else {}
    overlap = HeldOutOverlap(corpus)
    files = sorted(source.rglob("*"))
    texts = {file.with_suffix("") for file in files if file.suffix.lower() in SUFFIXES}
    for file in files:
        path = file.relative_to(source).as_posix()
        if file.is_dir() or any(part.startswith(".") for part in Path(path).parts):
            continue
        if file.suffix == ".json" and file.with_suffix("") in texts:
            continue  # metadata, read with its text
        try:
            result.texts.append(_read(file, path, known, overlap))
        except (OSError, ValueError) as error:
            result.refused[printable(path)] = getattr(error, "strerror", None) or str(error)
    leaks = overlap.leaks()
    result.texts = [text for text in result.texts if text.path not in leaks]
    result.refused |= {printable(path): leaks[path] for path in sorted(leaks)}
    return result


def _read(file: Path, path: str, known: dict[str, str], overlap: HeldOutOverlap) -> ImportedText:
    """Read and check one text; add its hash to ``known``. Raises OSError or ValueError if it must be rejected."""
    if file.suffix.lower() not in SUFFIXES:
        raise ValueError(f"only {' and '.join(SUFFIXES[:2])} files are read; convert it to one of them")
    path.encode()
    raw = decode(read_regular(file, SIZE_LIMIT))
    is_markdown = file.suffix.lower() != ".txt"
    text = cleaned(plain_text(raw) if is_markdown else raw)
    if not text.strip():
        raise ValueError("empty")
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest in known:
        raise ValueError(f"the same text as {known[digest]}")
    metadata = _metadata(file.with_suffix(".json"))
    title = str(metadata.get("title") or title_of(path, raw, is_markdown))
    imported = ImportedText(path, title, text, overlap(path, text), metadata)
    known[digest] = path
    return imported


def _metadata(file: Path) -> dict[str, Any]:
    """Read the metadata of a text; {} if it has none. Raises ValueError if it cannot be used."""
    if not file.exists():
        return {}
    if not (metadata := read_json(file)):
        raise ValueError(f"its metadata {file.name} is not a JSON object: correct or remove it")
    if (split := metadata.get("split")) not in (None, *SPLITS):
        raise ValueError(f"its metadata {file.name} has the split {split!r:.40}: use one of {', '.join(SPLITS)}")
    return metadata


class HeldOutOverlap:
    """Count the n-grams that texts share with the held-out documents of a corpus, each text alone and all together."""

    def __init__(self, corpus: Corpus | None) -> None:
        self._hasher = NgramHasher()
        held_out = [d for d in corpus.documents if d.split != "train"] if corpus else []
        ngrams = {d.path: np.unique(self._hasher([d.read()])) for d in held_out}
        self._documents = {path: held for path, held in ngrams.items() if len(held)}
        self._all = np.unique(np.concatenate([np.zeros(0, np.uint64), *self._documents.values()]))
        self._seen = {path: np.zeros(len(held), bool) for path, held in self._documents.items()}
        self._sources: dict[str, list[str]] = {path: [] for path in self._documents}

    def __call__(self, name: str, text: str) -> int:
        """Count n-grams of ``text``, with repeats, that occur in held-out text. Raises ValueError if it is a copy."""
        ngrams = self._hasher([text])
        shared = ngrams[np.isin(ngrams, self._all)]
        if len(shared):
            found = {path: np.isin(held, shared) for path, held in self._documents.items()}
            share, path = max((mask.mean(), path) for path, mask in found.items())
            if share > LEAK_LIMIT:
                raise ValueError(f"contains {share:.1%} of {_held_out(path)}")
            for path, mask in found.items():
                if mask.any():
                    self._seen[path] |= mask
                    self._sources[path].append(name)
        return len(shared)

    def leaks(self) -> dict[str, str]:
        """The texts that, although not copies, together contain too much of a held-out document, with the reason."""
        shares = sorted((mask.mean(), path) for path, mask in self._seen.items())
        return {
            name: f"one of {len(self._sources[path])} files that together contain {share:.1%} of {_held_out(path)}"
            for share, path in shares
            if share > LEAK_LIMIT
            for name in self._sources[path]
        }


def _held_out(path: str) -> str:
    return f"{path}, which is held out for validation or test: training on it would invalidate the scores"


def target_folder(imported: Import, data_dir: Path) -> Path:
    """Return the new folder in ``data_dir`` for the texts.

    Raises:
        UserError: nothing to add, or the folder already exists or cannot be written.
    """
    name = imported.source.resolve().name.lstrip(".")  # hidden folders are not read
    target = data_dir / FOLDER / re.sub(r"[^\w.-]+", "-", name)
    problems = output_folder_problems(target, "--data_dir:")
    if target.exists():
        problems.append(f"{target} already exists: remove it, or rename the folder to add")
    if not imported.texts:
        problems.append(f"--add {imported.source}: contains nothing to add")
    if problems:
        raise UserError(problems)
    return target


def add(imported: Import, target: Path) -> None:
    """Write the texts with their metadata atomically into the folder ``target``."""
    staging = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        for text in imported.texts:
            data, file = text.text.encode(), (staging / text.path).with_suffix(".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():  # a .txt and a .md with the same name
                file = file.with_name(f"{Path(text.path).name}.txt")
            file.write_bytes(data)
            defaults = {"source": f"{imported.source.name}/{text.path}", "category": "user data"}
            defaults |= {"split": imported.split} if imported.split else {}
            measured = {"word_count": len(text.text.split()), "sha256": hashlib.sha256(data).hexdigest()}
            metadata = defaults | text.metadata | {"title": text.title} | measured
            file.with_suffix(".json").write_text(json.dumps(metadata, ensure_ascii=False) + "\n", encoding="utf-8")
        os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def report(imported: Import) -> list[str]:
    """Format the texts to add and the rejected files, one line each."""
    words = sum(len(text.text.split()) for text in imported.texts)
    size = sum(len(text.text.encode()) for text in imported.texts)
    lines = [f"{imported.source}: {len(imported.texts)} texts, {words:,} words, {size / 1e6:.2f} MB"]
    for text in imported.texts:
        shared = f"; {text.shared} n-grams of {LENGTH} words are also in held-out text" if text.shared else ""
        lines.append(f"  {text.path}: {text.title!r}, {len(text.text.split()):,} words{shared}")
    return lines + [f"  not added: {path}: {reason}" for path, reason in imported.refused.items()]


def listing(corpus: Corpus) -> list[str]:
    """Format the corpus as a table by translation or folder: documents, words, splits, scores and loss weight."""
    groups: dict[str, list[Document]] = {}
    for document in corpus.documents:
        groups.setdefault(document.translation or str(Path(document.path).parent), []).append(document)

    def mean(documents: list[Document], score: Callable[[Document], float]) -> float:
        return float(np.average([score(d) for d in documents], weights=[d.size for d in documents]))

    def weight(document: Document) -> float:
        return document.quality_score * document.biblical_alignment

    train_weight = mean(corpus.split("train"), weight) or 1.0
    header, rows = ["text", "documents", "words", "MB", *SPLITS, "quality", "alignment", "weight"], []
    for name, documents in sorted(groups.items()):
        row = [name, f"{len(documents):,}", f"{sum(map(_words, documents)):,}"]
        row += [f"{sum(d.size for d in documents) / 1e6:.2f}"]
        row += [str(sum(d.split == split for d in documents)) for split in SPLITS]
        row += [f"{mean(documents, attrgetter(score)):.1f}" for score in ("quality_score", "biblical_alignment")]
        rows.append([*row, f"{mean(documents, weight) / train_weight:.2f}"])
    lines = text_table(header, rows)
    lines.append(f"{len(corpus.documents):,} documents, {sum(d.size for d in corpus.documents) / 1e6:.1f} MB")
    lines.append("weight: weight of the text in the content-alignment loss, normalized to mean 1")
    return lines + [f"not used: {skipped.path}: {skipped.reason}" for skipped in corpus.skipped]


def _words(document: Document) -> int:
    count = document.metadata.get("word_count")
    return count if isinstance(count, int) else len(document.read().split())
