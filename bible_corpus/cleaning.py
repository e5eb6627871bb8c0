"""Clean the marked-up Bible text of a package: per-translation substitutions, then common ones.

All functions are pure. `build` calls `split_verses`, then `clean_verses`. Repairs that compare translations are in
`repairs`.

A verse id is book * 1,000,000 + chapter * 1,000 + verse, as in the packages.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from bible_corpus.repairs import REPAIRS

# Increment when a rule changes the output, so that older corpora are rebuilt.
RULES_VERSION = 1

ALLOWED_PUNCTUATION = frozenset(" .,;:!?'\"()-\u2013\u2014\u2018\u2019\u201c\u201d")

# Map C1 control characters (leeser) to the Windows-1252 characters they stand for, and remove typesetting characters
# such as no-break spaces and soft hyphens.
_CHARACTERS = {code: bytes([code]).decode("cp1252", errors="ignore") for code in range(0x80, 0xA0)}
_CHARACTERS |= {0xA0: " ", 0xAD: "", 0x200B: "", 0x2060: "", 0xFEFF: "", 0x85: "...", 0x2026: "..."}

# Hebrew letter names that head the stanzas of acrostic poems, in all spellings used by the packages.
_LETTERS = (
    "ALEPH BETH BET BEIT GIMEL GHIMEL DALETH DALET DALED HE HEY HEH VAU VAV WAW ZAIN ZAYIN CHETH HETH CHET HET TETH "
    "TET JOD YOD YODH YUD CAPH KAPH KAF LAMED MEM NUN SAMECH SAMEKH AIN AYIN PE PEY PHE TSADDI TZADDI TZADE TZADI "
    "TZADDE ZADHE SADE KOPH COPH QOPH KUF RESH RES SCHIN SHIN SIN TAU TAV THAU"
).split()
_ACROSTIC_BOOKS = {19, 20, 25}
_ANY_LETTER = "|".join(sorted(_LETTERS, key=len, reverse=True))
_UPPER_LETTER = re.compile(
    rf"(?<![A-Z])\[?(?:SIN (?:and|AND) SHIN|AYIN(?=until)|NUN(?=the)|(?:{_ANY_LETTER})(?=\W|$|[A-Z][a-z]|[AIO] ))\]?\.?"
)
_LEADING_LETTER = re.compile(rf"^\W*(?:{_ANY_LETTER.title()})\.?\]?(?:\s+(?=[A-Z])|\s*$)")


def split_verses(markup: str, verse_ids: Iterable[int]) -> tuple[dict[int, str], list[int]]:
    """Split the text at its `<sup>verse</sup>` marks; return the verses by id, and the ids before each skipped text.

    The packages' own index tables drift by a few characters per book in five translations (dr, gb, roth, wbs, bbe), so
    that verses would start and end mid-word; the marks are correct in all of them. `verse_ids` are the keys of the
    package's table. An out-of-sequence mark repeats a number and has no id (once in tyn, six times in wyc): its
    text is skipped and reported in the second result. Raises ValueError if the marks do not match the ids.
    """
    ids = sorted(verse_ids)
    pieces = re.split(r"<sup>(\d+)</sup>", markup)
    verses: dict[int, str] = {}
    unnumbered: list[int] = []
    for number, body in zip(pieces[1::2], pieces[2::2], strict=True):
        if len(verses) < len(ids) and ids[len(verses)] % 1000 == int(number):
            verses[ids[len(verses)]] = re.sub(r"</?p>", " ", body)
        else:
            unnumbered.append(ids[len(verses) - 1])
    if len(verses) != len(ids):
        raise ValueError(f"{len(ids)} verse ids but only {len(verses)} of them have a mark in the text")
    return verses, unnumbered


# Translations whose text contains its own verse marks.
RENUMBERED = frozenset({"wbs"})


def renumber(verses: Mapping[int, str]) -> dict[int, str]:
    r"""Renumber verses by the `\\chapter:verse\\` marks of wbs, whose ids use Hebrew chapter numbering in places.

    A mark at the start of a verse gives its English number. Parts of the same verse (a psalm's title and first verse)
    are joined in order. Marks inside a verse and stray backslashes are removed.
    """
    renumbered: dict[int, str] = {}
    for verse_id, text in sorted(verses.items()):
        mark = re.match(r"\s*\\(\d+):(\d+)\\", text)
        if mark:
            verse_id = verse_id // 10**6 * 10**6 + int(mark[1]) * 1000 + int(mark[2])
            text = text[mark.end() :]
        text = re.sub(r"\\(?:\d+:\d+\\)?", " ", text)
        renumbered[verse_id] = f"{renumbered[verse_id]} {text}" if verse_id in renumbered else text
    return dict(sorted(renumbered.items()))


# Prefilter for the substitutions of `tidy`: most verses need none of them.
_UNTIDY = re.compile(r"[,;:.!?][A-Za-z(,.;:\u201c\u2018-]|\w\(|\)[A-Za-z]|\s[,.;:!?)]|\([\s)]|^[.,;:!?)\u2014-]")
_TIDY = (
    (r"([,;:!?])(?=[A-Za-z(])", r"\1 "),
    (r"(\.)(?=[A-Z][a-z]|[AIO][ ,]|\()", r"\1 "),
    (r"(?<=\w)\((?=\w)", " ("),
    (r"\)(?=[A-Za-z])", ") "),
    (r"\s+", " "),
    (r" +(?=[,.;:!?)])", ""),
    (r"\( +", "("),
    (r"\(\s*\)", ""),
    (r"([,;:])[,.;:]+(?=\s|$)", r"\1"),
    (r"(?<=[,;:.?!])-+(?=\s)", ""),
    (r"(?<!\.)\.(?:[,;:]|\s\.(?!\.))+(?=\s|$)", "."),
    (r"(?<=[,;:.!?])(?=[\u201c\u2018]\w)", " "),
    (r"^[\s.,;:!?)\u2014-]+", ""),
    (r"\s+", " "),
)

Step = tuple[str, str] | Callable[[str], str]


def _apply(steps: Iterable[Step], text: str) -> str:
    """Apply the substitutions (pattern, replacement) and functions of ``steps`` in order."""
    for step in steps:
        text = step(text) if callable(step) else re.sub(*step, text)
    return text


def tidy(text: str) -> str:
    """Apply the cleaning that every translation needs: characters, whitespace, spacing of punctuation, NFC."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.translate(_CHARACTERS))
    text = re.sub(r"\s+", " ", text).strip()
    return _apply(_TIDY, text).strip() if _UNTIDY.search(text) else text


def faults(text: str) -> list[str]:
    """List violations of the corpus format in `text`; empty for a clean verse."""
    problems = [f"character {c!r}" for c in sorted(set(text) - ALLOWED_PUNCTUATION) if not (c.isalpha() or c.isdigit())]
    if text != unicodedata.normalize("NFC", text):
        problems.append("not NFC")
    if re.search(r"\s\s|^\s|\s$|\s[,.;:!?)]|\(\s", text):
        problems.append("stray space")
    return problems


def space_quotes(text: str) -> str:
    """Restore the missing space next to a straight double quote: before an opening one, after a closing one.

    A quote with a space on one side is unambiguous. A quote between punctuation and a letter closes if the previous
    quote opened and opens if it closed; the first one in a verse closes after `. ! ?` and opens after `, ; :`.
    """
    result: list[str] = []
    inside: bool | None = None
    for i, c in enumerate(text):
        if c != '"':
            result.append(c)
            continue
        before, after = text[i - 1 : i], text[i + 1 : i + 2]
        if before.isspace() and after.isspace() and inside:
            result[-1:] = ['"']
            inside = False
            continue
        if not before or before.isspace() or before in "('\u2014-":
            inside = True
        elif not after.isalpha():
            inside = False
        else:
            inside = (before in ",;:" and after.isupper()) if inside is None else not inside
            result.append(' "' if inside else '" ')
            continue
        result.append(c)
    text = re.sub(r"(?<=[,;:.!?])'(?=[A-Z])", " '", "".join(result))
    return re.sub(r"(?<=[,:] \") (?=[A-Z])", "", text)


# `[is]`: words supplied by the translators, italic in print. Keep the words, remove the brackets; also remove the space
# in `first- fruits` and `preparation -day`.
_BRACKETS = (
    (r"(?<=[a-z])\[(?!dess\]|can\])(?=[A-Za-z]{2,}\])", " "),
    (r"[\[\]]", ""),
    (r"(?<=[a-z]-) (?=[a-z])|(?<=[a-z]) (?=-[a-z])", ""),
)
# A hyphen with a space on one side only was a dash.
_DASHES = (r"(?<=[\w,;:.?!]) -(?=\w)|(?<=[a-z,?!])- (?=[a-z\u2018\u201c])", "\u2014")

CLEANERS: dict[str, tuple[Step, ...]] = {
    "akjv": (),
    # As in print; `[Selah` often lacks its closing bracket and full stop.
    "asv": ((r"\s*\[Selah\b\]?\.?\]?(?=\s|$)", " Selah."), *_BRACKETS),
    # `*he*` marks stress; braces enclose psalm titles, which are kept as the first words of the psalm.
    "dar": ((r"[*{}]", ""), *_BRACKETS),
    # Scanned text: printed verse numbers (`,11 Keep`), `0 Lord` for `O Lord`, references, broken words.
    "dr": (
        ("dummy verses inserted by amos", ""),
        (r"^[\s,.;:]*\d+\s*(?=[A-Z(])", ""),
        (r"\[\d Kings[^\]]*\]?", ""),
        (r"(?<![\w,])0(?= (?:my|son|house|king|virgin|[A-Z]))", "O"),
        (r"(?<=\s)\d+\s(?=[A-Z])|>\s*-*|[\\/\"]", " "),
        (r"(?<=[a-z])- (?=[a-z])", ""),
        (r"(?<=\s)[.,;](?=[a-z])", ""),
    ),
    # Dashes typed as two or three hyphens; footnote numbers and letters.
    "etheridge": (
        (r"-{2,}", "\u2014"),
        (r"(?<![\w])\d(?=\w)|(?<=[\s,])\d(?=[\s?])|(?<=\.)i(?=\s*$)", ""),
        _DASHES,
        space_quotes,
    ),
    # `{{See` begins a commentator's note on Revelation; braces enclose other verse numbers and notes; `(3:24) ...` in a
    # verse is a Greek addition to Daniel or Esther (not in the 66 books); guillemets enclose psalm titles.
    "gb": (
        (r"(?s)\{\{See.*$", " "),
        (r"\{\\cf2[^}]*\}|\{\([^)]*\)\}|\{[^}]*\}", " "),
        (r"(?s)(?:\\par)?\s*\(\d+:\d+\).*$", " "),
        (r"\\par|[«»{}]", " "),
        ("&", " and "),
        *_BRACKETS,
    ),
    "kjv": _BRACKETS,
    # cp1252 dashes: a single one is a hyphen (`first-born`), a double one is a dash; bullets are noise.
    "leeser": (
        ("\x96\x96", "\u2014"),
        ("\x96", "-"),
        ("[\x95\u00b0]", " "),
        (r"^\s*BOOK [A-Z]+:|BEGIM\s*$", ""),
        ("1ook", "look"),
        *_BRACKETS,
    ),
    # Guillemets enclose whole verses that contain a quotation, which is also in quotes, some without a space.
    "lont": ((r"[«»]|OMITTED TEXT", ""), _DASHES, (r"(?<=[a-z,;:.])'(?=[A-Z])", " '")),
    # `Johnwho`, fragments of other verses after `;38`, font codes, words hyphenated at line ends (`market-  place`).
    "mont": (
        (r"missing\s+fehlt/missing", " "),
        (r"\bJohn(?=[a-z])", "John "),
        (r"(?s)[;-]?\s*;\d+\s.*$", ""),
        (r"\\ul\d", ""),
        (r"(?<=[a-z])-\s\s+(?=[a-z])", "-"),
        _DASHES,
        space_quotes,
    ),
    # Speaker headings in the Song of Songs; lines of poetry run together.
    "nheb": (
        (r"(?<=[.!?\"])(?:Friends|Beloved|Lover)(?=[A-Z])", " "),
        (r"^\s*(?:Friends|Beloved|Lover)(?=[A-Z])|(?<=[.!?\"])\s*(?:Friends|Beloved|Lover)\s*$", " "),
        (", :", ", "),
        (r"BOOK\s+[IV]+\s*$|^\s*BOOK\s+I(?=\s)", " "),
        (r"(?<=[a-z])(?=[A-Z])", " "),
        space_quotes,
        *_BRACKETS,
    ),
    # Hundreds of verses contain a converter's remark; lines of poetry run together.
    "oeb": (
        (r"\[crosswire[^\]]*\]", " "),
        (r"(?<=[,;:.!?])(?=[\u201c\u2018])", " "),
        (r"(?<=[\u201d])(?=[A-Za-z])|(?<=[.,!?]\u2019)(?=[A-Za-z])|(?<=[a-z])(?=[\u201c])", " "),
        (r"(?<=[a-z\u2019])(?=[A-Z])", " "),
        (r"\s*(?<!\w)\u2013\s+", " \u2014 "),
        (r"(?<=[a-z]\.)(?=[a-z]{3,} )", " "),
        (r"\s*-{2,}\s*", " \u2014 "),
        _DASHES,
        *_BRACKETS,
    ),
    # Rotherham's dashes between clauses were lost between letters (`saidLet`).
    "roth": (
        (r"\\fs\d+|\*+\s*|[*=_]|^\s*fehlt\s*$", " "),
        (r"\b(?:SHE|HE|THEY|BOTH|DAUGHTERS OF JERUSALEM|BOOK THE [A-Z]+)\b", " "),
        (r"\b1o\b", "lo"),
        (r"(?<=[,;:])-\.?|(?<=[a-z]\.)(?=[a-z]+ )", " "),
        (r"(?<=[a-z]-) (?=[a-z])", ""),
        (r"(?<=[a-z])(?=[A-Z])", "\u2014"),
    ),
    # Hyphens are en dashes.
    "rwebster": (("\u2013\u2013", "\u2014"), ("\u2013", "-"), *_BRACKETS),
    # Numerals are set between full stops (`.vij. folde`); two verse numbers and a cross are from the page.
    "tyn": (
        (r"\.\s?([ivxlcmjIVXLCMJ]+)\s?\.(?=[\s.]|$)", r" \1 "),
        (r"\.([ivxlcmjIVXLCMJ]+)\.", r"\1 "),
        (r"(?<=\s)\.(?=[ivxlcmIVXLCM])", ""),
        (r"\b\d+\b|\+", " "),
    ),
    # `(o. logos)`: the editor's note giving the Greek word.
    "ukjv": ((r"\s*\([op]\. [^)]*\)", " "),),
    # A plus sign ends some psalms; three pairs of empty brackets are gaps in the source.
    "wbs": ((r"\+|\[\s*\]", " "),),
    # Psalms end with the next psalm's heading and title; a backtick is an apostrophe or a single quotation mark.
    "web": (
        (r"(?s)\s*(?:BOOK\s+[IV]+\s+)?(?:Psalm \d+\b|BOOK\s+[IV]+\s*$).*$", " "),
        ("`", "'"),
        space_quotes,
        *_BRACKETS,
    ),
    # `?` stands for a ligature or diaeresis, a backtick or bar for a letter: see `REPAIRS`.
    "wesley": ((r"C\?sar", "Cæsar"), (r"Nicola\?tans", "Nicolaitans"), (" -day", "-day")),
    # Convert German quotation marks and unevenly spaced dashes to English ones.
    "wmth": (
        *(("»", "\u201c"), ("«", "\u201d"), ("`", "\u2018"), ("'", "\u2019")),
        (r"(?<=[\u201d])(?=\u201c)|(?<=\u201d)(?=[A-Za-z])", " "),
        (r"\s*\u2013\s*", "\u2014"),
        *_BRACKETS,
    ),
    # `[Note: ...]` is a marginal note; a backtick opens a gloss but none closes it.
    "wyc": ((r"\[Note:[^\]]*\]", " "), ("`", ""), *_BRACKETS),
    # Backticks are quotation marks and apostrophes.
    "ylt": (("`", "'"), (r"\s+--\s+", " \u2014 "), *_BRACKETS),
}


def clean_verse(translation: str, verse_id: int, text: str) -> str:
    """Clean one verse with the rules of `translation`; "" if nothing is left."""
    text = re.sub(r"\s\s+", "  ", text.replace("\n", " "))
    error, correction = REPAIRS.get((translation, verse_id), ("", ""))
    text = _apply(CLEANERS[translation], text.replace(error, correction) if error else text)
    if verse_id // 10**6 in _ACROSTIC_BOOKS:
        text = _LEADING_LETTER.sub("", _UPPER_LETTER.sub(" ", text))
    text = tidy(text)
    return text if any(c.isalpha() for c in text) else ""


_WORDS = re.compile(r"[A-Za-z]+")
_FROM_VULGATE = frozenset({"dr", "wyc"})


def _is_addition(verse_id: int) -> bool:
    """Whether this is a Greek addition to Esther or Daniel or the Prayer of Manasseh, by Vulgate numbering."""
    return (
        17_010_004 <= verse_id < 18_000_000
        or 27_003_024 <= verse_id <= 27_003_090
        or 27_013_001 <= verse_id < 28_000_000
        or verse_id // 1000 == 14_037
    )


def clean_verses(translation: str, verses: Mapping[int, str]) -> tuple[dict[int, str], Counter[str], int]:
    """Clean the verses of the 66 books; return them, drop counts by reason, and the number of repaired verses (those
    whose words changed, not only punctuation and spaces)."""
    dropped: Counter[str] = Counter()
    repaired = 0
    cleaned: dict[int, str] = {}
    for verse_id, text in verses.items():
        if not 1 <= verse_id // 10**6 <= 66 or (translation in _FROM_VULGATE and _is_addition(verse_id)):
            dropped["outside the 66 books"] += 1
            continue
        clean = clean_verse(translation, verse_id, text)
        if not clean:
            dropped["empty in the source"] += 1
        elif faults(clean):
            dropped["not clean: " + ", ".join(faults(clean))] += 1
        else:
            cleaned[verse_id] = clean
            repaired += _WORDS.findall(text) != _WORDS.findall(clean)
    return cleaned, dropped, repaired
