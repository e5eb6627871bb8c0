"""The export folder: finished completely or not at all, and removed without touching other files."""

import json

import pytest

from mvlm_core.export import folder as export_folder
from mvlm_core.export.folder import finish_export, remove_export
from mvlm_core.export.manifest import training_config, verify_folder

CONFIG = {"model": "mvlm_gpt2", "identity": {}, "results": {"steps": 1}}


@pytest.fixture
def staging(tmp_path):
    folder = tmp_path / "models" / ".export"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_finished_export_is_complete_and_listed_in_its_manifest(staging):
    finish_export(staging, CONFIG, "a card\n", staging.parent)
    manifest = json.loads((staging.parent / "manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["name"] == "mvlm_gpt2"
    assert set(manifest["files"]) == {"config.json", "training_config.json", "README.md"}
    assert verify_folder(staging.parent) == [] and training_config(staging.parent) == CONFIG
    assert not staging.exists()


def test_an_interrupted_export_is_left_without_a_manifest(staging, monkeypatch):
    finish_export(staging, CONFIG, "a card\n", staging.parent)
    staging.mkdir()
    (staging / "config.json").write_text("[]")
    flushed = []

    def fails_at_the_third(path):
        flushed.append(path)
        if len(flushed) == 3:
            raise OSError("disk full")

    monkeypatch.setattr(export_folder, "fsync_path", fails_at_the_third)
    with pytest.raises(OSError, match="disk full"):
        finish_export(staging, CONFIG, "another card\n", staging.parent)
    assert (staging.parent / "README.md").read_text() == "another card\n"
    assert not (staging.parent / "manifest.json").exists() and training_config(staging.parent) == {}


def test_remove_export_deletes_only_the_exports_files(staging):
    finish_export(staging, CONFIG, "a card\n", staging.parent)
    for name in ("mine.txt", "mine.tmp", ".manifest.json.123.tmp"):
        (staging.parent / name).write_text("mine")
    remove_export(staging.parent)
    assert sorted(path.name for path in staging.parent.iterdir()) == ["mine.tmp", "mine.txt"]
