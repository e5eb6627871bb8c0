"""Tampered and forged exports: every change fails a check that names the file, and no code from an export is ever run:
it would create a marker."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

import validate_models
from mvlm_core.errors import UserError
from mvlm_core.export import validation
from mvlm_core.export.file_checks import Checks, check_files
from mvlm_core.export.manifest import EXPECTED_FILES, training_config
from mvlm_core.files import sha256_file
from mvlm_core.run_layout import training_history
from prioritary_mvlm.config import MODELING_FILES
from tests.export.exports import copy_export, seal, set_json
from tests.helpers import (
    ANY_JSON,
    BROKEN_JSON,
    cases,
    damaged,
    raises_only,
    with_a_value_replaced,
    within,
)

JSON_FILES = [name for name in EXPECTED_FILES if name.endswith(".json")]


@pytest.fixture(scope="module")
def whole_with_code(trained, tmp_path_factory):
    """An export of model 2, which includes its modeling files."""
    return copy_export(trained / "simone_enhanced", tmp_path_factory.mktemp("whole") / "simone_enhanced")


def failed(folder):
    """Failed file checks by name, with their details, which must be printable and of limited length."""
    checks = Checks()
    with within(20):
        check_files(folder, checks, MODELING_FILES)
    for check in checks:
        assert check.detail and check.detail.replace("\n", "").isprintable() and len(check.detail) < 5000
    return {check.name: check.detail for check in checks if not check.passed}


def test_unchanged_exports_pass_all_file_checks(export, whole_with_code):
    """The control for the failures below."""
    assert failed(export) == failed(whole_with_code) == {}
    assert {path.name for path in whole_with_code.glob("*.py")} < {path.name for path in MODELING_FILES.glob("*.py")}


@cases(200)
@given(name=st.sampled_from([*EXPECTED_FILES, "manifest.json"]), seed=st.integers(0, 2**40), bit=st.booleans())
def test_changed_bytes_fail_a_check_that_names_the_file(trained, export, name, seed, bit):
    """One flipped bit, or larger damage, in any file."""
    before = (trained / "mvlm_gpt2" / name).read_bytes()
    after = bytearray(before) if bit else damaged(before, seed)
    if bit:
        after[seed % len(after)] ^= 1 << seed % 8
    (export / name).write_bytes(after)
    found = failed(export)
    (export / name).write_bytes(before)
    if name == "manifest.json":
        assert after == before or found or json.loads(after) == json.loads(before)
    else:
        assert after == before or name in found["hashes"]


@cases(300)
@given(
    name=st.sampled_from(JSON_FILES),
    seed=st.integers(0, 2**40),
    value=ANY_JSON,
    deep=st.booleans(),
    sealed=st.booleans(),
)
def test_replaced_json_fails_the_hash_or_readability_check(trained, export, name, seed, value, deep, sealed):
    """Arbitrary JSON, or one value replaced, with and without a matching manifest."""
    whole = trained / "mvlm_gpt2"
    before = (whole / name).read_bytes()
    (export / name).write_text(json.dumps(with_a_value_replaced(json.loads(before), seed, value) if deep else value))
    if sealed:
        seal(export)
    found = failed(export)
    assert sealed or name in found["hashes"] or (export / name).read_bytes() == before
    right = list if name == "training_history.json" else dict
    assert deep or isinstance(value, right) or f"{name}: not a JSON" in found["readable"]
    shutil.copy(whole / name, export / name)
    shutil.copy(whole / "manifest.json", export / "manifest.json")


@pytest.mark.parametrize("kind", BROKEN_JSON)
@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors", "manifest.json"])
def test_malformed_files_fail_a_check_that_names_them(export, name, kind):
    """Malformed data in every JSON file, the weights and the manifest; otherwise the manifest matches."""
    (export / name).write_bytes(BROKEN_JSON[kind])
    if name != "manifest.json":
        seal(export)
    found = failed(export)
    history_is_a_list = name == "training_history.json" and kind in ("list", "deep and closed")
    assert history_is_a_list or name in found.get("readable", "") or name in found.get("manifest", "")


@pytest.mark.parametrize("name", [*EXPECTED_FILES, "manifest.json", "extra"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "link out", "missing"])
def test_pipes_folders_links_and_missing_files_fail_a_check(export, name, kind):
    """A pipe, folder, link or nothing in place of a file, or as an extra one; reading does not block."""
    original = export.parent / "original"
    if name == "extra":
        (export / name).write_text("x")
    (export / name).rename(original)
    match kind:
        case "pipe":
            os.mkfifo(export / name)
        case "folder":
            (export / name).mkdir()
        case "link":
            (export / name).symlink_to(original)
        case "link out":
            (export / name).symlink_to("/dev/zero")
    found = failed(export)
    assert any(name in detail for detail in found.values()) or (name, kind) == ("extra", "missing")
    with within(10):
        raises_only(UserError, lambda: (training_config(export), training_history(export)))


# -- code ----------------------------------------------------------------------------------------------------


class Harm:
    """A pickle that writes the marker when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def harmful_code(marker):
    return f"import os\nos.mkdir({str(marker)!r})\n".encode()


