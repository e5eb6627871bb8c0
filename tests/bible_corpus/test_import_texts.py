"""``prepare_dataset.py --add`` and ``--list``: accepted texts, refused texts with reasons, no held-out leaks."""

import json
from pathlib import Path

import pytest

import prepare_dataset
from bible_corpus import import_texts
from mvlm_core import settings
from mvlm_core.data.corpus import load_corpus
from mvlm_core.errors import UserError
from mvlm_core.training.results import describe_sources
from tests.helpers import sample_books

MARKDOWN = """---
author: somebody
---
# On *mercy*

Blessed are the [merciful](https://example.org): for they
shall obtain **mercy**.

- first
- second `word`

| a | b |
| - | - |
| c | d |

```python
print("code")
```
<div>html</div>
"""


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "my texts"
    (place / "deep").mkdir(parents=True)
    return place


def add(folder, data_dir, *more):
    return prepare_dataset.main(["--add", str(folder), "--data_dir", str(data_dir), *more])


def test_markdown_is_reduced_to_plain_text():
    assert import_texts.plain_text(MARKDOWN).split("\n\n") == [
        "On mercy", "Blessed are the merciful: for they\nshall obtain mercy.", "first", "second word", *"abcd",
    ]  # fmt: skip


def test_cleaning_removes_control_characters_and_extra_blank_lines():
    assert import_texts.cleaned("\n\none \t\ntwo\x1b[2J\x00\n\n\n\n\nthree") == "one\ntwo[2J\n\nthree\n"


def test_texts_are_added_to_the_train_split_with_metadata(tiny_corpus, folder):
    (folder / "mercy.md").write_text(MARKDOWN)
    (folder / "deep" / "two_words.txt").write_text("A text of my own.\r\nWith two lines.\r\n")
    (folder / ".hidden.txt").write_text("not taken")
    assert add(folder, tiny_corpus) == 0
    corpus = load_corpus(tiny_corpus)
    added = {d.path: d for d in corpus.documents if d.path.startswith("added/")}
    assert list(added) == ["added/my-texts/deep/two_words.txt", "added/my-texts/mercy.txt"]
    assert all(d.split == "train" for d in added.values()) and not corpus.skipped
    one = added["added/my-texts/deep/two_words.txt"]
    assert one.read() == "A text of my own.\nWith two lines.\n"
    assert one.metadata["title"] == "two words" and one.metadata["word_count"] == 8
    assert one.metadata["source"] == "my texts/deep/two_words.txt" and one.metadata["sha256"] == one.sha256
    assert added["added/my-texts/mercy.txt"].metadata["title"] == "On *mercy*"


def test_texts_of_a_hidden_folder_are_read(tiny_corpus, folder):
    (folder / "good.txt").write_text("good words\n")
    assert add(folder.rename(folder.with_name(".notes")), tiny_corpus) == 0
    assert "added/notes/good.txt" in [document.path for document in load_corpus(tiny_corpus).documents]


def test_duplicate_texts_are_refused(tiny_corpus, folder):
    (folder / "a.txt").write_text("the same words\n")
    (folder / "b.txt").write_text("the same words \n\n\n")
    (folder / "psalms.txt").write_text(sample_books()["psalms"])
    found = import_texts.gather(folder, load_corpus(tiny_corpus))
    assert [text.path for text in found.texts] == ["a.txt"]
    assert found.refused == {
        "b.txt": "the same text as a.txt",
        "psalms.txt": "the same text as bible/kjv/19-psalms.txt",
    }


def test_a_text_refused_for_its_metadata_does_not_refuse_its_duplicate(tiny_corpus, folder):
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("the same words\n")
    (folder / "a.json").write_text("[")
    found = import_texts.gather(folder, load_corpus(tiny_corpus))
    assert [text.path for text in found.texts] == ["b.txt"] and list(found.refused) == ["a.txt"]


