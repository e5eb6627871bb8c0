"""Two models side by side on the same held-out text, with compressors as anchors.

Bits per byte is the one number that compares models with different tokenizers, and compressors with models.
What is said in words here is what one run of one seed can carry, not more.
"""

import hashlib
import json
import lzma
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mvlm_core.data.corpus import Corpus
from mvlm_core.evaluation.suite_table import rows as probe_rows
from mvlm_core.files import read_regular, write_atomic, write_json_atomic

NOISE_NATS = 0.005  # nats per token; single runs that differ by less say nothing in this field
SIZE_TOLERANCE = 0.02  # "equal parameters"
TEXT_TOLERANCE = 0.01  # "equal budget of training text"
ANCHOR_TEXT_LIMIT = 64 << 20
ANCHORS = {"xz": "xz -9e", "ppmd_order_6": "PPMd order 6", "ppmd_order_16": "PPMd order 16"}
ANCHOR_VERSION = 1  # part of the cache's key: raise it when the measurement changes


# --- compressors --------------------------------------------------------------------------------------------


def _xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def _ppmd(data: bytes, order: int) -> int:
    import pyppmd

    # 256 MB hold every context of 4 MB of text at order 16 (measured; more changes no bit). Once full, PPMd
    # forgets.
    encoder = pyppmd.Ppmd7Encoder(order, min(max(256 << 20, 64 * len(data)), 2 << 30))
    return len(encoder.encode(data)) + len(encoder.flush())


def _anchor_text(corpus: Corpus) -> tuple[str, list, list] | None:
    """What the compressors read: the KJV part, or all of a corpus without one; None for no such text."""
    train, test = corpus.split("train"), corpus.split("test")
    name = "all"
    if any(document.translation == "kjv" for document in test):
        name = "kjv"
        train = [document for document in train if document.translation == "kjv"]
        test = [document for document in test if document.translation == "kjv"]
    if not train or not test or sum(document.size for document in train + test) > ANCHOR_TEXT_LIMIT:
        return None
    return name, train, test


def compressor_anchors(corpus: Corpus, cache_dir: Path) -> dict:
    """Bits per byte of the test text for compressors primed with the train text.

    Each code length is size(train + test) - size(train) in bits over the bytes of the test text. Kept in
    `cache_dir` by the hash of the text: on 4 MB it takes about ten seconds. {} when there is no suitable
    text.
    """
    chosen = _anchor_text(corpus)
    if chosen is None:
        return {}
    name, train_documents, test_documents = chosen
    train = "".join(document.read() for document in train_documents).encode()
    test = "".join(document.read() for document in test_documents).encode()
    key = hashlib.sha256(b"%d %d " % (ANCHOR_VERSION, len(train)) + train + test).hexdigest()
    cache = Path(cache_dir) / "compressors" / f"{key[:32]}.json"
    if found := _cached_anchors(cache):
        return found
    methods: dict[str, Callable[[bytes], int]] = {
        "xz": _xz,
        "ppmd_order_6": lambda data: _ppmd(data, 6),
        "ppmd_order_16": lambda data: _ppmd(data, 16),
    }
    with ThreadPoolExecutor(2) as pool:  # both libraries release Python's lock while they work
        sizes = {
            method: [pool.submit(size, data) for data in (train + test, train)] for method, size in methods.items()
        }
        anchors = {"text": name, "train_bytes": len(train), "test_bytes": len(test)} | {
            method: (both.result() - alone.result()) * 8 / len(test) for method, (both, alone) in sizes.items()
        }
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(cache, anchors)
    return anchors


def _cached_anchors(cache: Path) -> dict | None:
    """What was measured before; None when there is nothing, or something else than such a measurement."""
    try:
        found = json.loads(read_regular(cache))
        whole = all(isinstance(found[key], float) and math.isfinite(found[key]) for key in ANCHORS)
        return found if whole and isinstance(found["test_bytes"], int) and found["text"] in ("kjv", "all") else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None


# --- numbers and sentences ----------------------------------------------------------------------------------

COMPARED = {
    "parameters": "parameters",
    "bytes": "training_bytes",
    "tokens": "training_tokens",
    "seconds": "seconds",
    "tokens_per_second": "tokens_per_second",
    "validation_bpb": "validation_bpb",
    "test_bpb": "test_bpb",
    "test_bpb_kjv": "test_bpb_kjv",
    "peak_memory_bytes": "peak_memory_bytes",
    "size_bytes": "size_bytes",
}


