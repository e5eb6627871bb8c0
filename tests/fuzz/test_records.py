"""Fuzzed configurations and run records in exports with a matching manifest, through all of their readers."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

import validate_models
from mvlm_core.errors import UserError
from mvlm_core.export import load_probe, validation
from mvlm_core.export.archive import read_checksums
from mvlm_core.export.file_checks import Checks
from mvlm_core.export.folder import remove_export
from mvlm_core.export.manifest import EXPECTED_FILES, SECTIONS, corpus_choice, training_config
from mvlm_core.pipeline import comparison
from mvlm_core.pipeline.summary import Summary
from mvlm_core.run_layout import Layout, training_history
from tests.export.exports import seal, set_json
from tests.helpers import ANY_JSON, ANY_TEXT, HUGE, SCALARS, cases, raises_only, with_a_value_replaced, within

CONFIG_KEYS = ["n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "activation_function", "model_type"]
CONFIG_KEYS += ["layer_norm_epsilon", "dtype"]
REQUEST = {"prompts": ["In the"], "texts": ["a b"], "specials": ["<eos>"], "parameters": 1, "vocabulary": 1}
NAMES = ["..", "../other", "/", ".", "", "run.lock", "a/b", "config.json"]


@pytest.mark.parametrize("key", CONFIG_KEYS)
@pytest.mark.parametrize("value", [None, "x", -1, 0, 7, [], {}, True, 1.5], ids=ascii)
def test_models_with_invalid_config_values_load_or_are_refused(export, key, value):
    """Wrong values in config.json, loaded as in the validator's subprocess: a one-line error, or a model."""
    set_json(export / "config.json", **{key: value})
    logging.disable(logging.ERROR)
    try:
        with within(30):
            found, message = raises_only(
                load_probe.ExportError, lambda: load_probe.probe(REQUEST | {"folder": str(export)})
            )
    finally:
        logging.disable(logging.NOTSET)
    assert found or "config.json" in message and "\n" not in message


@pytest.mark.parametrize(
    "values, reason",
    [({"n_layer": 10**9}, "not done after"), ({"n_embd": 10**15}, "config.json")],
    ids=["endless layers", "endless width"],
)
def test_models_too_large_to_load_fail_with_a_reason(export, monkeypatch, values, reason):
    """In subprocesses: too many layers, too much memory."""
    if reason == "not done after":  # the other one fails by itself, however busy the machine is
        monkeypatch.setattr(validation, "LOADING_SECONDS", 3)
    set_json(export / "config.json", **values)
    checks = Checks()
    with within(200):
        validation.check_loading(export, list(EXPECTED_FILES), checks, prompts=(), texts=[])
    (check,) = checks
    assert not check.passed and reason in check.detail and "Traceback" not in check.detail, check.detail


def test_unknown_tokenizer_class_is_refused(export):
    """A tokenizer class that does not exist, and a special token that is not a string."""
    set_json(export / "tokenizer_config.json", tokenizer_class="NoSuchTokenizer", bos_token=5)
    with pytest.raises(load_probe.ExportError, match=r"tokenizer_config\.json"):
        load_probe.probe(REQUEST | {"folder": str(export)})


@cases(200)
@given(seed=st.integers(0, 2**40), value=ANY_JSON, deep=st.booleans())
def test_fuzzed_training_config_is_read_or_refused(trained, export, monkeypatch, seed, value, deep):
    """Arbitrary training_config.json with a matching manifest, through all of its readers."""
    config = json.loads((trained / "mvlm_gpt2" / "training_config.json").read_text())
    config = with_a_value_replaced(config, seed, value) if deep else value
    (export / "training_config.json").write_text(json.dumps(config))
    seal(export)
    found = training_config(export)
    monkeypatch.setattr(validation, "run_python", lambda *_, **__: (1, "not now"))
    validation.check_loading(export, list(EXPECTED_FILES), checks := Checks(), prompts=(), texts=[])
    assert checks[0].detail == "exit code 1: not now", "what is recorded goes to the process as JSON, whatever it is"
    choice, message = raises_only(UserError, lambda: corpus_choice(export))
    assert choice or "training_config.json" in message
    known = training_config(export, "identity", "results")
    assert known.keys() in (found.keys(), set()) and all(isinstance(known.get(key, {}), dict) for key in SECTIONS)
    assert not known or known.keys() >= {"identity", "results"}
    layout = Layout(export.parent.parent)
    layout.downloads.mkdir(exist_ok=True)
    summary = Summary(layout, ["mvlm_gpt2"], preset="smoke", device="cpu")
    summary.take_results("mvlm_gpt2")
    summary.close()
    assert comparison.table(comparison.compare(summary.models, ["mvlm_gpt2"], {}), ["mvlm_gpt2"])


