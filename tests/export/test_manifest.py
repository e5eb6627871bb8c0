"""Manifests: invalid ones are refused; the record of a run is read only from a finished export."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_core.errors import UserError
from mvlm_core.export.manifest import (
    EXPECTED_FILES,
    MANIFEST_LIMIT,
    ArchiveError,
    corpus_choice,
    parse_manifest,
    read_manifest,
    training_config,
    verify_folder,
)
from tests.export.exports import seal
from tests.helpers import cases


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": 1}',
        b'{"format": 1' + b"1" * 5000 + b"}",
        b'{"format": 1, "name": "../x", "files": {"a": "0"}}',
        b'{"format": 1, "name": "m", "files": {"a": 3}}',
        b'{"format": 1, "name": "m", "name": "n", "files": {}}',
        b'{"format": 1, "name": "m", "files": {"manifest.json": "0"}}',
        json.dumps({"format": 2, "name": "m", "files": {"a": "0" * 64}}).encode(),
        json.dumps({"format": 1, "name": "m", "name ": 1, "files": {"../a": "0" * 64}}).encode(),
        json.dumps({"format": 1, "name": "m", "files": {"a": "0" * 64, "A": "0" * 64}}).encode(),
        json.dumps({"format": 1, "name": "m", "files": {"a": "0" * 64, "a/b": "0" * 64}}).encode(),
        b" " * (MANIFEST_LIMIT + 1),
    ],
)
def test_invalid_manifests_are_refused(data):
    with pytest.raises(ArchiveError, match="manifest.json"):
        parse_manifest(data)


def test_duplicate_names_are_refused():
    digest = "0" * 64
    text = f'{{"format": 1, "name": "m", "files": {{"a": "{digest}", "a": "{digest}"}}}}'
    with pytest.raises(ArchiveError, match="duplicate"):
        parse_manifest(text.encode())


@cases(200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["format", "name", "files", "a", "../b", "A"]), inner, max_size=4)
        ),
        max_leaves=8,
    )
)
def test_arbitrary_json_is_refused_as_a_manifest(value):
    with pytest.raises(ArchiveError):
        parse_manifest(json.dumps(value).encode())


def test_verify_folder_reports_every_problem(export, tmp_path):
    assert verify_folder(export) == []
    (export / "README.md").unlink()
    (export / "config.json").unlink()
    (export / "config.json").symlink_to(tmp_path)
    (export / "tokenizer.json").write_text("changed")
    problems = "\n".join(verify_folder(export))
    assert "README.md: missing" in problems and "config.json: a symbolic link" in problems
    assert "tokenizer.json: SHA-256" in problems
    (export / "manifest.json").unlink()
    assert "no manifest" in verify_folder(export)[0]
    assert verify_folder(tmp_path / "nowhere")


def test_expected_files_match_what_the_trainer_exports(trained):
    assert set(read_manifest(trained / "mvlm_gpt2")["files"]) == set(EXPECTED_FILES)


def test_training_config_is_read_only_from_a_finished_export(export):
    config = training_config(export, "identity", "results")
    assert config["model"] == "mvlm_gpt2" and config["results"]["steps"] == 12
    assert corpus_choice(export) == {"validation_split": 0.05, "validation_dir": None, "only": "bible/kjv"}
    (export / "manifest.json").unlink()
    assert training_config(export) == {}
    with pytest.raises(UserError, match=r"training_config\.json: not the record of a finished export"):
        corpus_choice(export)


@pytest.mark.parametrize(
    "section, values, reason",
    [
        ("results", {"steps": "many"}, "results.steps"),
        ("data", {"only": 5}, "data.only"),
        ("settings", {"validation_split": "half"}, "invalid settings.validation_split: 'half'"),
        ("settings", {"validation_dir": "a\0b"}, r"invalid settings.validation_dir: 'a\x00b'"),
        (None, {"hardware": []}, "hardware"),
        (None, {"identity": None}, "identity"),
    ],
)
def test_invalid_training_config_is_ignored_and_logged(export, caplog, section, values, reason):
    config = json.loads((export / "training_config.json").read_text())
    (config[section] if section else config).update(values)
    (export / "training_config.json").write_text(json.dumps(config))
    seal(export)
    with caplog.at_level(logging.WARNING, "mvlm"):
        assert training_config(export) == {}
    assert reason in caplog.text and str(export) in caplog.text


def test_a_missing_section_is_refused_only_where_it_is_required(export):
    config = json.loads((export / "training_config.json").read_text())
    del config["identity"]
    (export / "training_config.json").write_text(json.dumps(config))
    seal(export)
    assert training_config(export) == config and training_config(export, "identity") == {}
