"""From a package's marked-up Bible text to clean verses: one small, documented rule per translation.

Every function here is pure. `prepare_dataset.py` calls `split_verses` (exact verse boundaries), then `clean_verses`
(a translation's own faults, then `tidy`). What needs another translation to compare with is in `scripture_mends`.

A verse id is book * 1,000,000 + chapter * 1,000 + verse, as in the packages.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from bible_corpus.repairs import MENDS

# Raised whenever a rule below changes what it writes: a corpus built by an older version is then built again.
RULES_VERSION = 1

ALLOWED_PUNCTUATION = frozenset(" .,;:!?'\"()-\u2013\u2014\u2018\u2019\u201c\u201d")

# Windows-1252 characters that stand as C1 control characters (leeser), as what Windows meant by them;
# no-break space and the soft hyphen are typesetting, not text.
_CHARACTERS = {code: bytes([code]).decode("cp1252", errors="ignore") for code in range(0x80, 0xA0)}
_CHARACTERS |= {0xA0: " ", 0xAD: "", 0x200B: "", 0x2060: "", 0xFEFF: "", 0x85: "...", 0x2026: "..."}

# Names of the Hebrew letters that head the parts of an acrostic poem, in every spelling the packages use.
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
    """Cut the text at its `<sup>verse</sup>` marks; returns the verses by id, and ids after which text had no id.

    The packages' own index tables drift by a few characters a book in five translations (dr, gb, roth, wbs, bbe), so
    that verses begin and end in mid-word; the marks stand in the right place in all of them. `verse_ids` are the keys
    of the package's table in ascending order. A mark out of sequence repeats a number that has no id (once in tyn, six
    times in wyc): its text is left out and named in the second result. Raises ValueError when the marks and the
    ids do not fit together.
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


# Translations whose text carries its own verse marks.
RENUMBERED = frozenset({"wbs"})


def renumber(verses: Mapping[int, str]) -> dict[int, str]:
    r"""Follow the `\\chapter:verse\\` marks that wbs carries where its ids follow Hebrew chapters.

    A mark at the head of a verse names the verse of the English Bible that the words belong to. Two pieces of one
    verse (a psalm's title and its first verse) are joined in their order. A mark further in, and a stray backslash,
    is only removed.
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


# What any of the changes in `tidy` begins with; most verses have none of it.
_UNTIDY = re.compile(r"[,;:.!?][A-Za-z(,.;:\u201c\u2018-]|\w\(|\)[A-Za-z]|\s[,.;:!?)]|\([\s)]|^[.,;:!?)\u2014-]")


def tidy(text: str) -> str:
    """What every translation needs: known characters, single spaces, spaces where punctuation wants them, NFC."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.translate(_CHARACTERS))
    text = re.sub(r"\s+", " ", text).strip()
    if not _UNTIDY.search(text):
        return text
    text = re.sub(r"([,;:!?])(?=[A-Za-z(])", r"\1 ", text)
    text = re.sub(r"(\.)(?=[A-Z][a-z]|[AIO][ ,]|\()", r"\1 ", text)
    text = re.sub(r"(?<=\w)\((?=\w)", " (", text)
    text = re.sub(r"\)(?=[A-Za-z])", ") ", text)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r" +(?=[,.;:!?)])", "", text)
    text = re.sub(r"\( +", "(", text)
    text = re.sub(r"\(\s*\)", "", text)
    text = re.sub(r"([,;:])[,.;:]+(?=\s|$)", r"\1", text)
    text = re.sub(r"(?<=[,;:.?!])-+(?=\s)", "", text)
    text = re.sub(r"(?<!\.)\.(?:[,;:]|\s\.(?!\.))+(?=\s|$)", ".", text)
    text = re.sub(r"(?<=[,;:.!?])(?=[\u201c\u2018]\w)", " ", text)
    return re.sub(r"\s+", " ", re.sub(r"^[\s.,;:!?)\u2014-]+", "", text)).strip()