def compare(
    models: dict[str, dict],
    names: list[str],
    anchors: dict,
    probes: dict[str, dict] | None = None,
    parts: dict[str, dict] | None = None,
) -> dict:
    """The `comparison` part of training_summary.json.

    Args:
        models: the summary's entries by name.
        names: which of them finished, in the order of training; `ratio` is the second's value over the
        first's.
        probes: the text probes' results by name (`text_probe_run.measure`).
        parts: by name, test bits per byte by "book" and by "translation".
    """
    result: dict = {}
    for key, title in COMPARED.items():
        values = {name: models[name].get(key) for name in names}
        result[title] = values | {"ratio": _ratio(list(values.values()))}
    size, text = result["parameters"], result["training_bytes"]
    size["equal_within_2_percent"] = _within(size["ratio"], SIZE_TOLERANCE)
    text["equal_within_1_percent"] = _within(text["ratio"], TEXT_TOLERANCE)
    for part in ("book", "translation"):
        result[f"test_bpb_by_{part}"] = {name: values.get(part, {}) for name, values in (parts or {}).items()}
    result["text_probes"] = probes or {}
    result["compressors"] = anchors
    result["sentences"] = _sentences(result, models, names)
    return result


def _ratio(values: list) -> float | None:
    if len(values) != 2 or not all(isinstance(v, int | float) and v > 0 for v in values):
        return None
    return values[1] / values[0]


def _within(ratio: float | None, tolerance: float) -> bool | None:
    return None if ratio is None else abs(ratio - 1) <= tolerance


def _sentences(result: dict, models: dict, names: list[str]) -> list[str]:
    found = []
    if len(names) == 2:
        found += _verdict(result, models, names)
        for title, words, equal in (
            ("parameters", "parameters", "equal_within_2_percent"),
            ("training_bytes", "bytes of training text", "equal_within_1_percent"),
        ):
            part = result[title]
            if part["ratio"] is not None:
                fair = (
                    "equal for this purpose"
                    if part[equal]
                    else "NOT equal, so the scores do not compare like with like"
                )
                found.append(f"{names[1]} has {part['ratio']:.3f} times the {words} of {names[0]}: {fair}.")
        found.append(
            f"One seed each: this says how these two runs ended, not how often they would end so; "
            f"differences under {NOISE_NATS} nats a token are noise."
        )
    anchors = result["compressors"]
    for name in names if anchors else ():
        score = models[name].get("test_bpb_kjv" if anchors["text"] == "kjv" else "test_bpb")
        if score is not None:
            best = anchors["ppmd_order_16"]
            found.append(
                f"{name} needs {score:.3f} bits a byte on the {_anchor_words(anchors)}, "
                f"{ANCHORS['ppmd_order_16']} {best:.3f}: "
                + (
                    "the model predicts this text better."
                    if score < best
                    else "the model loses to a compressor, so it is not yet trained."
                )
            )
    return found


def _verdict(result: dict, models: dict, names: list[str]) -> list[str]:
    scores = [result["test_bpb"][name] for name in names]
    if None in scores:
        return []
    difference = scores[1] - scores[0]
    per_token = [
        models[name]["bytes"] / models[name]["tokens"]
        for name in names
        if models[name].get("bytes") and models[name].get("tokens")
    ]
    nats = abs(difference) * math.log(2) * (sum(per_token) / len(per_token)) if per_token else None
    if nats is not None and nats < NOISE_NATS:
        return [f"On the test text both score the same within noise ({scores[0]:.4f} and {scores[1]:.4f} bits a byte)."]
    worse, better = (names[0], names[1]) if difference < 0 else (names[1], names[0])
    share = abs(difference) / result["test_bpb"][worse] * 100
    amount = f", about {nats:.3f} nats a token" if nats is not None else ""
    return [
        f"On the test text {better} needs {result['test_bpb'][better]:.4f} bits a byte, {worse} "
        f"{result['test_bpb'][worse]:.4f}: {share:.1f} % less{amount}."
    ]


def _anchor_words(anchors: dict) -> str:
    return "KJV part of the test books" if anchors["text"] == "kjv" else "test text"


# --- for the eye --------------------------------------------------------------------------------------------

TABLE_ROWS = (
    ("parameters", "parameters", "{:,.0f}"),
    ("training text, bytes", "training_bytes", "{:,.0f}"),
    ("training tokens", "training_tokens", "{:,.0f}"),
    ("seconds", "seconds", "{:,.0f}"),
    ("tokens per second", "tokens_per_second", "{:,.0f}"),
    ("peak memory, bytes", "peak_memory_bytes", "{:,.0f}"),
    ("model files, bytes", "size_bytes", "{:,.0f}"),
    ("validation bits/byte", "validation_bpb", "{:.4f}"),
    ("test bits/byte", "test_bpb", "{:.4f}"),
    ("test bits/byte, KJV", "test_bpb_kjv", "{:.4f}"),
)


def rows(comparison: dict, names: list[str]) -> list[list[str]]:
    """The comparison as rows of words: what, each model's value, the ratio."""
    found = [[words, *_cells(comparison[key], names, form)] for words, key, form in TABLE_ROWS]
    return found + _part_rows(comparison, names)


