"""Damaged and forged checkpoints: each is refused with one message that names the file."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mvlm_core.errors import Stopped, UserError
from mvlm_core.files import sha256_file
from mvlm_core.training.checkpoint import CheckpointError, newest_checkpoint, open_checkpoint, save_checkpoint
from tests.helpers import (
    ANY_JSON,
    BROKEN_JSON,
    HUGE,
    SCALARS,
    StopAfter,
    build_tiny_corpus,
    cases,
    damaged,
    make_loop,
    raises_only,
    tiny_settings,
    with_a_value_replaced,
    within,
)

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small checkpoint; tests work on copies of it."""
    tensors = {
        "model": {"w": torch.arange(16.0).reshape(4, 4), "b": torch.ones(3)},
        "optimizer": {"w/m": torch.ones(3)},
    }
    return save_checkpoint(tmp_path_factory.mktemp("saved"), 7, tensors, {"best_step": 7, "identity": {"--seed": 1}})


@pytest.fixture
def folder(saved, tmp_path):
    folder = tmp_path / saved.name
    shutil.copytree(saved, folder)
    return folder


def seal(folder):
    """Update the manifest to match the files in the folder, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: sha256_file(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def open_all(folder):
    checkpoint = open_checkpoint(folder)
    return checkpoint.state, checkpoint.tensors("model"), checkpoint.tensors("optimizer")


@cases(200)
@given(file=st.sampled_from(FILES), seed=st.integers(0, 2**40))
def test_corrupted_files_are_refused_by_name(saved, folder, file, seed):
    """A flipped bit, truncation, insertion, zeros or repetition in one of the four files."""
    (folder / file).write_bytes(damaged((saved / file).read_bytes(), seed))
    found, message = raises_only(CheckpointError, lambda: open_all(folder))
    if (folder / file).read_bytes() != (saved / file).read_bytes():
        assert file in message or file == "manifest.json" and (str(folder) in message or found), message
    if found:
        assert found[0]["step"] == 7 and torch.equal(found[1]["w"], torch.arange(16.0).reshape(4, 4))
    (folder / file).write_bytes((saved / file).read_bytes())


NAMES = ["..", "../x", "/etc/passwd", "", ".", "a/b", "\0", "x" * 300, "../model.safetensors", "\ud800", "~", "nul"]


@cases(150)
@given(
    extra=st.dictionaries(st.sampled_from(NAMES), ANY_JSON, max_size=2),
    seed=st.integers(0, 2**40),
    value=ANY_JSON,
    whole=st.booleans(),
)
@example(extra={"x" * 300: None}, seed=0, value=None, whole=False)
def test_fuzzed_manifests_are_read_or_refused(saved, folder, extra, seed, value, whole):
    """File names outside the folder, values of any type."""
    manifest = json.loads((saved / "manifest.json").read_text())
    if whole:
        manifest = with_a_value_replaced(manifest, seed, value)
    else:
        manifest["files"] |= extra
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found, message = raises_only(CheckpointError, lambda: open_all(folder))
    assert found or str(folder) in message or any(name in message for name in extra)
    assert whole or not extra or message


@pytest.mark.parametrize("kind", BROKEN_JSON)
@pytest.mark.parametrize("file", ["manifest.json", "state.json"])
def test_malformed_json_is_refused(folder, file, kind):
    """Anything but a JSON object, with a matching manifest."""
    (folder / file).write_bytes(BROKEN_JSON[kind])
    if file == "state.json":
        seal(folder)
    _, message = raises_only(CheckpointError, lambda: open_all(folder))
    assert file in message


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
ABSURD = {
    "no bytes": b"",
    "half a length": b"\x10\0\0",
    "length beyond the file": safetensors({"w": ENTRY}, bytes(16), length=1 << 20),
    "length of an exabyte": safetensors({"w": ENTRY}, bytes(16), length=1 << 60),
    "largest length": safetensors({"w": ENTRY}, bytes(16), length=2**64 - 1),
    "length 0": safetensors(b"", length=0),
    "list": safetensors([ENTRY]),
    "no JSON": safetensors(b"{" * 64),
    "deep": safetensors(b'{"a":' * 50_000),
    "overlap": safetensors({"a": ENTRY, "b": ENTRY}, bytes(16)),
    "gap": safetensors({"a": ENTRY, "b": {**ENTRY, "data_offsets": [32, 48]}}, bytes(48)),
    "beyond the end": safetensors({"a": {**ENTRY, "data_offsets": [0, 1 << 40]}}, bytes(16)),
    "negative": safetensors({"a": {**ENTRY, "data_offsets": [-16, 0]}}, bytes(16)),
    "backwards": safetensors({"a": {**ENTRY, "data_offsets": [16, 0]}}, bytes(16)),
    "other size": safetensors({"a": {**ENTRY, "shape": [5]}}, bytes(16)),
    "size overflows": safetensors({"a": {**ENTRY, "shape": [1 << 62, 8]}}, bytes(16)),
    "dtype": safetensors({"a": {**ENTRY, "dtype": "PICKLE"}}, bytes(16)),
    "more bytes": safetensors({"a": ENTRY}, bytes(64)),
    "twice": safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(ENTRY).encode(),) * 2), bytes(16)),
    "metadata": safetensors({"__metadata__": {"format": 3}, "a": ENTRY}, bytes(16)),
    "pickle": b"\x80\x04\x95" + bytes(40),
    "zip": b"PK\x03\x04" + bytes(40),
}


@pytest.mark.parametrize("kind", ABSURD)
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_malformed_safetensors_are_refused(folder, file, kind):
    """Impossible lengths, offsets, dtypes and shapes, with a matching manifest."""
    (folder / file).write_bytes(ABSURD[kind])
    seal(folder)
    with within(20):
        found, message = raises_only(CheckpointError, lambda: open_all(folder))
    assert file in message or kind == "twice" and found


@cases(150)
@given(
    header=st.dictionaries(st.text(max_size=4), st.fixed_dictionaries({}, optional={
        "dtype": st.sampled_from(["F32", "F64", "BF16", "BOOL", "U8", "F8_E4M3", "I4", "X"]) | SCALARS,
        "shape": st.lists(st.integers(-2, 1 << 40), max_size=3) | ANY_JSON,
        "data_offsets": st.lists(st.integers(-2, 80), min_size=1, max_size=3) | ANY_JSON,
    }) | ANY_JSON, max_size=3),
    size=st.integers(0, 80),
)  # fmt: skip
def test_fuzzed_safetensors_headers_are_read_or_refused(folder, header, size):
    """JSON headers of roughly the right form."""
    (folder / "model.safetensors").write_bytes(safetensors(header, bytes(size)))
    seal(folder)
    found, message = raises_only(CheckpointError, lambda: open_all(folder))
    assert found or "model.safetensors" in message


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["pipe", "folder", "link out", "missing"])
def test_pipes_folders_links_and_missing_files_are_refused(folder, file, kind):
    """A pipe, folder, link or nothing in place of a file; reading does not block."""
    (folder / file).unlink()
    if kind == "pipe":
        os.mkfifo(folder / file)
    elif kind == "folder":
        (folder / file).mkdir()
    elif kind == "link out":
        (folder / file).symlink_to("/etc/passwd")
    with within(3):
        _, message = raises_only(CheckpointError, lambda: open_all(folder))
    assert file in message


# -- resuming from a changed checkpoint with a matching manifest ----------------------------------------------------


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Settings and newest checkpoint of a run that was stopped after five steps."""
    root = tmp_path_factory.mktemp("started")
    settings = tiny_settings("mvlm_gpt2", build_tiny_corpus(root / "corpus"), root)
    with pytest.raises(Stopped):
        make_loop("mvlm_gpt2", settings).run(StopAfter(5))
    return settings, newest_checkpoint(root / "mvlm_gpt2" / "checkpoints").folder