def faults(text: str) -> list[str]:
    """What the corpus contract forbids in a verse, found in `text`; empty for a clean verse."""
    found = [f"character {c!r}" for c in sorted(set(text) - ALLOWED_PUNCTUATION) if not (c.isalpha() or c.isdigit())]
    if text != unicodedata.normalize("NFC", text):
        found.append("not NFC")
    if re.search(r"\s\s|^\s|\s$|\s[,.;:!?)]|\(\s", text):
        found.append("stray space")
    return found


# ------------------------------------------------------------------------------------------ rules per translation
def _without_brackets(text: str) -> str:
    """`[is]`: words the translators supplied, in italics in print. The words stay, the brackets go."""
    text = re.sub(r"(?<=[a-z])\[(?!dess\]|can\])(?=[A-Za-z]{2,}\])", " ", text)
    text = re.sub(r"[\[\]]", "", text)
    return re.sub(r"(?<=[a-z]-) (?=[a-z])|(?<=[a-z]) (?=-[a-z])", "", text)  # `first- fruits`, `preparation -day`


def _asv(text: str) -> str:
    """As print; many a `[Selah` lacks its closing bracket and full stop."""
    return _without_brackets(re.sub(r"\s*\[Selah\b\]?\.?\]?(?=\s|$)", " Selah.", text))


def _dar(text: str) -> str:
    """`*he*` marks stress; braces hold psalm titles, which stay as the first words of the psalm."""
    return _without_brackets(re.sub(r"[*{}]", "", text))


def _dr(text: str) -> str:
    """Scanned text: verse numbers of the page (`,11 Keep`), `0 Lord` for `O Lord`, references, broken words."""
    text = re.sub(r"dummy verses inserted by amos", "", text)
    text = re.sub(r"^[\s,.;:]*\d+\s*(?=[A-Z(])", "", text)
    text = re.sub(r"\[\d Kings[^\]]*\]?", "", text)
    text = re.sub(r"(?<![\w,])0(?= (?:my|son|house|king|virgin|[A-Z]))", "O", text)
    text = re.sub(r"(?<=\s)\d+\s(?=[A-Z])|>\s*-*|[\\/\"]", " ", text)
    text = re.sub(r"(?<=[a-z])- (?=[a-z])", "", text)
    return re.sub(r"(?<=\s)[.,;](?=[a-z])", "", text)


def _gb(text: str) -> str:
    """Braces hold other verse numbers and notes; guillemets psalm titles; `&` is `and`; chapter additions are cut.

    `(3:24) ...` numbers inside a verse are the Greek additions to Daniel and Esther (not of the 66 books); words
    after `{{See` are a commentator's note on Revelation.
    """
    text = re.sub(r"\{\{See.*$", " ", text, flags=re.S)
    text = re.sub(r"\{\\cf2[^}]*\}|\{\([^)]*\)\}|\{[^}]*\}", " ", text)
    text = re.sub(r"(?:\\par)?\s*\(\d+:\d+\).*$", " ", text, flags=re.S)
    text = re.sub(r"\\par|[«»{}]", " ", text)
    return _without_brackets(text.replace("&", " and "))


def _leeser(text: str) -> str:
    """cp1252 dashes: a single one joins words (`first-born`), a double one is a dash; bullets are dirt."""
    text = text.replace("\x96\x96", "\u2014").replace("\x96", "-")
    text = re.sub(r"^\s*BOOK [A-Z]+:|BEGIM\s*$", "", re.sub(r"[\x95\u00b0]", " ", text)).replace("1ook", "look")
    return _without_brackets(text)


def _lont(text: str) -> str:
    """Guillemets wrap whole verses that hold a quotation; the quotation has its own marks, some without a space."""
    text = re.sub(r"[«»]|OMITTED TEXT", "", text)
    return re.sub(r"(?<=[a-z,;:.])'(?=[A-Z])", " '", _with_dashes(text))


def _mont(text: str) -> str:
    """`Johnwho`, words broken at a line end (`market-  place`), font codes, and pieces of other verses after `;38`."""
    text = re.sub(r"\bJohn(?=[a-z])", "John ", re.sub(r"missing\s+fehlt/missing", " ", text))
    text = re.sub(r"[;-]?\s*;\d+\s.*$", "", text, flags=re.S)
    text = re.sub(r"\\ul\d", "", text)
    return space_quotes(_with_dashes(re.sub(r"(?<=[a-z])-\s\s+(?=[a-z])", "-", text)))


