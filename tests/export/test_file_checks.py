"""Checks of the files of an export, made before anything is loaded."""

import json
import shutil

import pytest

from mvlm_core.errors import UserError
from mvlm_core.export.archive import write_archive
from mvlm_core.export.file_checks import Checks, check_files, checked_exports, pickles
from prioritary_mvlm.config import MODELING_FILES
from tests.export.exports import seal


def prepare_problem(folder, kind):
    if kind == "missing":
        (folder / "generation_config.json").unlink()
        seal(folder)
    elif kind == "link":
        shutil.move(folder / "config.json", folder.parent / "config.json")
        (folder / "config.json").symlink_to(folder.parent / "config.json")
    elif kind == "bad manifest":
        (folder / "manifest.json").write_text('{"format": 1, "name": "m", "files": {"../x": "0"}}')


@pytest.mark.parametrize(
    "kind, check, words",
    [
        ("missing", "expected files", "generation_config.json"),
        ("link", "hashes", "config.json: a symbolic link"),
        ("bad manifest", "manifest", "manifest.json"),
    ],
)
def test_each_file_problem_fails_its_check_and_is_named(export, kind, check, words):
    prepare_problem(export, kind)
    checks = Checks()
    check_files(export, checks, MODELING_FILES)
    found = {check.name: check.detail for check in checks if not check.passed}
    assert words in found[check], found


def test_safetensors_header_resembling_a_pickle_is_accepted(export):
    header = b'{"__metadata__":{"format":"pt"}}'.ljust(0x280)
    (export / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert (export / "model.safetensors").read_bytes().startswith(b"\x80\x02")
    assert pickles(export, []) == []


def test_checked_export_opens_valid_exports_and_refuses_damaged_or_missing_ones(trained, export, tmp_path):
    with checked_exports([export], MODELING_FILES) as (folder,):
        assert folder == export
    packed = tmp_path / "simone_enhanced_model.tar.gz"
    write_archive(trained / "simone_enhanced", packed)
    with checked_exports([packed], MODELING_FILES) as (folder,):
        assert (folder / "enhanced_model.py").is_file()
    assert not folder.exists()
    told = r"no manifest.json\); did you mean .*mvlm_gpt2 or .*simone_enhanced\?"
    with pytest.raises(UserError, match=told), checked_exports([trained], MODELING_FILES):
        pytest.fail("it was opened")
    (export / "README.md").write_text("# My model")
    (export / "training_plots.png").unlink()
    (export / ".DS_Store").write_bytes(b"\0")
    (export / ".ipynb_checkpoints").mkdir()
    (export / ".training_history.jsonl.123.tmp").write_bytes(b"\0")  # a write that was killed
    with checked_exports([export], MODELING_FILES):
        pass
    checks = Checks()
    check_files(export, checks, MODELING_FILES)
    failed = {check.name: check.detail for check in checks if not check.passed}
    assert failed.keys() == {"hashes"} and "README.md: SHA-256" in failed["hashes"], "the validator is stricter"
    (export / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"notes\.txt is not part of"), checked_exports([export], MODELING_FILES):
        pytest.fail("it was opened")
    (export / "config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"config\.json"), checked_exports([export], MODELING_FILES):
        pytest.fail("it was opened")
    with pytest.raises(UserError, match="train a model first"), checked_exports([tmp_path / "none"], MODELING_FILES):
        pytest.fail("it was opened")
