"""Corpus folders with arbitrary contents: usable texts are loaded, others are skipped with a reason; nothing blocks."""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import string
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_core.data.corpus import METADATA_LIMIT, SPLITS, load_corpus
from mvlm_core.data.token_store import build_token_store
from mvlm_core.data.tokenizer import cached_tokenizer
from mvlm_core.errors import UserError
from mvlm_core.files import write_json_atomic
from prioritary_mvlm import AdvancedBPETokenizer
from tests.helpers import (
    ANY_JSON,
    ANY_TEXT,
    BROKEN_JSON,
    HUGE,
    REPOSITORY,
    SCALARS,
    build_tiny_corpus,
    cases,
    damaged,
    raises_only,
    sample_books,
    within,
)

KEYS = (
    *("title", "author", "source", "license", "category", "split", "quality_score", "biblical_alignment"),
    *("word_count", "sha256", "translation", "book", "verses"),
)


@pytest.fixture
def folder(tmp_path, real_text):
    """A folder with the two documents that every corpus needs."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, split, text in (("a", "train", real_text[0]), ("b", "validation", real_text[1])):
        (folder / f"{name}.txt").write_text(text)
        (folder / f"{name}.json").write_text(json.dumps({"split": split}))
    return folder


def load(folder):
    """Load a corpus and check what must hold of any: values in range and serializable, texts normalized."""
    with within(30):
        corpus = load_corpus(folder)
    for document in corpus.documents:
        assert document.split in SPLITS
        assert 0 <= document.quality_score <= 10 and 0 <= document.biblical_alignment <= 10
        text = document.read()
        assert text.strip() and "\r" not in text and "\0" not in text and unicodedata.is_normalized("NFC", text)
        assert (document.size, document.path) == (len(text.encode()), document.path.encode().decode())
        assert all(value is None or value.encode() for value in (document.translation, document.book) if value != "")
        json.dumps(document.metadata, ensure_ascii=False).encode()
    for skipped in corpus.skipped:
        line = f"skipped {skipped.path}: {skipped.reason}"
        assert skipped.path and skipped.reason and line.isprintable() and len(line) < 2000, line
    assert {"a.txt", "b.txt"} <= {document.path for document in corpus.documents}
    return corpus


def reasons(corpus):
    return {skipped.path: skipped.reason for skipped in corpus.skipped}


@cases(300)
@given(
    start=st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\0\0", b"\0\0\xfe\xff", b"In "]),
    data=st.binary(max_size=300) | ANY_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")),
)
def test_random_bytes_are_loaded_as_text_or_skipped(folder, start, data):
    """Random bytes after each byte-order mark."""
    (folder / "x.txt").write_bytes(start + data)
    corpus = load(folder)
    assert ("x.txt" in reasons(corpus)) != ("x.txt" in {document.path for document in corpus.documents})


@cases(150)
@given(seed=st.integers(0, 2**40), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"]))
def test_corrupted_text_is_loaded_or_skipped(folder, seed, encoding):
    """Real text in five encodings with a flipped bit, truncation, insertion, zeros or repetition."""
    text = random.Random(seed).choice(list(sample_books().values()))[:5000].replace("God", "Gött")
    (folder / "x.txt").write_bytes(damaged(text.encode(encoding, "replace"), seed))
    corpus = load(folder)
    assert ("x.txt" in reasons(corpus)) != ("x.txt" in {document.path for document in corpus.documents})


@cases(300)
@given(metadata=st.dictionaries(st.sampled_from(KEYS) | ANY_TEXT, ANY_JSON, max_size=5) | ANY_JSON)
def test_text_with_arbitrary_json_metadata_is_loaded(folder, metadata):
    """Arbitrary JSON; if it is not an object, it is reported."""
    (folder / "x.txt").write_text("some text")
    (folder / "x.json").write_text(json.dumps(metadata))
    corpus = load(folder)
    assert "x.txt" in {document.path for document in corpus.documents}
    assert isinstance(metadata, dict) or "not a JSON object" in reasons(corpus)["x.json"]


GOOD_VALUES = {
    "split": lambda value: value in SPLITS,
    "translation": lambda value: isinstance(value, str),
    "book": lambda value: isinstance(value, str),
}


@cases(300)
@given(
    key=st.sampled_from(["split", "quality_score", "biblical_alignment", "translation", "book"]),
    value=SCALARS
    | ANY_JSON
    | st.floats(-1, 11)
    | st.sampled_from([*SPLITS, "Train", "train ", "dev", ["train"], "10", True, HUGE, 10, 0])
    | st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)
def test_invalid_metadata_values_are_reported_and_replaced_by_defaults(folder, key, value):
    """An invalid value is reported with its key; a valid one is used."""
    (folder / "x.txt").write_text("some text")
    (folder / "x.json").write_text(json.dumps({key: value}))
    corpus = load(folder)
    document = next(document for document in corpus.documents if document.path == "x.txt")
    has_half_characters = any("\ud800" <= character <= "\udfff" for character in str(value))
    is_score = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 10
    if value is None or GOOD_VALUES.get(key, lambda value: is_score)(value) and not has_half_characters:
        assert corpus.skipped == () and (value is None or getattr(document, key) == value)
    else:
        assert key in reasons(corpus)["x.json"] or "surrogate" in reasons(corpus)["x.json"]
        assert getattr(document, key) in (None, 10.0, *SPLITS)


@cases(200)
@given(seed=st.integers(0, 2**40), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"]))
def test_text_with_corrupted_metadata_is_loaded(folder, tiny_corpus, seed, encoding):
    """The damaged metadata of a real book in five encodings."""
    metadata = (tiny_corpus / "bible/kjv/08-ruth.json").read_text()
    (folder / "x.txt").write_text("some text")
    (folder / "x.json").write_bytes(damaged(metadata.encode(encoding), seed))
    assert "x.txt" in {document.path for document in load(folder).documents}


@pytest.mark.parametrize("kind", BROKEN_JSON)
def test_malformed_metadata_is_ignored_with_a_reason(folder, kind):
    """Anything but a JSON object, or one that only some parsers accept."""
    (folder / "x.txt").write_text("some text")
    (folder / "x.json").write_bytes(BROKEN_JSON[kind])
    assert "metadata ignored" in reasons(load(folder))["x.json"]


def long_letters(count):
    return "".join(random.Random(0).choices(string.ascii_lowercase, k=count))


def make_odd(path, kind):
    """Create something other than an ordinary file at ``path``."""
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "socket":
            here = os.getcwd()
            os.chdir(path.parent)  # the path of a socket has at most 107 characters
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
            os.chdir(here)
        case "folder":
            path.mkdir()
        case "endless device":
            path.symlink_to("/dev/zero")
        case "link to a pipe":
            os.mkfifo(path.parent / "other")
            path.symlink_to(path.parent / "other")
        case "link out":
            path.symlink_to("/etc/passwd")
        case "link to nothing":
            path.symlink_to("nothing")
        case "link to itself":
            path.symlink_to(path.name)
        case "a terabyte of nothing":
            with open(path, "wb") as file:
                file.truncate(1 << 40)
        case "locked":
            path.write_text("text")
            path.chmod(0)


ODD_KINDS = (
    *("pipe", "socket", "folder", "endless device", "link to a pipe", "link out", "link to nothing", "link to itself"),
    *("a terabyte of nothing", "locked"),
)


@pytest.mark.parametrize("kind", ODD_KINDS)
@pytest.mark.parametrize("name", ["x.txt", "x.json"])
def test_special_files_are_skipped_without_blocking(folder, name, kind):
    """Pipes, sockets, devices, folders and links, as a text and as its metadata."""
    (folder / "x.txt").write_text("some text")
    (folder / name).unlink(missing_ok=True)
    make_odd(folder / name, kind)
    found = reasons(load(folder))
    assert name in found or kind == "locked" and os.geteuid() == 0  # root reads everything
    if kind == "link to a pipe" and name == "x.txt":
        assert "symbolic link" in found[name]


@pytest.mark.parametrize(
    "name", [b"\xff.txt", b"caf\xe9.txt", b"x\n.txt", b"\x1b[2J.txt", b"\xe2\x80\xae.txt", b"a\tb.txt", b"'\"$(id).txt"]
)
@pytest.mark.parametrize("kind", ["text", "binary", "folder"])
def test_skipped_files_with_odd_names_can_be_logged(folder, tmp_path, name, kind):
    """Names with invalid UTF-8 or control characters, of a text, a binary file and a folder."""
    path = os.path.join(os.fsencode(folder), name)
    if kind == "folder":
        os.mkdir(path)
    else:
        with open(path, "wb") as file:
            file.write(b"some text" if kind == "text" else bytes(range(256)))
    corpus = load(folder)
    assert kind == "text" or len(corpus.skipped) == 1
    handler = logging.FileHandler(tmp_path / "run.log", encoding="utf-8")
    for skipped in corpus.skipped:
        line = f"skipped {skipped.path}: {skipped.reason}"
        handler.emit(logging.LogRecord("x", 20, "x", 1, line, None, None))
    handler.close()
    write_json_atomic(tmp_path / "seen.json", [skipped.path for skipped in corpus.skipped])


@pytest.mark.parametrize(
    "data, reason",
    [
        ("a" + "\u0301\u0316" * 400_000, "combining marks"),
        ("In the beginning\n" * 1000 + "\u0316\u0301" * 200_000, "combining marks"),
        ("e" + "\u0301" * 40 + " a\n", None),
        ("x" * 3_000_000, None),
        (" " * 3_000_000 + "a", None),
        ("a\n" * 1_000_000, None),
        ("\r" * 1_000_000 + "a", None),
        ("\u2028\u00a0\ufeff" * 100_000 + "a", None),
        ("\U0010ffff" * 100_000, None),
    ],
    ids=["marks", "marks at the end", "a few marks", "a long word", "blanks", "short lines", "returns", "odd", "last"],
)
def test_pathological_texts_are_loaded_or_skipped_in_time(folder, data, reason):
    """Long texts and runs of characters that make naive algorithms quadratic."""
    (folder / "x.txt").write_bytes(data.encode())
    found = reasons(load(folder))
    assert (reason is None) == ("x.txt" not in found) and (reason or "") in found.get("x.txt", "")


def test_tokenizer_training_handles_very_long_words_in_time(tmp_path):
    """Words of 300,000 letters; training on them unsplit takes a hundred times as long."""
    text = long_letters(300_000)
    with within(30):
        tokenizer = AdvancedBPETokenizer.train([text, f"In the beginning {text}"], 1500)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_splitting_long_words_leaves_ordinary_text_unchanged(real_text):
    """Text without very long words is unchanged, however long its lines; split words lose no letters."""
    from mvlm_core.data.tokenizer import _split_long_words

    one_line = "".join(real_text).replace("\n", " ")
    assert list(_split_long_words([*real_text, one_line])) == [*real_text, one_line]
    assert "".join(_split_long_words([long_letters(5500)])) == long_letters(5500)


def test_metadata_over_the_size_limit_is_ignored(folder):
    """16 MB of metadata."""
    (folder / "a.json").write_bytes(b" " * METADATA_LIMIT + b'{"split": "train"}')
    assert "over the limit" in reasons(load(folder))["a.json"]


def test_paths_over_the_system_limit_are_skipped(folder):
    """Nested folders until a path exceeds the system's limit."""
    here = os.getcwd()
    os.chdir(folder)
    for _ in range(40):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    with open("x.txt", "w") as file:
        file.write("text")
    os.chdir(here)
    with within(30):
        assert any("too long" in skipped.reason for skipped in load_corpus(folder).skipped)


