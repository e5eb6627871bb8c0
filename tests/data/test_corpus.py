"""The loader on every kind of folder a user may have."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import pytest

from mvlm_core.data.corpus import VALIDATION_SUBSET_BYTES, load_corpus, validation_subset
from mvlm_core.errors import UserError


def write(folder, name, text="In the beginning", **metadata):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    if metadata:
        file.with_suffix(".json").write_text(json.dumps(metadata))
    return file


@pytest.fixture
def folder(tmp_path):
    """A folder with the two documents that every corpus needs."""
    write(tmp_path, "a.txt", "train text", split="train")
    write(tmp_path, "b.txt", "validation text", split="validation")
    return tmp_path


def skipped(corpus):
    return {s.path: s.reason for s in corpus.skipped}


def paths(corpus):
    return [d.path for d in corpus.documents]


def test_metadata_defaults_and_odd_names(folder):
    write(
        folder,
        "deep/er/né 1 (x).TXT",
        "words",
        split="test",
        quality_score=3,
        biblical_alignment=0,
        translation="t",
        book="B",
    )
    write(folder, ".hidden/c.txt")
    write(folder, ".hidden.txt")
    write(folder, "README.md")
    corpus = load_corpus(folder)
    assert paths(corpus) == ["a.txt", "b.txt", "deep/er/né 1 (x).TXT"]
    a, _, odd = corpus.documents
    assert (a.quality_score, a.biblical_alignment, a.translation, a.book) == (10.0, 10.0, None, None)
    assert (odd.split, odd.quality_score, odd.biblical_alignment, odd.translation, odd.book) == (
        "test",
        3.0,
        0.0,
        "t",
        "B",
    )
    assert odd.size == 5 and odd.read() == "words" and odd.metadata["quality_score"] == 3
    assert corpus.skipped == () and corpus.split("test") == [odd]


def test_unusable_files_are_skipped_with_a_reason(folder):
    write(folder, "latin1.txt", "caf\xe9 au lait".encode("latin-1"))
    write(folder, "binary.txt", bytes(range(256)))
    write(folder, "utf16.txt", "AB".encode("utf-16-le"))
    write(folder, "broken16.txt", b"\xff\xfeA")
    write(folder, "empty.txt", b"")
    write(folder, "blank.txt", " \n\t\n")
    write(folder, "named.txt/inside.txt", split="test")
    corpus = load_corpus(folder)
    assert paths(corpus) == ["a.txt", "b.txt", "named.txt/inside.txt"]
    reasons = skipped(corpus)
    assert "not UTF-8 (byte 3)" in reasons["latin1.txt"] and "iconv" in reasons["latin1.txt"]
    assert "binary" in reasons["binary.txt"] and "byte-order mark" in reasons["utf16.txt"]
    assert "UTF-16" in reasons["broken16.txt"]
    assert reasons["empty.txt"] == reasons["blank.txt"] == "empty"
    assert "folder" in reasons["named.txt"]
    assert len(reasons) == 7


def test_symlinks_are_never_followed(tmp_path, folder):
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    write(outside, "secret.txt", "secret")
    sub = folder / "sub"
    write(sub, "c.txt", split="test")
    (folder / "A-loop").symlink_to(folder)
    (sub / "loop").symlink_to(sub)
    (folder / "0-again").symlink_to(sub)
    (folder / "same.txt").symlink_to(folder / "a.txt")
    (folder / "out.txt").symlink_to(outside / "secret.txt")
    (folder / "outdir").symlink_to(outside)
    (folder / "gone.txt").symlink_to(folder / "nothing")
    (folder / "self.txt").symlink_to(folder / "self.txt")
    corpus = load_corpus(folder)
    assert paths(corpus) == ["a.txt", "b.txt", "sub/c.txt"]
    links = {"0-again", "A-loop", "sub/loop", "gone.txt", "out.txt", "outdir", "same.txt", "self.txt"}
    assert skipped(corpus) == dict.fromkeys(links, "a symbolic link; copy the text itself")


def test_pipes_and_unreadable_files_are_skipped_with_a_reason(folder):
    os.mkfifo(folder / "pipe.txt")
    secret = write(folder, "locked.txt", "x")
    secret.chmod(0)
    corpus = load_corpus(folder)
    assert skipped(corpus)["pipe.txt"] == "not a regular file"
    if os.geteuid():  # root reads everything
        assert skipped(corpus)["locked.txt"] == "Permission denied"


def test_invalid_metadata_is_reported_and_the_text_is_still_used(folder):
    cases = {
        "syntax": "{not json", "list": "[1]", "latin": b'{"title": "\xe9"}', "deep": "[" * 100_000,
        "values": json.dumps({"split": "dev", "quality_score": "9", "biblical_alignment": 11, "book": 3}),
        "nan": '{"quality_score": NaN, "biblical_alignment": true}', "unhashable": '{"split": ["train"]}',
    }  # fmt: skip
    for name, content in cases.items():
        write(folder, f"x/{name}.txt", name)
        write(folder, f"x/{name}.json", content)
    corpus = load_corpus(folder)
    reasons = skipped(corpus)
    assert set(reasons) == {f"x/{name}.json" for name in cases}
    assert all(d.quality_score == d.biblical_alignment == 10 for d in corpus.documents)
    for part in ("split 'dev'", "quality_score '9'", "biblical_alignment 11", "book 3"):
        assert part in reasons["x/values.json"]
    assert "nan" in reasons["x/nan.json"] and "True" in reasons["x/nan.json"]


def test_split_by_hash_is_stable_and_near_its_share(tmp_path):
    for i in range(1000):
        write(tmp_path, f"{i % 7}/{i}.txt", f"text {i}")
    corpus = load_corpus(tmp_path, validation_split=0.1)
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert abs(len(corpus.split(split)) / 1000 - share) < 0.04
    (tmp_path / "new.txt").write_text("new")
    again = load_corpus(tmp_path, validation_split=0.1)
    before = {d.path: d.split for d in corpus.documents}
    assert before == {d.path: d.split for d in again.documents if d.path != "new.txt"}


def test_split_by_hash_is_the_same_on_every_machine(tmp_path):
    for i in range(8):
        write(tmp_path, f"0/{i}.txt", f"text {i}")
    splits = [d.split for d in load_corpus(tmp_path, validation_split=0.3).documents]
    assert splits == ["validation", "test", "train", "test", "validation", "train", "validation", "validation"]


def test_fingerprint_changes_with_text_split_and_scores(folder):
    seen = {load_corpus(folder).fingerprint}
    assert load_corpus(folder).fingerprint in seen
    for name, text, metadata in (
        ("a.txt", "train texT", {"split": "train"}),
        ("a.txt", "train texT", {"split": "train", "quality_score": 9.5}),
        ("a.txt", "train texT", {"split": "train", "quality_score": 9.5, "biblical_alignment": 1}),
        ("c.txt", "more", {"split": "test"}),
        ("c.txt", "more", {"split": "train"}),
    ):
        write(folder, name, text, **metadata)
        fingerprint = load_corpus(folder).fingerprint
        assert fingerprint not in seen
        seen.add(fingerprint)
    write(folder, "a.txt", b"\xef\xbb\xbftrain texT")
    assert load_corpus(folder).fingerprint in seen  # a byte-order mark is not text


def test_a_tiny_folder_gets_train_and_validation(tmp_path):
    write(tmp_path, "one.txt")
    with pytest.raises(UserError, match="second .txt file"):
        load_corpus(tmp_path)
    for i in range(3):
        write(tmp_path, f"{i}.txt", f"text {i}")
    corpus = load_corpus(tmp_path, validation_split=0.0)
    assert len(corpus.split("validation")) == 1 and len(corpus.split("train")) == 3
    assert len(load_corpus(tmp_path, validation_split=0.5).split("train")) >= 1


def test_metadata_that_leaves_no_validation_text_is_refused(tmp_path):
    write(tmp_path, "a.txt", split="train")
    write(tmp_path, "b.txt", split="train")
    with pytest.raises(UserError, match="no text for the validation split"):
        load_corpus(tmp_path)


def test_validation_folder(tmp_path, folder):
    own = tmp_path.parent / f"{tmp_path.name}-validation"
    write(own, "v.txt", "own validation", split="train")
    corpus = load_corpus(folder, validation_dir=own)
    assert {d.path: d.split for d in corpus.documents} == {
        "a.txt": "train", "b.txt": "train", "validation_dir/v.txt": "validation",
    }  # fmt: skip
    write(folder, "inside/v.txt", "inside")
    corpus = load_corpus(folder, validation_dir=folder / "inside")
    assert [d.path for d in corpus.split("validation")] == ["validation_dir/v.txt"]
    assert "inside/v.txt" not in paths(corpus)


def test_copies_of_held_out_text_are_not_trained_on(tmp_path):
    for i in range(60):
        for place in ("", "backup/"):
            write(tmp_path, f"{place}{i}.txt", f"essay {i}")
    write(tmp_path, "60.txt", "essay of its own", split="train")
    for own in (None, tmp_path.parent / f"{tmp_path.name}-validation"):
        if own is not None:
            write(own, "v.txt", "essay 7\r\n".encode("utf-16"))
            write(tmp_path, "7.txt", "essay 7\n", split="train")
        corpus = load_corpus(tmp_path, validation_split=0.1, validation_dir=own)
        held_out = {d.sha256 for d in corpus.documents if d.split != "train"}
        train = corpus.split("train")
        assert not held_out & {d.sha256 for d in train} and train
        assert len(train) < 110 and len(corpus.documents) + len(corpus.skipped) == 121 + (own is not None)
    assert skipped(corpus)["7.txt"] == "the same text as validation_dir/v.txt, which is held out for validation"
    for name in ("a", "b"):
        write(tmp_path / "two", f"{name}.txt")
    with pytest.raises(UserError, match="all train text is a copy of held-out text"):
        load_corpus(tmp_path / "two")


@pytest.mark.parametrize("share", [-0.1, 0.6, 1.5, float("nan")])
def test_invalid_validation_split_is_refused(folder, share):
    with pytest.raises(UserError, match="--validation_split"):
        load_corpus(folder, validation_split=share)


def test_folders_without_text_are_refused_with_reasons(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_corpus(tmp_path / "no")
    with pytest.raises(UserError, match="no readable .txt"):
        load_corpus(tmp_path)
    for i in range(12):
        write(tmp_path, f"{i:02}.txt", bytes(range(256)))
    with pytest.raises(UserError) as error:
        load_corpus(tmp_path)
    assert "binary" in error.value.problems[1] and error.value.problems[-1] == "and 2 more files that cannot be used"
    with pytest.raises(UserError, match="not a folder"):
        load_corpus(tmp_path / "00.txt")
    with pytest.raises(UserError, match="no folder"):
        load_corpus(tmp_path, only="bible/kjv")
    with pytest.raises(UserError, match="no folder"):
        load_corpus(tmp_path, only="..")


def test_only_argument_restricts_loading_to_a_subfolder(folder):
    write(folder, "bible/kjv/01.txt", split="train")
    write(folder, "bible/kjv/08.txt", "Now it came to pass", split="validation")
    assert paths(load_corpus(folder, only="bible/kjv")) == ["bible/kjv/01.txt", "bible/kjv/08.txt"]


def test_files_changed_or_deleted_after_loading_are_detected(folder):
    document = load_corpus(folder).documents[0]
    write(folder, "a.txt", "other text")
    with pytest.raises(UserError, match="changed"):
        document.read()
    document.file.unlink()
    with pytest.raises(UserError, match="no longer"):
        document.read()


def test_validation_subset(tmp_path):
    write(tmp_path, "a.txt", split="train")
    line = "In the beginning was the Wörd, " * 8 + "\n"
    for i in range(4):
        write(tmp_path, f"v{i}.txt", line * 100, split="validation")
    corpus = load_corpus(tmp_path)
    subset = validation_subset(corpus)
    size = sum(len(text.encode()) for _, text in subset)
    assert VALIDATION_SUBSET_BYTES - len(line.encode()) < size <= VALIDATION_SUBSET_BYTES
    assert [d.path for d, _ in subset] == ["v0.txt", "v1.txt", "v2.txt"] and subset[-1][1].endswith("\n")
    kjv = replace(corpus.documents[1], translation="kjv")
    assert validation_subset(replace(corpus, documents=(corpus.documents[0], kjv))) == [(kjv, kjv.read())]
    everything = corpus.split("validation")
    for primary in (None, "kjv"):
        whole = replace(corpus, documents=(corpus.documents[0], kjv, *everything[1:]), primary_translation=primary)
        assert [(d.path, text) for d, text in validation_subset(whole, "all")] == [
            (d.path, d.read()) for d in everything
        ]
    assert validation_subset(whole) == [(kjv, kjv.read())]
    long_line = "ö" * VALIDATION_SUBSET_BYTES
    write(tmp_path, "v0.txt", "x" + long_line, split="validation")
    ((_, text),) = validation_subset(load_corpus(tmp_path))
    assert text == ("x" + long_line)[: VALIDATION_SUBSET_BYTES // 2] and "\ufffd" not in text


def test_five_thousand_tiny_files_load_in_a_few_seconds(tmp_path):
    for i in range(5000):
        write(tmp_path, f"{i % 50}/{i}.txt", f"text {i}")
    start = time.process_time()
    corpus = load_corpus(tmp_path)
    assert len(corpus.documents) == 5000
    assert time.process_time() - start < 5
