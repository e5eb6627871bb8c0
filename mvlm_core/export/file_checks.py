"""Checks of an export folder's files before anything in it is loaded.

A manifest that matches the files does not prove who made them. So code is accepted only if it is byte-identical to the
repository's own, and other files are only opened by readers that cannot execute their content.
"""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm_core.errors import UserError, printable
from mvlm_core.export.archive import opened
from mvlm_core.export.folder import STAGING_NAME
from mvlm_core.export.manifest import (
    CHECKPOINTS,
    EXPECTED_FILES,
    HISTORY_LOG,
    MANIFEST,
    TENSORBOARD,
    ArchiveError,
    exports_in,
    read_manifest,
    verify_folder,
    write_manifest,
)
from mvlm_core.files import LOCK_NAME, read_json, read_regular, sha256_file, unfinished_writes, write_atomic

# Allowed in an export folder in addition to the manifest's files; never packed into an archive.
BY_OTHERS = {".DS_Store", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints", ".cache", ".git", ".gitattributes"}
BY_OTHERS |= {"LICENSE"}  # which whoever publishes a model adds
BESIDE = {MANIFEST, STAGING_NAME, LOCK_NAME, CHECKPOINTS, HISTORY_LOG, TENSORBOARD}
PICKLE_SUFFIXES = {".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's zip, protocols 2 to 5
log = logging.getLogger("mvlm")
JSON_LIMIT = 256 << 20  # bytes; a tokenizer is a few MB, the history of a long run tens of MB


@dataclass
class Check:
    group: str
    name: str
    passed: bool
    detail: str


class Checks(list[Check]):
    """Checks of one model, in order."""

    def add(self, group: str, name: str, passed: bool, detail: str = "") -> bool:
        self.append(Check(group, name, bool(passed), printable(detail, keep="\n")))
        return bool(passed)

    def add_problems(self, group: str, name: str, problems: list[str], good: str) -> bool:
        return self.add(group, name, not problems, "; ".join(problems[:20]) if problems else good)


def check_export(folder: Path, sources: Path, path: Path | None = None) -> None:
    """Check the files of an export that is to be loaded; its card may have been edited.

    Args:
        sources: the folder with the repository's own modeling files; no other code is run.
        path: path given by the user, if different from ``folder``.
    Raises:
        UserError: not a finished export, or it does not match its manifest; lists every problem.
    """
    if not (folder / MANIFEST).is_file():
        inside = [*exports_in(folder), *sorted(folder.glob("*_model.tar.gz"))]
        instead = f"; did you mean {' or '.join(map(str, inside[:4]))}?" if inside else ""
        raise UserError(f"{folder}: not a finished export (no {MANIFEST}){instead}")
    checks = Checks()
    check_files(folder, checks, sources, loaded_only=True)
    if failed := [f"{path or folder}: {check.name}: {check.detail}" for check in checks if not check.passed]:
        raise UserError(failed)


@contextmanager
def checked_exports(paths: Sequence[Path], sources: Path, problems: Sequence[str] = ()) -> Iterator[list[Path]]:
    """Open and check export folders or ``.tar.gz``; archives are unpacked only while the context is open.

    Args:
        problems: already known problems, to be reported first.
    Raises:
        UserError: lists every problem with any of them; see ``opened`` and ``check_export``.
    """
    folders, all_problems = [], list(problems)
    with ExitStack() as stack:
        for path in paths:
            try:
                folder = stack.enter_context(opened(path))
                check_export(folder, sources, path)
                folders.append(folder)
            except UserError as error:
                all_problems += error.problems
        if all_problems:
            raise UserError(all_problems)
        yield folders


def check_files(folder: Path, checks: Checks, sources: Path, *, loaded_only: bool = False) -> list[str]:
    """Check the manifest, that exactly the expected files exist, and their code; return the manifest's files.

    Args:
        sources: the folder with the repository's own modeling files.
        loaded_only: allow that the model card and the plots were edited or deleted.
    """
    try:
        files = list(read_manifest(folder)["files"])
    except ArchiveError as error:
        checks.add("files", "manifest", False, str(error))
        return []
    checks.add("files", "manifest", True, f"{len(files)} files")
    checks.add_problems(
        "files", "hashes", verify_folder(folder, loaded_only=loaded_only), "every SHA-256 equals the manifest's"
    )
    code = modeling_files(sources, read_json(folder / "config.json"))
    expected = [*EXPECTED_FILES, *sorted(code)]
    missing = [f"{name} is missing" for name in expected if name not in files]
    checks.add_problems("files", "expected files", missing, "all present")
    known = BESIDE | BY_OTHERS | {file.split("/")[0] for file in files}
    known |= {path.name for path in unfinished_writes(folder)}
    extra = sorted(set(files) - set(expected)) + sorted({path.name for path in folder.iterdir()} - known)
    checks.add_problems(
        "files", "no extra files", [f"{name} is not part of the export; move it away" for name in extra], "none"
    )
    checks.add_problems("files", "no pickle", pickles(folder, files), "none")
    checks.add_problems("files", "no remote code", remote_code(folder), "auto_map stays inside the folder")
    checks.add_problems("files", "modeling code", foreign_code(folder, code, sources), "equal to the repository's own")
    checks.add_problems("files", "readable", unreadable(folder), "JSON and safetensors can be read")
    size = sum((folder / name).stat().st_size for name in files if (folder / name).is_file())
    checks.add("files", "size", size > 0, f"{size / 1e6:.1f} MB")
    return files


def _python_files(sources: Path) -> set[str]:
    return {path.name for path in sources.glob("*.py")}


def modeling_files(sources: Path, config: dict[str, Any]) -> set[str]:
    """Python files named in `auto_map`, and those that the repository's versions of them import relatively."""
    queue = [target.split(".")[0] for _, target in _strings(config.get("auto_map"))]
    own = _python_files(sources)
    files: set[str] = set()
    while queue:
        file = f"{queue.pop()}.py"
        if file in files:
            continue
        files.add(file)
        tree = ast.parse((sources / file).read_bytes()) if file in own else ast.Module([], [])
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                queue += [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
    return files


def renew_modeling_files(folder: Path, sources: Path) -> None:
    """Replace the modeling files of an otherwise intact export by those of this version, as no others are run here.

    Whether they still give the recorded scores is left to the validator.
    """
    code = modeling_files(sources, read_json(folder / "config.json"))
    if not code <= _python_files(sources):  # of a version with other modeling files
        return
    manifest = read_manifest(folder)
    files = {name: digest for name, digest in manifest["files"].items() if not name.endswith(".py")}
    files |= {name: sha256_file(sources / name) for name in code}
    if files == manifest["files"] and not foreign_code(folder, code, sources):
        return
    for name in manifest["files"].keys() - files:
        (folder / name).unlink(missing_ok=True)
    for name in sorted(code):
        write_atomic(folder / name, (sources / name).read_bytes())
    write_manifest(folder, manifest["name"], files)
    log.info("%s: its modeling files differed from this version's and are replaced", folder)


def foreign_code(folder: Path, code: set[str], sources: Path) -> list[str]:
    """Report modeling files that are not the repository's own; loading the model would run them."""
    problems = []
    own = _python_files(sources)  # never a path chosen by the export
    for name in sorted(code):
        if name not in own:
            problems.append(f"{name}: the repository has no modeling file of this name; it is not run")
            continue
        try:
            if read_regular(folder / name) != read_regular(sources / name):
                problems.append(
                    f"{name}: differs from the repository's own, so it is not run; repeat the training command, "
                    "which replaces it, or load the model with transformers"
                )
        except (OSError, ValueError) as error:
            problems.append(f"{name}: cannot be read ({error})")
    return problems


def remote_code(folder: Path) -> list[str]:
    """Report config entries, at any depth, that make transformers load code from outside the folder."""
    return [
        f"{file}: {'.'.join(keys)} refers to code outside the folder: {target}"
        for file in ("config.json", "tokenizer_config.json", "generation_config.json")
        for keys, target in _strings(read_json(folder / file))
        if any(key == "auto_map" or key.endswith("attn_implementation") for key in keys)
        and ("--" in target or "/" in target)
    ]


def _strings(value: object, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every string in a JSON value with its path of keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(inner, (*keys, key))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, keys)
    elif isinstance(value, str):
        yield keys, value


def pickles(folder: Path, files: list[str]) -> list[str]:
    """Report pickle files, by suffix or by magic bytes."""
    problems = []
    for name in (*files, *(path.name for path in folder.iterdir() if path.is_file())):
        path = folder / name
        if path.suffix.lower() in PICKLE_SUFFIXES:
            problems.append(f"{name}: file extension of a pickle")
        elif path.is_file():
            try:
                with path.open("rb") as file:
                    start = file.read(9)
            except OSError as error:
                problems.append(f"{name}: cannot be read ({error.strerror})")
                continue
            # A safetensors file starts with its header length, which may look like a pickle, followed by "{".
            if start.startswith(PICKLE_MAGIC) and not (path.suffix == ".safetensors" and start[8:] == b"{"):
                problems.append(f"{name}: magic bytes of a pickle")
    return sorted(set(problems))


def unreadable(folder: Path) -> list[str]:
    """Report expected files that are not valid JSON of the right type or valid safetensors; ignore missing ones."""
    from safetensors import SafetensorError, safe_open

    problems = []
    for path in [folder / name for name in EXPECTED_FILES if (folder / name).exists()]:
        try:
            if path.suffix == ".json":
                expected, name = (list, "list") if path.name == "training_history.json" else (dict, "object")
                if not isinstance(json.loads(read_regular(path, JSON_LIMIT).decode("utf-8")), expected):
                    raise ValueError(f"not a JSON {name}")
            elif path.suffix == ".safetensors":
                if not path.is_file():
                    raise ValueError("not a regular file")
                with safe_open(path, framework="np") as file:
                    if not file.keys():
                        raise ValueError("holds no tensor")
        except SafetensorError as error:
            problems.append(f"{path.name}: not a safetensors file ({error})")
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{path.name}: {error}")
    return problems