def torch_file(marker, zipped):
    import io

    import torch

    buffer = io.BytesIO()
    torch.save({"w": Harm(marker)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def add_auto_map(file, **targets):
    return lambda folder, marker: (
        set_json(folder / file, auto_map=targets),
        (folder / "evil.py").write_bytes(harmful_code(marker)),
    )


def change_code(name, change):
    return lambda folder, marker: (folder / name).write_bytes(change((folder / name).read_bytes(), marker))


def put(name, data):
    def change(folder, marker):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data(marker))

    return change


def put_json(name, **values):
    return lambda folder, marker: set_json(folder / name, **values)


LEGACY, ZIPPED = (lambda marker: torch_file(marker, False)), (lambda marker: torch_file(marker, True))
PICKLED = [lambda marker, n=n: pickle.dumps(Harm(marker), n) for n in range(6)]
REMOTE = "someone/elses--modeling.Model"
NESTED = {"x": [{"auto_map": {"A": REMOTE}}]}
ATTACKS = {
    # what is changed in the export, the check that fails, the words in it
    "weights as pickle": (put("pytorch_model.bin", ZIPPED), "no pickle", "pytorch_model.bin"),
    "old weights as pickle": (put("pytorch_model.bin", LEGACY), "no pickle", "pytorch_model.bin"),
    "renamed zip": (put("model.safetensors", ZIPPED), "no pickle", "model.safetensors"),
    "renamed legacy": (put("model.safetensors", LEGACY), "no pickle", "model.safetensors"),
    "renamed text pickle": (put("model.safetensors", PICKLED[0]), "readable", "model.safetensors"),
    "old binary pickle": (put("model.safetensors", PICKLED[1]), "readable", "model.safetensors"),
    "pickle as tokenizer": (put("tokenizer.json", PICKLED[4]), "no pickle", "tokenizer.json"),
    "pickle as picture": (put("training_plots.png", PICKLED[5]), "no pickle", "training_plots.png"),
    "pickle as card": (put("README.md", PICKLED[2]), "no pickle", "README.md"),
    "optimizer state": (put("optimizer.pkl", PICKLED[3]), "no pickle", "optimizer.pkl"),
    "training arguments": (put("training_args.bin", PICKLED[1]), "no pickle", "training_args.bin"),
    "capital suffix": (put("WEIGHTS.PT", PICKLED[3]), "no pickle", "WEIGHTS.PT"),
    "own auto_map": (add_auto_map("config.json", AutoModelForCausalLM="evil.Model"), "modeling code", "evil.py"),
    "own configuration": (add_auto_map("config.json", AutoConfig="evil.Config"), "modeling code", "evil.py"),
    "own tokenizer": (add_auto_map("config.json", AutoTokenizer=["evil.A", None]), "modeling code", "evil.py"),
    "own tokenizer class": (add_auto_map("tokenizer_config.json", A=["evil.A", None]), "no extra files", "evil.py"),
    "remote": (add_auto_map("config.json", AutoModelForCausalLM=REMOTE), "no remote code", REMOTE),
    "remote tokenizer": (add_auto_map("tokenizer_config.json", AutoTokenizer=[None, REMOTE]), "no remote code", REMOTE),
    "remote, nested": (put_json("config.json", text_config=NESTED), "no remote code", REMOTE),
    "remote generation": (add_auto_map("generation_config.json", A=REMOTE), "no remote code", REMOTE),
    "remote kernel": (put_json("config.json", attn_implementation="a/kernel"), "no remote code", "a/kernel"),
    "absolute target": (add_auto_map("config.json", AutoConfig="/tmp/evil.Config"), "no remote code", "/tmp/evil"),
    "parent target": (add_auto_map("config.json", AutoConfig="../evil.Config"), "no remote code", "../evil"),
    "custom generate": (put("custom_generate/generate.py", harmful_code), "no extra files", "custom_generate"),
    "package": (put("__init__.py", harmful_code), "no extra files", "__init__.py"),
    "path file": (put("evil.pth", lambda marker: b"import os; os.mkdir('x')"), "no pickle", "evil.pth"),
    "site": (put("sitecustomize.py", harmful_code), "no extra files", "sitecustomize.py"),
    "torch": (put("torch.py", harmful_code), "no extra files", "torch.py"),
    "adapter": (put("adapter_config.json", lambda marker: b"{}"), "no extra files", "adapter_config.json"),
    "template": (put("chat_template.jinja", lambda marker: b"{{ x }}"), "no extra files", "chat_template.jinja"),
    "shards": (put("model.safetensors.index.json", lambda marker: b"{}"), "no extra files", "index.json"),
}  # fmt: skip
CODE_ATTACKS = {
    "code behind": change_code("enhanced_model.py", lambda data, marker: data + harmful_code(marker)),
    "code in front": change_code("rope_attention.py", lambda data, marker: harmful_code(marker) + data),
    "one blank": change_code("modern_layers.py", lambda data, marker: data + b" "),
    "empty": change_code("modern_layers.py", lambda data, marker: b""),
    "other code": change_code("enhanced_model.py", lambda data, marker: harmful_code(marker)),
    "other module": change_code("enhanced_model.py", lambda data, marker: b"from .evil import x\n" + data),
    "endless nesting": change_code("rope_attention.py", lambda data, marker: b"x = " + b"(" * 100_000),
    "missing": lambda folder, marker: (folder / "rope_attention.py").unlink(),
    "pipe": lambda folder, marker: ((folder / "rope_attention.py").unlink(), os.mkfifo(folder / "rope_attention.py")),
}


def validate(folder, data_dir, capsys, monkeypatch):
    """Run the validator as a user would and return its failed checks by name; loading or scoring fails the test."""
    monkeypatch.setattr(validation, "run_python", lambda *_, **__: pytest.fail("the export was loaded"))
    work = folder.parent.parent
    with within(60):
        code = validate_models.main([str(folder), "--work_dir", str(work), "--data_dir", str(data_dir)])
    report = json.loads((work / "models" / "validation_report.json").read_text())
    found = {c["name"]: c["detail"] for m in report["models"].values() for c in m["checks"] if not c["passed"]}
    said = capsys.readouterr().out
    assert code == (1 if found else 0) and all(name in said for name in found) and "Traceback" not in said
    return found


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "unlisted"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_pickles_and_custom_code_are_never_run(export, tmp_path, tiny_corpus, capsys, monkeypatch, attack, listed):
    """Pickles, custom and remote code, with and without a matching manifest; nothing is loaded."""
    change, check, words = ATTACKS[attack]
    marker = tmp_path / "marker"
    change(export, marker)
    if listed:
        seal(export)
        manifest = json.loads((export / "manifest.json").read_text())
        for path in export.glob("*/*.py"):
            manifest["files"][str(path.relative_to(export))] = sha256_file(path)
        (export / "manifest.json").write_text(json.dumps(manifest))
    found = validate(export, tiny_corpus, capsys, monkeypatch)
    assert words in found[check], found
    assert "skipped" in found["loads offline in another folder, without this repository"] and not marker.exists()


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "unlisted"])
@pytest.mark.parametrize("attack", CODE_ATTACKS)
def test_changed_modeling_files_are_not_run(
    whole_with_code, tmp_path, tiny_corpus, capsys, monkeypatch, attack, listed
):
    """Modeling files of model 2 that are not byte-identical to the repository's."""
    folder = tmp_path / "models" / "simone_enhanced"
    shutil.copytree(whole_with_code, folder)
    CODE_ATTACKS[attack](folder, tmp_path / "marker")
    if listed:
        seal(folder)
    found = validate(folder, tiny_corpus, capsys, monkeypatch)
    assert ".py: " in found["modeling code"], found
    assert (
        "skipped" in found["loads offline in another folder, without this repository"]
        and not (tmp_path / "marker").exists()
    )