ENTRY = {"status": "finished", "parameters": 1, "bytes": 2, "tokens": 3, "test_bpb": 2.0, "archive": "x"}


@cases(150)
@given(
    seed=st.integers(0, 2**40),
    value=ANY_JSON,
    deep=st.booleans(),
    name=st.sampled_from(["mvlm_gpt2", "../x", "a/b"]) | ANY_TEXT,
)
def test_fuzzed_training_summary_is_read_or_refused(export, seed, value, deep, name):
    """Arbitrary training_summary.json, through all of its readers."""
    layout = Layout(export.parent.parent)
    value = with_a_value_replaced({"models": {name: ENTRY}}, seed, value) if deep else value
    layout.summary.write_text(json.dumps(value))
    options = validate_models.parse(["--quick", "--work_dir", str(layout.root)])
    folders, message = raises_only(UserError, lambda: validate_models.folders_to_check(options, layout, ExitStack()))
    assert (
        folders is None
        and "training_summary.json" in message
        or all(f.parent == layout.models for f in folders.values())
    )
    layout.downloads.mkdir(exist_ok=True)
    summary = Summary(layout, ["simone_enhanced"], preset="smoke", device="cpu")
    assert comparison.table(
        comparison.compare(summary.models, summary.with_status("finished"), {}), summary.with_status("finished")
    )
    summary.close()


@cases(100)
@given(seed=st.integers(0, 2**40), value=ANY_JSON, deep=st.booleans())
def test_fuzzed_training_history_yields_only_plottable_records(export, tmp_path, seed, value, deep):
    """Arbitrary training_history.json."""
    history = [{"step": n, "bytes": n, "seconds": 0.1, "train_loss": 6.0, "validation_bpb": 2.0} for n in range(3)]
    path = export / "training_history.json"
    path.write_text(json.dumps(history))
    assert training_history(export) == history
    path.write_text(json.dumps(with_a_value_replaced(history, seed, value) if deep else value))
    for record in training_history(export):
        assert all(abs(record[key]) < 1e18 for key in ("bytes", "seconds"))
        assert abs(record.get("validation_bpb", 0)) < 1e18


@cases(150)
@given(
    files=st.dictionaries(st.sampled_from(NAMES) | ANY_TEXT, SCALARS),
    value=ANY_JSON,
    whole_manifest=st.booleans(),
)
def test_remove_export_with_a_fuzzed_manifest_spares_other_files(export, files, value, whole_manifest):
    """Manifests that list files outside, the lock or a folder: only the export's own files are deleted."""
    bystanders = [export.parent / "other", export / "run.lock", export / "checkpoints" / "x"]
    for path in bystanders:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    files = {name: "0" * 64 if isinstance(value, str) else value for name, value in files.items()}
    (export / "manifest.json").write_text(
        json.dumps({"format": 1, "name": "m", "files": files} if whole_manifest else value)
    )
    remove_export(export)
    assert all(path.read_text() == "mine" for path in bystanders) and not (export / "manifest.json").exists()


def test_remove_export_spares_a_listed_lock_and_folder(export):
    """A valid manifest that lists the run's lock and checkpoints: only the export's own file is deleted."""
    (export / "run.lock").write_text("mine")
    (export / "checkpoints").mkdir()
    files = dict.fromkeys(["run.lock", "checkpoints", "config.json"], "0" * 64)
    (export / "manifest.json").write_text(json.dumps({"format": 1, "name": "m", "files": files}))
    remove_export(export)
    assert (export / "run.lock").read_text() == "mine" and (export / "checkpoints").is_dir()
    assert not (export / "config.json").exists() and (export / "tokenizer.json").exists()


@cases(60)
@given(data=st.binary(max_size=300) | st.binary(max_size=20).map(lambda b: b"0" * 64 + b"  " + b + b"\n"))
def test_fuzzed_checksum_files_yield_only_valid_digests(tmp_path, data):
    """SHA256SUMS of arbitrary bytes."""
    (tmp_path / "SHA256SUMS").write_bytes(data)
    assert all(len(digest) == 64 for digest in read_checksums(tmp_path / "SHA256SUMS").values())


@pytest.mark.parametrize("said", [None, "3.0", HUGE, -HUGE, float("nan"), float("inf"), True, [], {}, 3, 3.01])
def test_invalid_recorded_scores_never_match(said):
    """Recorded scores that are invalid or differ never equal the measured one, and never overflow."""
    assert not validation.same_score(said, 3.0) and validation.same_score(3.0, 3.0)
    assert validation.same_score(3.000000001, 3.0) and not validation.same_score(3.00000001, 3.0)
