"""A user's own texts for the corpus: read, cleaned, without what is there already and without what would leak."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bible_corpus.ngram_overlap import LENGTH, WordSequences
from mvlm_core.data.corpus import Corpus, decode
from mvlm_core.errors import UserError, printable
from mvlm_core.files import output_folder_problems, read_regular

FOLDER = "added"  # below the data folder; a folder for each that was added
KINDS = (".txt", ".md", ".markdown")
SIZE_LIMIT = 1 << 30  # bytes of one file
# A text that holds more of a held-out document is a copy of it, not a quotation: all train books of the corpus together
# hold no more than 0.5 % of any held-out one (the audit in the corpus's README).
LEAK_LIMIT = 0.01


@dataclass(frozen=True)
class OwnText:
    """A text that can be added. ``shared``: its sequences of words that also stand in held-out text."""

    path: str
    title: str
    text: str
    shared: int


@dataclass
class Addition:
    """What a folder gives: texts to add, and by path why the others are not.

    ``split`` is "train" where the corpus has held-out text already; None leaves it to the hash of the path.
    """

    source: Path
    split: str | None
    texts: list[OwnText] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def plain_text(markdown: str) -> str:
    """The words of a Markdown text: a line for each heading and list entry, paragraphs apart, no marks, code or HTML.

    Front matter between two lines of ``---`` at the beginning is left out too.
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
    """No control characters, no blanks at line ends, at most one empty line in a row, one line break at the end."""
    text = re.sub(r"[^\S\n]+\n", "\n", text.replace("\t", " ") + "\n")
    text = "".join(c for c in text if c == "\n" or c.isprintable() or c.isspace())
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def title_of(path: str, text: str, is_markdown: bool) -> str:
    """The first heading of a Markdown text, else the file's name in words."""
    heading = re.search(r"^#\s+(.+?)\s*#*$", text, re.M) if is_markdown else None
    return heading[1] if heading else re.sub(r"[-_]+", " ", Path(path).stem)


def gather(source: Path, corpus: Corpus | None) -> Addition:
    """What of ``source`` can be added to ``corpus`` (None: there is none yet).

    Raises:
        UserError: no such folder.
    """
    if not source.is_dir():
        raise UserError(f"--add {source}: no such folder")
    found = Addition(source, "train" if corpus else None)
    known = {d.sha256: d.path for d in corpus.documents} if corpus else {}
    audit = LeakAudit(corpus)
    for file in sorted(source.rglob("*")):
        path = file.relative_to(source).as_posix()
        if file.is_dir() or any(part.startswith(".") for part in Path(path).parts):
            continue
        if file.suffix.lower() not in KINDS:
            found.refused[printable(path)] = f"only {' and '.join(KINDS[:2])} are read; save it as one of them"
            continue
        try:
            path.encode()
            raw = decode(read_regular(file, SIZE_LIMIT))
        except (OSError, ValueError) as error:
            found.refused[printable(path)] = str(getattr(error, "strerror", None) or error)
            continue
        is_markdown = file.suffix.lower() != ".txt"
        text = cleaned(plain_text(raw) if is_markdown else raw)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if not text.strip():
            found.refused[path] = "empty"
        elif digest in known:
            found.refused[path] = f"the same text as {known[digest]}"
        else:
            shared, leak = audit(text)
            if leak:
                found.refused[path] = leak
            else:
                found.texts.append(OwnText(path, title_of(path, raw, is_markdown), text, shared))
        known.setdefault(digest, path)
    return found


class LeakAudit:
    """Finds what a text shares with the held-out documents of a corpus."""

    def __init__(self, corpus: Corpus | None) -> None:
        self._sequences = WordSequences()
        held_out = [d for d in corpus.documents if d.split != "train"] if corpus else []
        self._documents = {d.path: np.unique(self._sequences([d.read()])) for d in held_out}
        everything = list(self._documents.values())
        self._all = np.unique(np.concatenate(everything)) if everything else np.zeros(0, np.uint64)

    def __call__(self, text: str) -> tuple[int, str | None]:
        """The text's sequences that stand in held-out text, repeats counted; and why it must not be trained on, where
        it holds too much of a held-out document."""
        own = self._sequences([text])
        shared = int(np.isin(own, self._all).sum())
        if not shared:
            return 0, None
        shares = {path: float(np.isin(held, own).mean()) for path, held in self._documents.items() if len(held)}
        worst = max(shares, key=shares.get)
        if shares[worst] <= LEAK_LIMIT:
            return shared, None
        return shared, (
            f"it holds {shares[worst]:.1%} of {worst}, which is kept for validation or test: trained on, it would make "
            "the scores worthless"
        )