def change_tensors(folder, file, change):
    tensors = load_file(folder / file)
    change(tensors, sorted(tensors)[len(tensors) // 2])
    save_file(tensors, folder / file)


def change_state(folder, name, value):
    state = json.loads((folder / "state.json").read_text())
    if value is KeyError:
        del state[name]
    else:
        state[name] = value
    (folder / "state.json").write_text(json.dumps(state))


TENSOR_CHANGES = {
    "missing": lambda tensors, name: tensors.pop(name),
    "all missing": lambda tensors, name: tensors.clear(),
    "other shape": lambda tensors, name: tensors.update({name: torch.zeros(3, 5, 7)}),
    "other names": lambda tensors, name: tensors.update({f"x{n}": tensors.pop(n) for n in list(tensors)}),
    "one more": lambda tensors, name: tensors.update(surprise=torch.zeros(2)),
}
STATE_CHANGES = [
    *(("identity", value) for value in (None, [], "x", 7, {"--seed": HUGE}, {})),
    *(("step", value) for value in ("5", None, 1.5, [], KeyError)),
    *(("tokens", value) for value in ("5", None, KeyError)),
    *(("seconds", value) for value in ("5", None, [])),
    *(("best_bpb", value) for value in ("low", [])),
    *(("micro_batch", value) for value in ("4", None, [])),
]


@pytest.fixture
def resumed(started, tmp_path, monkeypatch):
    """A copy of the checkpoint and a function that resumes from it by name for one step."""
    settings, source = started
    folder = tmp_path / source.name
    shutil.copytree(source, folder)
    changed = tiny_settings(
        "mvlm_gpt2",
        settings.data_dir,
        tmp_path,
        cache_dir=settings.cache_dir,
        resume_from=str(folder),
    )

    def resume():
        seal(folder)
        with pytest.raises(Stopped):  # resumed normally
            make_loop("mvlm_gpt2", changed).run(StopAfter(1))
        return True

    return folder, resume


def test_an_unchanged_checkpoint_is_resumed(resumed):
    """The control for the refusals below."""
    assert resumed[1]()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("change", TENSOR_CHANGES)
def test_mismatched_tensors_are_refused_on_resume(resumed, file, change):
    """Missing, renamed or reshaped tensors end in one message, exit code 2."""
    folder, resume = resumed
    change_tensors(folder, file, TENSOR_CHANGES[change])
    found, message = raises_only(UserError, resume)
    assert found and change == "one more" or str(folder) in message


@pytest.mark.parametrize("name, value", STATE_CHANGES)
def test_invalid_state_is_refused_on_resume(resumed, name, value):
    """Counters or identity of the wrong type, or missing, end in one message, exit code 2."""
    folder, resume = resumed
    change_state(folder, name, value)
    _, message = raises_only(UserError, resume)
    assert str(folder) in message
