"""mvlm_core/data/decoding.py: encodings, line endings and normalization; hostile bytes are in fuzz/."""

import unicodedata

import pytest

from mvlm_core.data.corpus import load_corpus
from mvlm_core.data.decoding import decode


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfA\r\nB\rC\n", "A\nB\nC\n"),
        ("Ä\r\nB".encode("utf-16"), "Ä\nB"),
        (b"\xfe\xff" + "Ä".encode("utf-16-be"), "Ä"),
        (b"\xff\xfe\0\0" + "Ä".encode("utf-32-le"), "Ä"),
        ("e\u0301".encode(), "é"),
        ("naïve".encode(), "naïve"),
    ],
)
def test_recognized_encodings_and_line_endings_are_normalized(tmp_path, data, text):
    assert decode(data) == text
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt").write_bytes(b"Other text")
    document = load_corpus(tmp_path).documents[0]
    assert document.read() == text
    assert document.size == len(text.encode())
    assert unicodedata.is_normalized("NFC", document.read())


def test_decode_keeps_text_as_it_is():
    text = "a\tb\x0c “c” — <eos> \u00a0é\n"
    assert decode(text.encode()) == text
