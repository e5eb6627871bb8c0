"""What the playground shows, as HTML from loaded models and records of runs; knows nothing of the page around it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mvlm_core.data.corpus import Corpus, decode
from mvlm_core.errors import UserError
from mvlm_core.evaluation.bits_per_byte import encode
from mvlm_core.evaluation.compression import LABELS
from mvlm_core.evaluation.compression import bits_by_part as compressed
from mvlm_core.evaluation.surprise import Heads, Token, bits_by_part, fitting, governance, read, sentences, write
from mvlm_core.export.archive import extract_archive
from mvlm_core.export.manifest import MANIFEST, read_manifest, training_config, verify_folder
from mvlm_core.metrics import METRICS
from mvlm_core.pipeline.report import SHAPE, heat
from mvlm_core.run_layout import finite_number

Models = Mapping[str, tuple[Any, Any]]  # model and tokenizer by name
MOST_BITS = 12.0  # the darkest shade; a chance of 1 in 4,096
UPDATE_SECONDS = 0.15
WORDS_SHOWN = 60  # in a heat map
TEXT_LIMIT = 64 << 10  # bytes of a text to score: some minutes for a large model on a CPU
LONGEST = 512  # tokens to write
STYLE = Path(__file__).with_name("playground.css")


# --- write --------------------------------------------------------------------------------------------------


def written(models: Models, prompt: str, seed: float, temperature: float, top_p: float, length: float) -> Iterator[str]:
    """The models' continuations side by side, again and again while they grow, at last with their governance heads.

    Raises:
        UserError: every problem with the arguments.
    """
    rules: tuple[tuple[str, Any, str, Callable[[float], bool]], ...] = (
        ("seed", seed, "a whole number from 0 to 2**53", lambda value: 0 <= value <= 2**53 and value == int(value)),
        ("temperature", temperature, "from 0 to 2", lambda value: 0 <= value <= 2),
        ("top-p", top_p, "above 0 and at most 1", lambda value: 0 < value <= 1),
        (
            "length",
            length,
            f"a whole number up to {LONGEST}",
            lambda value: 1 <= value <= LONGEST and value == int(value),
        ),
    )
    problems = [
        f"{name} {value}: {rule}"
        for name, value, rule, holds in rules
        if finite_number(value) is None or not holds(value)  # None where a field was emptied
    ]
    if problems:
        raise UserError(problems)
    prompt, panels, streams = clean(prompt), [], []
    for name, (model, tokenizer) in models.items():
        ids, room = fitting(model, tokenizer, prompt, int(length))
        panels.append((name, read(model, tokenizer, ids), list[Token]()))
        streams.append(write(model, tokenizer, ids, room, temperature=temperature, top_p=top_p, seed=int(seed)))
    shown = 0.0
    for tokens in zip_longest(*streams):
        for (_, _, new), token in zip(panels, tokens, strict=True):
            new += [token] if token else []
        if time.monotonic() - shown > UPDATE_SECONDS:
            shown = time.monotonic()
            yield side_by_side([continuation(*panel) for panel in panels])
    text = side_by_side([continuation(*panel) for panel in panels])
    for name, known, new in panels:
        if heads := governance(*models[name], [*known, *new]):
            text += heat_map(name, heads)
    yield text


def clean(text: str) -> str:
    """A text as the corpus would hold it: NFC, lines that end in a line feed.

    Raises:
        UserError: it is none.
    """
    try:
        return decode(text.encode())
    except ValueError as error:
        raise UserError(f"the text cannot be read: {error}") from None


def continuation(name: str, known: list[Token], new: list[Token]) -> str:
    """One model's panel: prompt and continuation, shaded, and what they cost."""
    facts = []
    if known:
        size = max(1, sum(len(token.text.encode()) for token in known))
        facts.append(f"prompt {sum(token.bits for token in known) / size:.2f} bits per byte")
    if new:
        facts.append(f"{len(new)} tokens written, {sum(token.bits for token in new) / len(new):.2f} bits each")
        most = sorted(new, key=lambda token: -token.bits)[:3]
        facts.append("most surprising " + ", ".join(f"“{token.text.strip()}” {token.bits:.1f}" for token in most))
    return (
        f"<section><h3>{escape(name)}</h3><p class=text><b>{shaded(known)}</b>{shaded(new)}</p>"
        f"<p class=note>{escape('; '.join(facts))}</p></section>"
    )


def shaded(tokens: Sequence[Token]) -> str:
    """The tokens' text, each behind a shade that tells its surprise; the number is its title."""
    return "".join(
        f'<span style="--heat:{min(token.bits / MOST_BITS, 1):.2f}" title="{token.bits:.2f} bits">'
        f"{escape(token.text)}</span>"
        for token in tokens
    )


def side_by_side(parts: Sequence[str]) -> str:
    return f'<div class="side">{"".join(parts)}</div>'