def test_held_out_copies_are_refused_and_short_quotations_counted(tiny_corpus, folder):
    ruth = sample_books()["ruth"]
    half = ruth[: len(ruth) // 2]
    (folder / "copy.txt").write_text("A preface of a few words.\n" + half.upper().replace(",", ""))
    (folder / "quotation.txt").write_text("As it is written: " + " ".join(ruth.split()[:14]) + "\n")
    found = import_texts.gather(folder, load_corpus(tiny_corpus))
    assert [(text.path, text.shared) for text in found.texts] == [("quotation.txt", 2)]
    share = float(found.refused["copy.txt"].split()[1].rstrip("%"))
    assert share == pytest.approx(50, abs=2) and "bible/kjv/08-ruth.txt" in found.refused["copy.txt"]


def test_a_held_out_book_in_small_files_is_refused(tiny_corpus, folder):
    """Each file is below the limit, all together are not; files that quote other books stay."""
    ruth, ecclesiastes = (sample_books()[book].split() for book in ("ruth", "ecclesiastes"))
    parts = {f"{start:05}.txt": " ".join(ecclesiastes[start : start + 14]) for start in range(0, 1400, 14)}
    for name, text in parts.items():
        (folder / name).write_text(text)
    (folder / "quotation.txt").write_text(" ".join(ruth[:14]))
    (folder / "own.txt").write_text("good words\n")
    found = import_texts.gather(folder, load_corpus(tiny_corpus))
    assert [(text.path, text.shared) for text in found.texts] == [("own.txt", 0), ("quotation.txt", 2)]
    assert list(found.refused) == list(parts)
    assert all("one of 100 files that together contain" in reason for reason in found.refused.values())
    assert all("21-ecclesiastes.txt, which is held out" in reason for reason in found.refused.values())


def test_metadata_beside_a_text_is_imported_with_it(tiny_corpus, folder, capsys):
    own = {"title": "Mine", "author": "A. Writer", "license": "CC-BY-4.0", "quality_score": 2, "word_count": 99}
    (folder / "mine.md").write_text("# A heading\n\nSome words of my own.\n")
    (folder / "mine.json").write_text(json.dumps(own))
    (folder / "held.TXT").write_text("Words to be held out.\n")
    (folder / "held.json").write_text('{"split": "test"}')
    (folder / "bad.txt").write_text("Other words.\n")
    (folder / "bad.json").write_text('{"split": "exam"}')
    (folder / "broken.txt").write_text("Yet other words.\n")
    (folder / "broken.json").write_text("[")
    (folder / "alone.json").write_text("{}")
    assert add(folder, tiny_corpus) == 0
    told = capsys.readouterr().out
    assert "not added: bad.txt: its metadata bad.json has the split 'exam'" in told
    assert "not added: broken.txt: its metadata broken.json is not a JSON object" in told
    assert "not added: alone.json" in told and "mine.json" not in told
    corpus = load_corpus(tiny_corpus)
    documents = {Path(document.path).stem: document for document in corpus.documents}
    assert documents["held"].split == "test" and documents["mine"].split == "train"
    assert documents["mine"].quality_score == 2 and documents["mine"].metadata["word_count"] == 7
    card = describe_sources(corpus)
    for text in (
        "Titles: Mine.",
        "Authors: A. Writer.",
        "CC-BY-4.0",
        "\n\n- kjv: KJV, by King James Version, 1769 text\n",
    ):
        assert text in card


def test_dry_run_refuses_what_the_run_would(tiny_corpus, folder):
    (folder / "good.txt").write_text("good words\n")
    assert add(folder, tiny_corpus) == 0
    (folder / "more.txt").write_text("more words\n")
    for flags in ((), ("--dry_run",)):
        with pytest.raises(UserError, match="already exists"):
            add(folder, tiny_corpus, *flags)


def test_texts_are_added_only_to_a_complete_default_corpus(folder, tmp_path, monkeypatch):
    """Without its held-out books they could not be compared with them."""
    (folder / "good.txt").write_text("good words\n")
    monkeypatch.setattr(settings, "DEFAULT_DATA_DIR", tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "empty", Path("empty"), Path("..", tmp_path.name, "empty")):
        with pytest.raises(UserError, match="build it first"):
            add(folder, place)
    assert not (tmp_path / "empty").exists()


def test_dry_run_lists_unreadable_files_with_reasons_and_writes_nothing(tiny_corpus, folder, capsys):
    (folder / "latin1.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "empty.md").write_text("---\na: b\n---\n\n")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "good.txt").write_text("good words\n")
    assert add(folder, tiny_corpus, "--dry_run") == 0
    told = capsys.readouterr().out
    reasons = {"latin1.txt": "WINDOWS-1252", "binary.txt": "binary", "empty.md": "empty", "picture.png": "only .txt"}
    for name, reason in reasons.items():
        assert any(name in line and reason in line for line in told.splitlines())
    assert "1 texts, 2 words" in told
    assert not (tiny_corpus / "added").exists(), "a dry run writes nothing"


def test_a_failed_add_leaves_nothing_behind(tiny_corpus, folder, monkeypatch):
    (folder / "good.txt").write_text("good words\n")
    monkeypatch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        add(folder, tiny_corpus)
    assert not any((tiny_corpus / "added").iterdir())
    monkeypatch.undo()
    assert add(folder, tiny_corpus) == 0
    with pytest.raises(UserError, match="contains nothing to add"):  # all of it has been added already
        add(folder, tiny_corpus)


def test_texts_added_to_an_empty_folder_are_split_by_hash(tmp_path, folder):
    for name in ("one", "two", "three"):
        (folder / f"{name}.txt").write_text(f"a text called {name}\n")
    assert add(folder, tmp_path / "data") == 0
    corpus = load_corpus(tmp_path / "data")
    assert len(corpus.documents) == 3 and corpus.split("train") and corpus.split("validation")


def test_all_bad_options_are_reported_in_one_error(tmp_path):
    with pytest.raises(UserError) as caught:
        prepare_dataset.main(["--check", "--list", "--dry_run", "--wheel_dir", str(tmp_path / "none")])
    assert len(caught.value.problems) == 3
    with pytest.raises(UserError) as caught:
        prepare_dataset.main(["--data_dir", "", "--wheel_dir", "", "--add", ""])
    flags = ("--data_dir", "--wheel_dir", "--add")
    assert caught.value.problems == [f"{flag}: an empty path; is a shell variable unset?" for flag in flags]
    with pytest.raises(UserError, match="no such folder"):
        add(tmp_path / "none", tmp_path / "data")


def test_list_totals_match_the_corpus(tiny_corpus, capsys):
    assert prepare_dataset.main(["--list", "--data_dir", str(tiny_corpus)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:4]}
    documents = load_corpus(tiny_corpus).documents
    for name, row in rows.items():
        own = [d for d in documents if d.translation == name]
        assert row[0] == str(len(own)) and row[1] == f"{sum(d.metadata['word_count'] for d in own):,}"
        assert row[3:6] == [str(sum(d.split == split for d in own)) for split in ("train", "validation", "test")]
    weights = [float(rows[name][-1]) for name in ("kjv", "plain")]
    assert weights[0] / weights[1] == pytest.approx(10 / 8, abs=0.02) and sum(weights) == pytest.approx(2, abs=0.02)


def test_list_accepts_user_texts_with_minimal_metadata(tiny_corpus, capsys):
    (tiny_corpus / "mine.txt").write_text("three words here\n")
    (tiny_corpus / "mine.json").write_text(json.dumps({"split": "train"}))
    assert prepare_dataset.main(["--list", "--data_dir", str(tiny_corpus)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(". "))
    assert row.split()[1:3] == ["1", "3"]
