"""Helpers for tests: copy and change exports, and update their manifests."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from mvlm_core.data.corpus import load_corpus
from mvlm_core.export.archive import write_archive
from mvlm_core.export.manifest import MANIFEST, read_manifest, training_config, write_manifest
from mvlm_core.files import sha256_file
from mvlm_core.run_layout import Layout


def make_export(folder: Path, files: dict[str, bytes], name: str = "mvlm_gpt2") -> Path:
    """A folder with these files and their manifest: a valid export wherever no model is loaded."""
    for file, data in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    write_manifest(folder, name, {file: hashlib.sha256(data).hexdigest() for file, data in files.items()})
    return folder


def copy_export(source: Path, target: Path) -> Path:
    """Copy the files of the export only, without checkpoints or other files next to it."""
    target.mkdir(parents=True)
    for name in (*read_manifest(source)["files"], MANIFEST):
        shutil.copy(source / name, target / name)
    return target


def seal(folder: Path, name: str = "mvlm_gpt2") -> None:
    """Rewrite the manifest to match the files that are now in the folder."""
    (folder / MANIFEST).unlink(missing_ok=True)
    write_manifest(folder, name, {path.name: sha256_file(path) for path in folder.iterdir() if path.is_file()})


def set_json(path: Path, section: str | None = None, **values: Any) -> None:
    """Change values of a JSON file, or of one section of it."""
    content = json.loads(path.read_text())
    (content[section] if section else content).update(values)
    path.write_text(json.dumps(content))


def change_config(folder: Path, section: str, **values: Any) -> None:
    """Change the record of the run and update the manifest."""
    set_json(folder / "training_config.json", section, **values)
    seal(folder)


def moved_validation_text(folder: Path, data_dir: Path, place: Path) -> Path:
    """Change the export to one trained with ``--validation_dir``; return that folder, which has moved since."""
    own = place / "validation"
    own.mkdir()
    (own / "own.txt").write_text("Own validation text.\n")
    only = training_config(folder)["data"]["only"]
    change_config(folder, "settings", validation_dir="/gone")
    change_config(folder, "data", fingerprint=load_corpus(data_dir, only=only, validation_dir=own).fingerprint)
    return own


def pack(folder: Path) -> Layout:
    """Archive the export below its work_dir, and list it in SHA256SUMS."""
    layout = Layout(folder.parent.parent)
    digest = write_archive(folder, layout.archive("mvlm_gpt2"))
    layout.checksums.write_text(f"{digest}  mvlm_gpt2_model.tar.gz\n")
    return layout
