"""From a package's marked-up Bible text to clean verses: one small, documented rule per translation.

Every function here is pure. `prepare_dataset.py` calls, in this order, `split_verses` (exact verse boundaries),
`clean_verses` (a translation's own faults, then `tidy`), and for three translations `split_joined_words` (needs a
vocabulary taken from the others) and for the Geneva Bible `without_borrowed` (needs the King James text).

A verse id is book * 1,000,000 + chapter * 1,000 + verse, as in the packages.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

# Raised whenever a rule below changes what it writes: a corpus built by an older version is then built again.
RULES_VERSION = 1

ALLOWED_PUNCTUATION = frozenset(" .,;:!?'\"()-\u2013\u2014\u2018\u2019\u201c\u201d")

# Windows-1252 characters that the packages hold as C1 control characters (leeser), as what Windows meant by them;
# no-break space and the soft hyphen are typesetting, not text.
_CHARACTERS = {code: bytes([code]).decode("cp1252", errors="ignore") for code in range(0x80, 0xA0)}
_CHARACTERS |= {0xA0: " ", 0xAD: "", 0x200B: "", 0x2060: "", 0xFEFF: "", 0x2026: "..."}

# Names of the Hebrew letters that head the parts of an acrostic poem, in every spelling the packages use.
_LETTERS = (
    "ALEPH ALEPHI BETH BET BETI BEIT GIMEL BEGIM DALETH DALET DALED DALE HE HEY HEH VAU VAV WAW ZAIN ZAYIN CHETH HETH "
    "CHET HET TETH TET JOD YOD YODH YUD CAPH KAPH KAF LAMED LAMECH LAME MEM NUN SAMECH SAMEKH SAMEK AIN AYIN PE PEY "
    "PHE TSADDI TZADDI TZADE TZADI TZADDE ZADHE SADE KOPH COPH QOPH KUF RESH RES SCHIN SHIN SIN SHEN TAU TAV THAU"
).split()
_ACROSTIC_BOOKS = {19, 20, 25}
_UPPER_LETTER = re.compile(r"(?<![A-Z])\[?(?:" + "|".join(sorted(_LETTERS, key=len, reverse=True)) + r")\]?\.?(?![A-Z]*[A-Z]\b)(?=[A-Z][a-z]|[a-z]|\W|$)")
_LEADING_LETTER = re.compile(
    r"^\W*(?:" + "|".join(sorted((name.capitalize() for name in _LETTERS), key=len, reverse=True)) + r")\.\]?\s+"
)


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
            text = text[mark.end():]
        text = re.sub(r"\\(?:\d+:\d+\\)?", " ", text)
        renumbered[verse_id] = f"{renumbered[verse_id]} {text}" if verse_id in renumbered else text
    return dict(sorted(renumbered.items()))


def tidy(text: str) -> str:
    """What every translation needs: known characters, single spaces, spaces where punctuation wants them, NFC."""
    text = unicodedata.normalize("NFC", text.translate(_CHARACTERS))
    text = re.sub(r"([,;:!?])(?=[A-Za-z(])", r"\1 ", text)
    text = re.sub(r"(\.)(?=[A-Z][a-z]|[AIO][ ,]|\()", r"\1 ", text)
    text = re.sub(r"(?<=\w)\((?=\w)", " (", text)
    text = re.sub(r"\)(?=[A-Za-z])", ") ", text)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r" +(?=[,.;:!?)])", "", text)
    text = re.sub(r"\( +", "(", text)
    text = re.sub(r"\(\s*\)", "", text)
    text = re.sub(r"([,;:])[,.;:]+(?=\s|$)", r"\1", text)
    text = re.sub(r"(?<!\.)\.(?:[,;:]|\s\.(?!\.))+(?=\s|$)", ".", text)
    return re.sub(r"\s+", " ", text).strip()


def faults(text: str) -> list[str]:
    """What the corpus contract forbids in a verse, found in `text`; empty for a clean verse."""
    found = [f"character {c!r}" for c in sorted(set(text)) if not (c.isalpha() or c.isdigit() or c in ALLOWED_PUNCTUATION)]
    if text != unicodedata.normalize("NFC", text):
        found.append("not NFC")
    if re.search(r"\s\s|^\s|\s$|\s[,.;:!?)]|\(\s", text):
        found.append("stray space")
    return found


# ------------------------------------------------------------------------------------------ rules per translation
def _without_brackets(text: str) -> str:
    """`[is]`: words the translators supplied, in italics in print. The words stay, the brackets go."""
    text = re.sub(r"(?<=[a-z])\[(?=[a-z]{2,}\])(?!dess|can)", " ", text)
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
    text = re.sub(r"^[\s,.;:]*\d+\s*(?=[A-Z(])", "", text)
    text = re.sub(r"\[\d Kings[^\]]*\]?", "", text)
    text = re.sub(r"(?<![\w,])0(?= (?:my|son|house|king|virgin|[A-Z]))", "O", text)
    text = re.sub(r"(?<=\s)\d+\s(?=[A-Z])|>\s*-*|[\\/\"]", " ", text)
    text = re.sub(r"(?<=[a-z])- (?=[a-z])", "", text)
    return re.sub(r"(?<=\s)[.,;](?=[a-z])", "", text)


def _gb(text: str) -> str:
    """Braces hold other verse numbers and notes; guillemets psalm titles; `&` is `and`; chapter additions are cut.

    `(3:24) ...` numbers inside a verse are the Greek additions to Daniel and Esther (not of the 66 books); words after
    `{{See` are a commentator's note on Revelation.
    """
    text = re.sub(r"\{\{See.*$", " ", text, flags=re.S)
    text = re.sub(r"\{\\cf2[^}]*\}|\{\([^)]*\)\}|\{[^}]*\}", " ", text)
    text = re.sub(r"(?:\\par)?\s*\(\d+:\d+\).*$", " ", text, flags=re.S)
    text = re.sub(r"\\par|[«»{}]", " ", text)
    return _without_brackets(text.replace("&", " and "))


def _leeser(text: str) -> str:
    """cp1252 dashes: a single one joins words (`first-born`), a double one is a dash; bullets are dirt."""
    text = text.replace("\x96\x96", "\u2014").replace("\x96", "-")
    text = re.sub(r"^\s*BOOK [A-Z]+:", "", re.sub(r"[\x95\u00b0]", " ", text)).replace("1ook", "look")
    return _without_brackets(text)


def _lont(text: str) -> str:
    """Guillemets wrap whole verses that hold a quotation; the quotation has its own marks, sometimes without a space."""
    text = re.sub(r"[«»]|OMITTED TEXT", "", text)
    return re.sub(r"(?<=[a-z,;:.])'(?=[A-Z])", " '", _with_dashes(text))


def _mont(text: str) -> str:
    """Words broken at a line end (`market-  place`), font codes, and pieces of other verses after `;38`."""
    text = re.sub(r"missing\s+fehlt/missing", " ", text)
    text = re.sub(r"[;-]?\s*;\d+\s.*$", "", text, flags=re.S)
    text = re.sub(r"\\ul\d", "", text)
    return space_quotes(_with_dashes(re.sub(r"(?<=[a-z])-\s\s+(?=[a-z])", "-", text)))


def _nheb(text: str) -> str:
    """Lines of poetry run together; speakers in the Song of Songs are headings."""
    text = re.sub(r"(?<=[.!?\"])(?:Friends|Beloved|Lover)(?=[A-Z])", " ", text)
    text = re.sub(r"^\s*(?:Friends|Beloved|Lover)(?=[A-Z])", " ", text)
    text = re.sub(r"BOOK\s+[IV]+\s*$|^\s*BOOK\s+I(?=\s)", " ", text.replace(", :", ", "))
    return _without_brackets(space_quotes(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)))


def _oeb(text: str) -> str:
    """A converter's remark stands at hundreds of verses; lines of poetry run together."""
    text = re.sub(r"\[crosswire[^\]]*\]", " ", text)
    text = re.sub(r"(?<=[,;:.!?])(?=[\u201c\u2018])", " ", text)
    text = re.sub(r"(?<=[\u201d])(?=[A-Za-z])|(?<=[.,!?]\u2019)(?=[A-Za-z])|(?<=[a-z])(?=[\u201c])", " ", text)
    text = re.sub(r"(?<=[a-z\u2019])(?=[A-Z])", " ", text)
    text = re.sub(r"(?<=[a-z]\.)(?=[a-z]{3,} )", " ", re.sub(r"\s*(?<!\w)\u2013\s+", " \u2014 ", text))
    return _without_brackets(_with_dashes(text))