def _nheb(text: str) -> str:
    """Lines of poetry run together; speakers in the Song of Songs are headings."""
    text = re.sub(r"(?<=[.!?\"])(?:Friends|Beloved|Lover)(?=[A-Z])", " ", text)
    text = re.sub(r"^\s*(?:Friends|Beloved|Lover)(?=[A-Z])|(?<=[.!?\"])\s*(?:Friends|Beloved|Lover)\s*$", " ", text)
    text = re.sub(r"BOOK\s+[IV]+\s*$|^\s*BOOK\s+I(?=\s)", " ", text.replace(", :", ", "))
    return _without_brackets(space_quotes(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)))


def _oeb(text: str) -> str:
    """A converter's remark stands at hundreds of verses; lines of poetry run together."""
    text = re.sub(r"\[crosswire[^\]]*\]", " ", text)
    text = re.sub(r"(?<=[,;:.!?])(?=[\u201c\u2018])", " ", text)
    text = re.sub(r"(?<=[\u201d])(?=[A-Za-z])|(?<=[.,!?]\u2019)(?=[A-Za-z])|(?<=[a-z])(?=[\u201c])", " ", text)
    text = re.sub(r"(?<=[a-z\u2019])(?=[A-Z])", " ", text)
    text = re.sub(r"(?<=[a-z]\.)(?=[a-z]{3,} )", " ", re.sub(r"\s*(?<!\w)\u2013\s+", " \u2014 ", text))
    return _without_brackets(_with_dashes(re.sub(r"\s*-{2,}\s*", " \u2014 ", text)))


def _roth(text: str) -> str:
    """The dash that Rotherham sets between clauses was lost where it stood between letters (`saidLet`)."""
    text = re.sub(r"\\fs\d+|\*+\s*|[*=_]|^\s*fehlt\s*$", " ", text)
    text = re.sub(r"\b(?:SHE|HE|THEY|BOTH|DAUGHTERS OF JERUSALEM|BOOK THE [A-Z]+)\b", " ", text)
    text = re.sub(r"(?<=[,;:])-\.?|(?<=[a-z]\.)(?=[a-z]+ )", " ", re.sub(r"\b1o\b", "lo", text))
    text = re.sub(r"(?<=[a-z]-) (?=[a-z])", "", text)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "\u2014", text)


def _tyn(text: str) -> str:
    """Numerals stand between full stops (`.vij. folde`); two verse numbers and a cross are the page's."""
    text = re.sub(r"\.\s?([ivxlcmjIVXLCMJ]+)\s?\.(?=[\s.]|$)", r" \1 ", text)
    text = re.sub(r"\.([ivxlcmjIVXLCMJ]+)\.", r"\1 ", text)
    text = re.sub(r"(?<=\s)\.(?=[ivxlcmIVXLCM])", "", text)
    return re.sub(r"\b\d+\b|\+", " ", text)


def _ukjv(text: str) -> str:
    """`(o. logos)`: the editor's note of the Greek word."""
    return re.sub(r"\s*\([op]\. [^)]*\)", " ", text)


def _web(text: str) -> str:
    """A backtick is an apostrophe or a single quotation mark; the next psalm's heading and title end a psalm."""
    text = re.sub(r"\s*(?:BOOK\s+[IV]+\s+)?(?:Psalm \d+\b|BOOK\s+[IV]+\s*$).*$", " ", text, flags=re.S)
    return _without_brackets(space_quotes(text.replace("`", "'")))


def _wbs(text: str) -> str:
    """A plus sign ends some psalms; three empty brackets are gaps of the source."""
    return re.sub(r"\+|\[\s*\]", " ", text)


def _wesley(text: str) -> str:
    """`?` stands for a ligature or diaeresis, a backtick or bar for a letter: see `MENDS`."""
    text = text.replace("C?sar", "Cæsar").replace("Nicola?tans", "Nicolaitans")
    return text.replace(" -day", "-day")


