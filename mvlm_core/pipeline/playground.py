"""Renders the playground's content as HTML from loaded models and training records, independent of the page itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mvlm_core.data.corpus import Corpus
from mvlm_core.data.decoding import decode
from mvlm_core.errors import UserError
from mvlm_core.evaluation.bits_per_byte import encode
from mvlm_core.evaluation.compression import LABELS, compared_texts, compressed_bits_by_part
from mvlm_core.evaluation.surprisal import (
    Token,
    bits_by_part,
    fit_to_context,
    governance_traces,
    score_tokens,
    sentences,
    stream_tokens,
)
from mvlm_core.export.archive import opened
from mvlm_core.export.manifest import MANIFEST, export_bytes, exports_in, training_config, verify_folder
from mvlm_core.files import template
from mvlm_core.metrics import BY_NAME, METRICS
from mvlm_core.pipeline.report import SHAPE
from mvlm_core.run_layout import Layout, finite_number

Models = Mapping[str, tuple[Any, Any]]  # name → (model, tokenizer)
UPDATE_SECONDS = 0.15
TEXT_LIMIT = 64 << 10  # bytes of text to score: some minutes for a large model on a CPU
MAX_NEW_TOKENS = 512  # tokens to generate
STYLE = Path(__file__).with_name("playground.css")
HTML = template(STYLE.with_suffix(".html")).module


# --- write --------------------------------------------------------------------------------------------------


def generate_side_by_side(
    models: Models, prompt: str, seed: float, temperature: float, top_p: float, length: float
) -> Iterator[str]:
    """Stream the models' continuations side by side; the last update adds the governance heads.

    Raises:
        UserError: lists every problem with the arguments.
    """
    ranges = {
        "seed": (seed, 0, 2**53),
        "temperature": (temperature, 0, 2),
        "top-p": (top_p, 0.01, 1),
        "length": (length, 1, MAX_NEW_TOKENS),
    }
    if problems := [
        f"{name} {value}: must be from {low} to {high}"
        for name, (value, low, high) in ranges.items()
        if finite_number(value) is None or not low <= value <= high  # None if a field is empty
    ]:
        raise UserError(problems)
    prompt, panels, streams = clean(prompt), [], []
    for name, (model, tokenizer) in models.items():
        ids, room = fit_to_context(model, tokenizer, prompt, int(length))
        panels.append((name, score_tokens(model, tokenizer, ids), list[Token](), room))
        streams.append(stream_tokens(model, tokenizer, ids, room, temperature=temperature, top_p=top_p, seed=int(seed)))

    def page() -> str:
        rows = [
            (name, known, new, surprisal_summary(known, new, context_full=len(new) == room < length))
            for name, known, new, room in panels
        ]
        return str(HTML.side_by_side(rows))

    shown = 0.0
    for tokens in zip_longest(*streams):
        for (_, _, new, _), token in zip(panels, tokens, strict=True):
            new += [token] if token else []
        if time.monotonic() - shown > UPDATE_SECONDS:
            shown = time.monotonic()
            yield page()
    by_name = {name: governance_traces(*models[name], [*known, *new]) for name, known, new, _ in panels}
    yield page() + "".join(HTML.heat_map(name, heads) for name, heads in by_name.items() if heads)


def clean(text: str) -> str:
    """Normalize text as in the corpus: NFC, "\\n" line endings.

    Raises:
        UserError: not text.
    """
    try:
        return decode(text.encode())
    except ValueError as error:
        raise UserError(f"the text cannot be read: {error}") from None


def surprisal_summary(known: list[Token], new: list[Token], context_full: bool) -> str:
    """Summarize the surprisal of a prompt and its continuation in one line."""
    facts = []
    if known:
        size = max(1, sum(len(token.text.encode()) for token in known))
        facts.append(f"prompt {sum(token.bits for token in known) / size:.2f} bits per byte")
    if new:
        mean = sum(token.bits for token in new) / len(new)
        why = " (the context is full)" if context_full else ""
        facts.append(f"{len(new)} tokens generated{why}, {mean:.2f} bits per token")
        most = sorted(new, key=lambda token: -token.bits)[:3]
        facts.append("most surprising " + ", ".join(f"“{token.text.strip()}” {token.bits:.1f}" for token in most))
    return "; ".join(facts)


# --- score --------------------------------------------------------------------------------------------------


def score_text(models: Models, text: str, corpus: Callable[[], Corpus]) -> Iterator[str]:
    """Yield bits per byte of each sentence and of the whole text, first for the models, then also for compressors.

    Args:
        corpus: loads the corpus whose training text primes the compressors; called after the models are done.
    Raises:
        UserError: no text, or too much.
    """
    text = clean(text)
    parts = sentences(text)
    sizes = [len(part.encode()) for part in parts]
    if not text.strip() or sum(sizes) > TEXT_LIMIT:
        raise UserError(f"paste or upload a text of 1 to {TEXT_LIMIT:,} bytes; this one has {sum(sizes):,}")
    columns: dict[str, tuple[list[float], float]] = {}
    panels = []
    for name, (model, tokenizer) in models.items():
        tokens = score_tokens(model, tokenizer, encode(tokenizer, text))
        bits = bits_by_part(tokens, parts)
        columns[name] = bits, sum(bits)
        panels.append((name, tokens))

    def page(note: str) -> str:
        rows = [
            [part.strip(), *(f"{bits[n] / sizes[n]:.2f}" if bits else "" for bits, _ in columns.values())]
            for n, part in enumerate(parts)
        ]
        rows.append(["the whole text", *(f"{total / sum(sizes):.3f}" for _, total in columns.values())])
        return str(HTML.scores(columns, rows, panels, note))

    yield page("Bits per byte. Priming the compressors with the training text takes some seconds …")
    try:
        lengths = compressed_bits_by_part(compared_texts(corpus())[0], [part.encode() for part in parts])
    except UserError as error:
        yield page(f"No compressors: {error}")
        return
    columns |= {LABELS[name]: lengths[name] for name in LABELS if name in lengths}
    yield page(
        f"Bits per byte; {BY_NAME['test_bpb'].direction}. The compressors are primed with the training text. PPMd's "
        "output is counted in whole bytes, so values of short sentences are rough; xz outputs nothing before the end "
        "of the text."
        if lengths
        else "No compressors: there is no training text to prime them with, or too much."
    )


# --- compare ------------------------------------------------------------------------------------------------


def compare_runs(lines: str) -> str:
    """Tabulate the results of exports and archives side by side.

    Args:
        lines: one path per line; a folder of exports or archives stands for all of them.
    Raises:
        UserError: lists every path without valid results.
    """
    paths = [path for line in lines.splitlines() if line.strip() for path in exports_at(Path(line.strip()))]
    records, problems = {}, [] if paths else ["give at least one export or archive"]
    for path in paths:
        name = path.name if [other.name for other in paths].count(path.name) == 1 else str(path)
        try:
            records[name] = record_of(path)
        except (UserError, OSError, ValueError) as error:
            problems += getattr(error, "problems", [f"{path}: {error}"])
    if problems:
        raise UserError(problems)
    rows = [[key, *(str(record.get(key)) for record in records.values())] for key in ("model", "preset")]
    for key in SHAPE:
        values = [record.get("settings", {}).get(key) for record in records.values()]
        rows.append([key, *("-" if value is None else str(value) for value in values)])
    for metric in METRICS:
        values = [finite_number(record.get("results", {}).get(metric.name)) for record in records.values()]
        rows.append([metric.title, *map(metric.text, values)])
    return str(HTML.plain_table(["", *records], rows, "runs"))


def exports_at(place: Path) -> list[Path]:
    """Return ``place`` itself, or the exports and archives in it if it is a folder of them."""
    if (place / MANIFEST).is_file() or not place.is_dir():
        return [place]
    archives = {*place.glob("*.tar.gz")} - {*place.glob(Layout(place).formats_archive("*").name)}
    return sorted([*exports_in(place), *archives]) or [place]


def record_of(place: Path) -> dict[str, Any]:
    """Read the ``training_config.json`` of an export or archive.

    Raises:
        UserError: not an export, or it does not match its manifest.
    """
    with opened(place) as folder:
        if problems := verify_folder(folder, loaded_only=True):
            raise UserError(problems)
        if not (config := training_config(folder)):
            raise UserError(f"{place}: training_config.json is damaged")
        config.setdefault("results", {})["size_bytes"] = export_bytes(folder)
        return config