def heat_map(name: str, heads: Heads) -> str:
    """For each field a table of layers and words, the darker the higher; the numbers stand in it."""
    cut = f"; the first {WORDS_SHOWN} words" if len(heads.words) > WORDS_SHOWN else ""
    head = "".join(f"<th scope=col>{escape(word.strip()) or '·'}</th>" for word in heads.words[:WORDS_SHOWN])
    parts = [f"<h3>What the governance heads of {escape(name)} did</h3>"]
    for field, (meaning, values) in heads.fields.items():
        values = [row[:WORDS_SHOWN] for row in values]
        every = [value for row in values for value in row]
        if min(every) == max(every):  # a head that is off
            parts.append(f"<p><b>{escape(field)}</b> {escape(meaning)}: {every[0]:.2f} everywhere</p>")
            continue
        shades = iter(heat(every))
        body = "".join(
            f"<tr><th scope=row>{layer}</th>"
            + "".join(f'<td style="--heat:{next(shades):.2f}">{value:.2f}</td>' for value in row)
            + "</tr>"
            for layer, row in zip(heads.layers, values, strict=True)
        )
        parts.append(
            f"<details open><summary><b>{escape(field)}</b> {escape(meaning)}{cut}</summary>"
            f"{scrolling(f'<table class=heat><tr><td></td>{head}</tr>{body}</table>', field)}</details>"
        )
    return "".join(parts)


def scrolling(table: str, label: str) -> str:
    """A wide table in a frame that the keyboard can scroll too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    head = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th scope=row>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for first, *cells in rows
    )
    return scrolling(f"<table class=scores><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", label)


# --- score --------------------------------------------------------------------------------------------------


def scored(models: Models, text: str, corpus: Callable[[], Corpus]) -> Iterator[str]:
    """Bits per byte of each sentence and of the whole text: of the models first, then of the compressors as well.

    Args:
        corpus: whose train text the compressors are primed with; asked for once the models are done.
    Raises:
        UserError: no text, or too much.
    """
    text = clean(text)
    parts = sentences(text)
    sizes = [len(part.encode()) for part in parts]
    if not text.strip() or sum(sizes) > TEXT_LIMIT:
        raise UserError(f"paste or upload a text of 1 to {TEXT_LIMIT:,} bytes; this one has {sum(sizes):,}")
    columns: dict[str, tuple[list[float], float]] = {}
    shades = []
    for name, (model, tokenizer) in models.items():
        tokens = read(model, tokenizer, encode(tokenizer, text))
        bits = bits_by_part(tokens, parts)
        columns[name] = bits, sum(bits)
        shades.append(f"<section><h3>{escape(name)}</h3><p class=text>{shaded(tokens)}</p></section>")

    def page(note: str) -> str:
        rows = [
            [part.strip(), *(f"{bits[n] / sizes[n]:.2f}" if bits else "" for bits, _ in columns.values())]
            for n, part in enumerate(parts)
        ]
        rows.append(["the whole text", *(f"{total / sum(sizes):.3f}" for _, total in columns.values())])
        table = plain_table(["", *columns], rows, "bits per byte by sentence")
        return f"{table}<p class=note>{escape(note)}</p>{side_by_side(shades)}"

    yield page("Bits per byte. The compressors now read the training text, which takes some seconds …")
    try:
        found = compressed(corpus(), [part.encode() for part in parts])
    except UserError as error:
        yield page(f"No compressors: {error}")
        return
    columns |= {LABELS[name]: found[name] for name in LABELS if name in found}
    yield page(
        "Bits per byte; lower is better. The compressors have read the training text first. PPMd counts whole bytes, "
        "so a short sentence's value is rough; xz gives nothing out before its end."
        if found
        else "No compressors: there is no training text for them to read first, or too much."
    )


# --- compare ------------------------------------------------------------------------------------------------


def compared(lines: str) -> str:
    """The results of exports and archives side by side.

    Args:
        lines: a path a line; a folder of exports or archives stands for all in it.
    Raises:
        UserError: every place without results that can be trusted.
    """
    places = [place for line in lines.splitlines() if line.strip() for place in exports_at(Path(line.strip()))]
    records, problems = {}, [] if places else ["name at least one export or archive"]
    for place in places:
        name = place.name if [other.name for other in places].count(place.name) == 1 else str(place)
        try:
            records[name] = record_of(place)
        except (UserError, OSError, ValueError) as error:
            problems += getattr(error, "problems", [f"{place}: {error}"])
    if problems:
        raise UserError(problems)
    rows = [[key, *(str(record.get(key)) for record in records.values())] for key in ("model", "preset")]
    for key in SHAPE:
        values = [record.get("settings", {}).get(key) for record in records.values()]
        rows.append([key, *("-" if value is None else str(value) for value in values)])
    for metric in METRICS:
        values = [finite_number(record.get("results", {}).get(metric.name)) for record in records.values()]
        rows.append([metric.title, *map(metric.text, values)])
    return plain_table(["", *records], rows, "runs")


def exports_at(place: Path) -> list[Path]:
    """The place, or the exports and archives in it where it is a folder of such."""
    if (place / MANIFEST).is_file() or not place.is_dir():
        return [place]
    return sorted([*(manifest.parent for manifest in place.glob(f"*/{MANIFEST}")), *place.glob("*.tar.gz")]) or [place]


def record_of(place: Path) -> dict[str, Any]:
    """A checked export's or archive's own record of its training.

    Raises:
        UserError: it is none, or not what its manifest says.
    """
    with tempfile.TemporaryDirectory(prefix="mvlm-open-") as scratch:
        folder = place if place.is_dir() else extract_archive(place, Path(scratch))
        if problems := verify_folder(folder):
            raise UserError(problems)
        if not (config := training_config(folder)):
            raise UserError(f"{place}: its record of the training is damaged")
        files = [MANIFEST, *read_manifest(folder)["files"]]
        config.setdefault("results", {})["size_bytes"] = sum((folder / name).stat().st_size for name in files)
        return config
