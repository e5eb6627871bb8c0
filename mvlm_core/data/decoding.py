"""Bytes of a text file → text: UTF-8, or UTF-16 and UTF-32 with a byte-order mark; NFC; "\\n" line endings."""

from __future__ import annotations

import codecs
import unicodedata

# NFC normalization of a run of combining marks takes quadratic time (a minute for 0.3 MB). Real text has a few in a
# row; Unicode's stream-safe format allows 30 (UAX 15).
MARKS_LIMIT = 256


def decode(data: bytes) -> str:
    """Decode a file to text: NFC, no byte-order mark, "\\n" line endings. Raises ValueError with the reason.

    Only UTF-8 and, with a byte-order mark, UTF-16 and UTF-32 are accepted. The encoding is not guessed: one-byte
    encodings differ in exactly the characters that matter.
    """
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is a prefix of this one
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            text = _decode_as(data[len(mark) :] if encoding == "utf-8" else data, encoding)
            break
    else:
        if b"\0" in data:
            raise ValueError("not text (a binary file, or UTF-16 without a byte-order mark)")
        text = _decode_as(data, "utf-8")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        raise ValueError("not text (a binary file)")
    if text.isascii():
        return text
    if (index := _long_run_of_marks(text)) is not None:
        raise ValueError(f"not text ({MARKS_LIMIT} combining marks in a row at character {index})")
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def _long_run_of_marks(text: str) -> int | None:
    """Index of the first run of ``MARKS_LIMIT`` combining marks; None if there is none."""
    for index in range(0, len(text), MARKS_LIMIT):  # a run this long covers one of these positions
        first = last = index
        while first >= 0 and last - first <= MARKS_LIMIT and unicodedata.combining(text[first]):
            first -= 1
        while last < len(text) and last - first <= MARKS_LIMIT and unicodedata.combining(text[last]):
            last += 1
        if last - first > MARKS_LIMIT:
            return first + 1
    return None


def _decode_as(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise ValueError(f"damaged {encoding.upper()} at byte {error.start}") from None
        controls = sum(byte < 32 and byte not in b"\t\n\r\f\v" for byte in data[:65_536])
        if controls:
            raise ValueError("not text (a binary file)") from None
        raise ValueError(
            f"not UTF-8 (byte {error.start}); if it is Latin-1 or Windows-1252, convert it: "
            "iconv -f WINDOWS-1252 -t UTF-8"
        ) from None