def _wmth(text: str) -> str:
    """German-style quotation marks and dashes with uneven spaces, to English ones."""
    text = text.replace("»", "\u201c").replace("«", "\u201d").replace("`", "\u2018").replace("'", "\u2019")
    text = re.sub(r"(?<=[\u201d])(?=\u201c)|(?<=\u201d)(?=[A-Za-z])", " ", text)
    return _without_brackets(re.sub(r"\s*\u2013\s*", "\u2014", text))


def _wyc(text: str) -> str:
    """A backtick opens a gloss and never closes; `[Note: ...]` is a margin note."""
    return _without_brackets(re.sub(r"\[Note:[^\]]*\]", " ", text).replace("`", ""))


def _ylt(text: str) -> str:
    """Backticks are quotation marks and apostrophes."""
    return _without_brackets(re.sub(r"\s+--\s+", " \u2014 ", text.replace("`", "'")))


def _rwebster(text: str) -> str:
    """Hyphens are en dashes."""
    return _without_brackets(text.replace("\u2013\u2013", "\u2014").replace("\u2013", "-"))


def _etheridge(text: str) -> str:
    """Footnote figures and letters; dashes of two or three hyphens."""
    text = re.sub(r"-{2,}", "\u2014", text)
    text = re.sub(r"(?<![\w])\d(?=\w)|(?<=[\s,])\d(?=[\s?])|(?<=\.)i(?=\s*$)", "", text)
    return space_quotes(_with_dashes(text))


def _with_dashes(text: str) -> str:
    """A hyphen with a space on one side only was a dash."""
    return re.sub(r"(?<=[\w,;:.?!]) -(?=\w)|(?<=[a-z,?!])- (?=[a-z\u2018\u201c])", "\u2014", text)


def space_quotes(text: str) -> str:
    """Set the lost space beside a straight double quotation mark: before an opening one, after a closing one.

    Marks with a space on one side are plain. One between punctuation and a letter closes if the last plain one before
    it opened, opens if the last one closed; as the first of its verse it closes after `. ! ?` and opens after `, ; :`.
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


CLEANERS: dict[str, Callable[[str], str]] = {
    "akjv": str,
    "asv": _asv,
    "dar": _dar,
    "dr": _dr,
    "etheridge": _etheridge,
    "gb": _gb,
    "kjv": _without_brackets,
    "leeser": _leeser,
    "lont": _lont,
    "mont": _mont,
    "nheb": _nheb,
    "oeb": _oeb,
    "roth": _roth,
    "rwebster": _rwebster,
    "tyn": _tyn,
    "ukjv": _ukjv,
    "wbs": _wbs,
    "web": _web,
    "wesley": _wesley,
    "wmth": _wmth,
    "wyc": _wyc,
    "ylt": _ylt,
}


def clean_verse(translation: str, verse_id: int, text: str) -> str:
    """One verse of `translation` by its rules; "" when nothing is left of it."""
    text = re.sub(r"\s\s+", "  ", text.replace("\n", " "))
    wrong, right = MENDS.get((translation, verse_id), ("", ""))
    text = CLEANERS[translation](text.replace(wrong, right) if wrong else text)
    if verse_id // 10**6 in _ACROSTIC_BOOKS:
        text = _LEADING_LETTER.sub("", _UPPER_LETTER.sub(" ", text))
    text = tidy(text)
    return text if any(c.isalpha() for c in text) else ""


_WORDS = re.compile(r"[A-Za-z]+")
_FROM_VULGATE = frozenset({"dr", "wyc"})


def _is_addition(verse_id: int) -> bool:
    """The Greek parts of Esther and Daniel and the Prayer of Manasseh, by the numbers of the Latin Bible."""
    return (
        17_010_004 <= verse_id < 18_000_000
        or 27_003_024 <= verse_id <= 27_003_090
        or 27_013_001 <= verse_id < 28_000_000
        or verse_id // 1000 == 14_037
    )


def clean_verses(translation: str, verses: Mapping[int, str]) -> tuple[dict[int, str], Counter[str], int]:
    """All verses of the 66 books by the rules of `translation`; how many were dropped for what reason; and how many
    were repaired, that is, changed in their words and not only in marks and spaces."""
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