@pytest.mark.parametrize("name", ["x\nerror: y", "\x1b[31m", "\udcff"])
def test_data_folders_with_unprintable_names_are_refused(tmp_path, folder, name):
    """The name of the data folder goes into logs and into the export."""
    odd = tmp_path / name
    folder.rename(odd)
    _, message = raises_only(UserError, lambda: load_corpus(odd))
    assert "rename it" in message


def test_trainer_exits_with_code_2_if_no_file_is_usable(tmp_path):
    """In a subprocess: the files are named, without a traceback and without blocking."""
    for number, data in enumerate((b"\xff", bytes(range(256)), b"", b"a" + "\u0301".encode() * 5000)):
        (tmp_path / f"{number}.txt").write_bytes(data)
    os.mkfifo(tmp_path / "pipe.txt")
    os.mkdir(os.fsencode(tmp_path) + b"/\xff\x1b.txt")
    done = subprocess.run(
        [sys.executable, "mvlm_trainer.py", "--preset", "smoke", "--device", "cpu"]
        + ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--data_subset", "."],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=60,
    )
    said = done.stderr.decode()
    assert done.returncode == 2 and "Traceback" not in said, said
    assert all(name in said for name in ("0.txt: not", "1.txt", "2.txt: empty", "3.txt", "pipe.txt: not a regular"))
    assert "\x1b" not in said and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The folder of cached token files, a function that builds them, and their original tokens."""
    root = tmp_path_factory.mktemp("cached")
    corpus = load_corpus(build_tiny_corpus(root / "corpus"))

    def build():
        pieces = (document.read() for document in corpus.split("train"))
        kind = AdvancedBPETokenizer
        tokenizer = cached_tokenizer(kind, pieces, corpus.fingerprint, 400, root / "cache", quiet=True)
        return build_token_store(corpus, tokenizer, root / "cache", quiet=True)

    store = build()
    (folder,) = (root / "cache" / "tokens").iterdir()
    return folder, build, store.tokens.tolist()


@cases(40)
@given(file=st.sampled_from(["index.json", "tokens.bin"]), seed=st.integers(0, 2**40), value=st.none() | ANY_JSON)
def test_damaged_token_files_are_rebuilt_identically(cached, file, seed, value):
    """Cached token files, damaged or replaced by other JSON."""
    folder, build, tokens = cached
    index = value is not None and file == "index.json"
    (folder / file).write_bytes(json.dumps(value).encode() if index else damaged((folder / file).read_bytes(), seed))
    assert build().tokens.tolist() == tokens