def _roth(text: str) -> str:
    """The dash that Rotherham sets between clauses was lost where it stood between letters (`saidLet`)."""
    text = re.sub(r"\\fs\d+|\*+\s*|[*=_]", " ", text)
    text = re.sub(r"\b(?:SHE|HE|THEY|BOTH|DAUGHTERS OF JERUSALEM|BOOK THE [A-Z]+)\b", " ", text)
    text = re.sub(r"(?<=[,;:])-\.?|(?<=[a-z]\.)(?=[a-z]{2})", " ", re.sub(r"\b1o\b", "lo", text))
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
        before, after = text[i - 1: i], text[i + 1: i + 2]
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
    "akjv": str, "asv": _asv, "dar": _dar, "dr": _dr, "etheridge": _etheridge, "gb": _gb, "kjv": _without_brackets,
    "leeser": _leeser, "lont": _lont, "mont": _mont, "nheb": _nheb, "oeb": _oeb, "roth": _roth, "rwebster": _rwebster,
    "tyn": _tyn, "ukjv": _ukjv, "wbs": _wbs, "web": _web, "wesley": _wesley, "wmth": _wmth, "wyc": _wyc, "ylt": _ylt,
}

# Single slips: (translation, verse id) -> (what the package has, what the verse says). Each is applied before the rules.
MENDS: dict[tuple[str, int], tuple[str, str]] = {
    ("akjv", 1033020): ("EleloheIsrael", "Elelohe-Israel"),
    ("akjv", 5032051): ("MeribahKadesh", "Meribah-Kadesh"),
    ("ukjv", 1033020): ("EleloheIsrael", "Elelohe-Israel"),
    ("ukjv", 5032051): ("MeribahKadesh", "Meribah-Kadesh"),
    ("ukjv", 19119024): ("counsellors.leth.", "counsellors."),
    ("dar", 38009009): ("rIding", "riding"),
    ("dr", 7012012): ("ZahnIon", "Zabulon"),
    ("dr", 14030011): ("ZabuloI", "Zabulon"),
    ("dr", 16001005): ("WI beseech", "I beseech"),
    ("dr", 24003025): ("theLord", "the Lord"),
    ("dr", 1045015): (",peak", "speak"),
    ("dr", 1038024): ("a,lie", "a lie"),
    ("dr", 28011006): ("sha.ll", "shall"),
    ("etheridge", 48002006): ("men?s", "men's"),
    ("etheridge", 46001020): ("Hath not . Aloha", "Hath not Aloha"),
    ("etheridge", 57001002): ("lowlabourer", "fellow-labourer"),
    ("etheridge", 58007002): ("MalekSholem", "Malek-Sholem"),
    ("etheridge", 58007015): ("MalkiZedek", "Malki-Zedek"),
    ("mont", 40016014): ("Johnthe", "John the"),
    ("nheb", 66014001): ("4I", "I"),
    ("tyn", 1046021): ("BenIamin", "Beniamin"),
    ("tyn", 4012010): ("MyrIam", "Myriam"),
    ("tyn", 1018023): ("saydeWylt", "sayde Wylt"),
    ("tyn", 1019009): ("themAnd", "them And"),
    ("tyn", 1027039): ("himBeholde", "him Beholde"),
    ("tyn", 1032017): ("sayngeWhe", "saynge Whe"),
    ("tyn", 4034021): ("BeIamin", "Beniamin"),
    ("tyn", 52004014): ("IeIesus", "Iesus"),
    ("tyn", 66009016): ("xM", "x M"),
    ("wesley", 41013019): ("creat`on", "creation"),
    ("wesley", 42009024): ("who|oever", "whosoever"),
    ("wesley", 43008006): ("t`ou", "thou"),
    ("dr", 15006019): ("0 on", "on"),
    ("gb", 16011030): ("HinNumbers", "Hinnom."),
    ("gb", 17009025): ("whenEsther", "when Esther"),
    ("gb", 42019001): ("AndJesus", "And Jesus"),
    ("kjv", 52001008): ("God- ward", "God-ward"),
    ("roth", 1023015): ("dead., bur. thou.", "dead, bury thou."),
    ("roth", 26020015): ("b1ing", "bring"),
    ("roth", 26023049): ("Slmi1", "shall"),
    ("roth", 26029004): ("Ito thy scales1", "to thy scales,"),
    ("wyc", 26006005): ("dnA", "And"),
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


def clean_verses(translation: str, verses: Mapping[int, str]) -> tuple[dict[int, str], Counter[str]]:
    """All verses of the 66 books by the rules of `translation`, and how many were dropped for what reason."""
    dropped: Counter[str] = Counter()
    cleaned: dict[int, str] = {}
    for verse_id, text in verses.items():
        if not 1 <= verse_id // 10**6 <= 66:
            dropped["outside the 66 books"] += 1
            continue
        text = clean_verse(translation, verse_id, text)
        if not text:
            dropped["empty in the source"] += 1
        elif faults(text):
            dropped["not clean: " + ", ".join(faults(text))] += 1
        else:
            cleaned[verse_id] = text
    return cleaned, dropped


# ---------------------------------------------------------------------------- rules that need another translation
# What was lost where two words run together: Rotherham's dash, elsewhere the end of a line of poetry.
JOINED_BY = {"roth": "\u2014", "nheb": " ", "oeb": " "}
VOCABULARY_SOURCES = ("kjv", "asv", "dar", "ylt", "web", "wbs", "leeser", "wmth")

_FUNCTION_WORDS = frozenset(
    "a an the and or but nor for to of in on at by with from unto upon into as if when then than that this these those "
    "there thy thee thou my mine his her our your their its he she it we ye you they him them us me i is are was were be "
    "been am shall shalt will wilt hath have has had hast do did not no so all who whom which what where whose one "
    "before because according until through also even let may yet now how saying said neither yea lo every again till "
    "between among against like whether would could should two three forty some any after above without".split()
)
_PREFIX_LIKE = frozenset("a an at as be by for in me no not of on one or so to up us we he i he his all".split())
_SUFFIX_LIKE = frozenset("a an i all like at me am as us he one or able less".split())


def split_joined_words(text: str, known: Mapping[str, int], own: Mapping[str, int], joint: str) -> str:
    """Part two words that run together (`templemay`) with `joint` between them.

    `known` counts the lower-case words of other translations, `own` those of this one. A word is parted if no other
    translation has it, this one has it twice at most, and it falls into two well-known words of which one is
    a function word in a place where it is no prefix or suffix. `JOINED_WORDS` lists what this leaves over.
    """
    return re.sub(r"[A-Za-z]{4,}", lambda word: _parted(word[0], known, own, joint), text)


def _parted(word: str, known: Mapping[str, int], own: Mapping[str, int], joint: str) -> str:
    lower = word.lower()
    if lower in known or own[word] > 2:
        return word
    if lower in JOINED_WORDS:
        cut = JOINED_WORDS[lower]
        return word[:cut] + joint + word[cut:]
    cuts = []
    for cut in range(1, len(word)):
        first, second = lower[:cut], lower[cut:]
        weight = min(known.get(first, 0), known.get(second, 0))
        tail = second in _FUNCTION_WORDS and second not in _SUFFIX_LIKE and len(first) > 1
        head = first in _FUNCTION_WORDS and first not in _PREFIX_LIKE and len(second) > 1 and word.islower()
        if weight >= 20 and (tail or head) and not (word[0].isupper() and len(second) < 3):
            cuts.append((weight, cut))
    if not cuts:
        return word
    cut = max(cuts)[1]
    return word[:cut] + joint + word[cut:]


JOINED_WORDS: dict[str, int] = {}


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word (letters only, as written) stands in `texts`."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"[A-Za-z]+", text))
    return counts


def without_borrowed(verses: Mapping[int, str], donors: Iterable[Mapping[int, str]], known: Mapping[str, int]) -> dict[int, str]:
    """The verses that are not another translation's in disguise (gb).

    The package fills almost half of the Geneva Bible of 1599, whose spelling is its own, with verses of the King
    James and Webster Bibles. A verse is such a filling if all its words are spelt as in those (`known`) and at least
    seven in ten of them, as a set, are those of the same verse in one of the `donors`.
    """
    donors = list(donors)

    def is_borrowed(verse_id: int, text: str) -> bool:
        words = set(re.findall(r"[a-z]+", text.lower()))
        if not all(word in known for word in re.findall(r"\b[a-z]+", text)):  # names are spelt in many ways
            return False
        others = (set(re.findall(r"[a-z]+", donor.get(verse_id, "").lower())) for donor in donors)
        return any(10 * len(words & other) >= 7 * len(words | other) for other in others)

    return {verse_id: text for verse_id, text in verses.items() if not is_borrowed(verse_id, text)}


def mend_across(bibles: dict[str, dict[int, str]], dropped: dict[str, Counter[str]]) -> None:
    """Apply the rules that compare translations, in place; those they need must be among `bibles`."""
    known: Counter[str] = Counter()
    for name in VOCABULARY_SOURCES:
        for word, count in count_words(bibles.get(name, {}).values()).items():
            known[word.lower()] += count
    for name in JOINED_BY.keys() & bibles.keys():
        own = count_words(bibles[name].values())
        bibles[name] = {v: split_joined_words(text, known, own, JOINED_BY[name]) for v, text in bibles[name].items()}
    if "gb" in bibles:
        donors = [bibles[name] for name in ("kjv", "wbs", "rwebster") if name in bibles]
        genuine = without_borrowed(bibles["gb"], donors, known)
        dropped["gb"]["taken from the King James or Webster Bible"] += len(bibles["gb"]) - len(genuine)
        bibles["gb"] = genuine
