"""``generality.py``: other prose beside the test books and compressors."""

import json

import pytest

from benchmarks.experiments import generality
from mvlm_core.errors import UserError
from mvlm_core.evaluation.bits_per_byte import load_export, score_loaded
from tests.helpers import MODELS

PROSE = "The engineer opened the valve and read the gauge. Pressure fell slowly, as the manual said it would.\n" * 8


def test_other_prose_is_scored_next_to_test_books_and_compressors(trained, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "manual.txt").write_text(PROSE)
    exports = [str(trained / name) for name in MODELS]
    arguments = ["--text", str(tmp_path / "texts"), "--json", str(tmp_path / "results.json")]
    assert generality.main([*exports, *arguments, "--data_dir", str(trained / "corpus")]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    books, prose = rows["test books"], rows[str(tmp_path / "texts")]
    assert prose["bytes"] == len(PROSE.encode())
    for export in exports:
        assert prose[export] == score_loaded(*load_export(export), [("", PROSE)]).bits_per_byte
        assert prose[export] > books[export] + 0.4
    assert prose["PPMd order 16"] < 2 < min(prose[export] for export in exports)  # eight copies of one paragraph
    assert f"| {books[exports[0]]:.3f} |" in capsys.readouterr().out


def test_a_folder_without_texts_is_refused(trained):
    with pytest.raises(UserError, match="--text nowhere: no folder with .txt or .md files"):
        generality.main([str(trained / MODELS[0]), "--text", "nowhere"])