def table(comparison: dict, names: list[str]) -> list[str]:
    """The comparison as lines of plain text."""
    cells = [["", *names, "ratio"], *rows(comparison, names)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines += probe_lines(comparison["text_probes"], names)
    lines += anchor_lines(comparison["compressors"])
    return [*lines, "", *comparison["sentences"]]


def anchor_lines(anchors: dict) -> list[str]:
    """What the compressors need, in a sentence; nothing where they were not measured."""
    if not anchors:
        return []
    values = ", ".join(f"{words} {anchors[key]:.3f}" for key, words in ANCHORS.items())
    text = f"{_anchor_words(anchors)} ({anchors['test_bytes']:,} bytes)"
    return [f"compressors primed with the train text, on the {text}: {values}"]


def _cells(values: dict, names: list[str], form: str) -> list[str]:
    found = [values.get(name) for name in names]
    ratio = values["ratio"] if "ratio" in values else _ratio(found)
    return [*("-" if v is None else form.format(v) for v in found), "" if ratio is None else f"{ratio:.3f}"]


def _part_rows(comparison: dict, names: list[str]) -> list[list[str]]:
    """Test scores by book; of the translations, the ones that are easiest and hardest for the last model."""
    rows = []
    books, translations = comparison["test_bpb_by_book"], comparison["test_bpb_by_translation"]
    for book in books.get(names[-1], {}) if names else ():
        rows.append([f"· {book}", *_cells({name: books.get(name, {}).get(book) for name in names}, names, "{:.4f}")])
    if len(known := translations.get(names[-1], {}) if names else {}) > 2:
        for words, choose in (("easiest", min), ("hardest", max)):
            name_of = choose(known, key=known.get)
            values = {name: translations.get(name, {}).get(name_of) for name in names}
            rows.append([f"· {words} translation ({name_of})", *_cells(values, names, "{:.4f}")])
    return rows


def probe_cells(probes: dict[str, dict], names: list[str]) -> list[list[str]]:
    """The text probes as rows of words: what, the text's own value, each model's; nothing where a model has none."""
    return probe_rows([probes[name] for name in names]) if all(name in probes for name in names) else []


def probe_lines(probes: dict[str, dict], names: list[str]) -> list[str]:
    """The text probes as lines of plain text; nothing where a model has none."""
    cells = probe_cells(probes, names)
    if not cells:
        return []
    table = [["beyond bits per byte, test books", "the text", *names], *cells]
    widths = [max(len(row[n]) for row in table) for n in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
    return ["", lines[0], "-" * sum(widths, 2 * len(widths) - 2), *lines[1:], ""]


# Okabe and Ito's blue and orange: apart for every kind of colour vision, and dark and light in grey.
STYLES = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o", "hatch": ""},
    {"color": "#E69F00", "linestyle": "--", "marker": "s", "hatch": "//"},
)


def plot(comparison: dict, histories: dict[str, list[dict]], path: Path) -> None:
    """`comparison.png`: validation curves by text and by time, test scores with the compressors' lines."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no display is asked for and no global state is left
    by_text, by_time, scores = figure.subplots(1, 3)
    for style, (name, history) in zip(STYLES, histories.items(), strict=False):
        points = [record for record in history if record.get("validation_bpb") is not None]
        for axes, key, unit in ((by_text, "bytes", 1e6), (by_time, "seconds", 1)):
            axes.plot(
                [record[key] / unit for record in points],
                [record["validation_bpb"] for record in points],
                label=name,
                color=style["color"],
                linestyle=style["linestyle"],
                marker=style["marker"],
                markersize=4,
            )
    by_text.set(xlabel="training text seen, MB", ylabel="bits per byte", title="Validation, by text")
    by_time.set(xlabel="seconds of training", ylabel="bits per byte", title="Validation, by time")
    for axes in (by_text, by_time):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    _bars(scores, comparison, list(histories))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _bars(axes, comparison: dict, names: list[str]) -> None:
    from matplotlib.patheffects import withStroke

    groups = [
        (words, key)
        for words, key in (("test, all", "test_bpb"), ("test, KJV", "test_bpb_kjv"))
        if any(comparison[key].get(name) is not None for name in names)
    ]
    width = 0.8 / max(len(names), 1)
    for number, (style, name) in enumerate(zip(STYLES, names, strict=False)):
        places = [group + (number - (len(names) - 1) / 2) * width for group in range(len(groups))]
        heights = [comparison[key].get(name) or 0 for _, key in groups]
        bars = axes.bar(
            places, heights, width, label=name, color=style["color"], hatch=style["hatch"], edgecolor="black"
        )
        axes.bar_label(bars, fmt="%.3f", fontsize=8)
    axes.set_xticks(range(len(groups)), [words for words, _ in groups])
    axes.set(ylabel="bits per byte", title="Test scores (lower is better)")
    anchors = comparison["compressors"]
    if anchors and groups:
        last = len(groups) - 1  # the compressors read the KJV part, or all of a corpus without one
        for key in ("xz", "ppmd_order_16"):
            axes.plot(
                [last - 0.48, last + 0.5],
                [anchors[key]] * 2,
                color="black",
                linewidth=1.5,
                linestyle=":",
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )
            axes.annotate(f"{ANCHORS[key]}\n{anchors[key]:.3f}", (last + 0.54, anchors[key]), va="center", fontsize=8)
        axes.set_xlim(-0.6, last + 1.3)