def add(found: Addition, data_dir: Path) -> Path:
    """Write the texts with their metadata below ``data_dir``; returns the folder. All of them, or none.

    Raises:
        UserError: nothing to add, or the folder cannot be written or is there already.
    """
    target = data_dir / FOLDER / re.sub(r"[^\w.-]+", "-", found.source.resolve().name)
    problems = output_folder_problems(target, "--data_dir:")
    if target.exists():
        problems.append(f"{target} is there already: remove it first, or rename the folder to add")
    if not found.texts:
        problems.append(f"--add {found.source}: holds nothing to add")
    if problems:
        raise UserError(problems)
    staging = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        for text in found.texts:
            data, file = text.text.encode(), (staging / text.path).with_suffix(".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():  # a .txt and a .md of one name
                file = file.with_name(f"{Path(text.path).name}.txt")
            file.write_bytes(data)
            metadata: dict[str, Any] = {
                "title": text.title,
                "source": f"{found.source.name}/{text.path}",
                "category": "own text",
                **({"split": found.split} if found.split else {}),
                "word_count": len(text.text.split()),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            file.with_suffix(".json").write_text(json.dumps(metadata, ensure_ascii=False) + "\n", encoding="utf-8")
        os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def report(found: Addition) -> list[str]:
    """What would be added and what not, in lines."""
    words = sum(len(text.text.split()) for text in found.texts)
    size = sum(len(text.text.encode()) for text in found.texts)
    lines = [f"{found.source}: {len(found.texts)} texts, {words:,} words, {size / 1e6:.2f} MB"]
    for text in found.texts:
        shared = f"; {text.shared} sequences of {LENGTH} words stand in held-out text too" if text.shared else ""
        lines.append(f"  {text.path}: {text.title!r}, {len(text.text.split()):,} words{shared}")
    lines += [f"  not added: {path}: {reason}" for path, reason in found.refused.items()]
    return lines


def listing(corpus: Corpus) -> list[str]:
    """The corpus as a table: by translation or folder its documents, words, split and scores."""
    groups: dict[str, list] = {}
    for document in corpus.documents:
        groups.setdefault(document.translation or str(Path(document.path).parent), []).append(document)
    train = corpus.split("train")
    weights = [d.quality_score * d.biblical_alignment for d in train]
    mean = float(np.average(weights, weights=[d.size for d in train])) or 1.0
    lines = [f"{'text':16}{'documents':>10}{'words':>13}{'MB':>8}{'train':>7}{'valid.':>8}{'test':>6}{'quality':>9}"]
    lines[0] += f"{'alignment':>11}{'weight':>8}"
    for name, documents in sorted(groups.items()):
        splits = [sum(d.split == split for d in documents) for split in ("train", "validation", "test")]
        words = sum(_words(d) for d in documents)
        size = sum(d.size for d in documents)
        quality, alignment = (
            sum(getattr(d, key) * d.size for d in documents) / size for key in ("quality_score", "biblical_alignment")
        )
        lines.append(
            f"{name:16}{len(documents):>10,}{words:>13,}{size / 1e6:>8.2f}{splits[0]:>7}{splits[1]:>8}{splits[2]:>6}"
            f"{quality:>9.1f}{alignment:>11.1f}{quality * alignment / mean:>8.2f}"
        )
    lines.append(f"{len(corpus.documents):,} documents, {sum(d.size for d in corpus.documents) / 1e6:.1f} MB;")
    lines.append("weight: of the text in the content-alignment loss, 1 in the mean")
    return lines + [f"not used: {skipped.path}: {skipped.reason}" for skipped in corpus.skipped]


def _words(document: Any) -> int:
    count = document.metadata.get("word_count")
    return count if isinstance(count, int) else len(document.read().split())
