"""Repairs that a pattern on a single verse cannot make: typos, joined words, verses copied from other translations.

`cleaning` applies `REPAIRS` to single verses; `repair_across` runs on all cleaned translations together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

# Typos: (translation, verse id) -> (text in the package, correction). Applied before cleaning.
REPAIRS: dict[tuple[str, int], tuple[str, str]] = {
    ("akjv", 1033020): ("EleloheIsrael", "Elelohe-Israel"),
    ("akjv", 5032051): ("MeribahKadesh", "Meribah-Kadesh"),
    ("ukjv", 1033020): ("EleloheIsrael", "Elelohe-Israel"),
    ("ukjv", 5032051): ("MeribahKadesh", "Meribah-Kadesh"),
    ("ukjv", 19119024): ("counsellors.leth.", "counsellors."),
    ("dar", 38009009): ("rIding", "riding"),
    ("dr", 7012012): ("ZahnIon", "Zabulon"),
    ("dr", 14030011): ("ZabuloI", "Zabulon"),
    ("dr", 24011003): ("yethis", "of this"),
    ("dr", 24014016): ("fanmine", "famine"),
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
    ("tyn", 1024012): ("sayde.LORde", "sayde. LORde"),
    ("tyn", 60003020): ("saye.viii", "saye viii"),
    ("tyn", 66007005): ("xii.M Of", "xii M. Of"),
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
    ("kjv", 52001008): ("God- ward", "God-ward"),
    ("roth", 1010008): ("Nimrod.he", "Nimrod. he"),
    ("roth", 10006011): ("Obed -edom", "Obed-edom"),
    ("roth", 1023015): ("dead., bur. thou.", "dead, bury thou."),
    ("roth", 26020015): ("b1ing", "bring"),
    ("roth", 26023049): ("Slmi1", "shall"),
    ("roth", 26029004): ("Ito thy scales1", "to thy scales,"),
    ("wyc", 26006005): ("dnA", "And"),
}


def _joined(words: str) -> dict[str, str]:
    return {re.sub(r"[|-]", "", word): word for word in words.split()}


# Joined words that the heuristics of `split_joined_words` miss or that are too frequent for them, by translation. "|"
# marks a lost separator, "-" a lost hyphen.
JOINED: dict[str, dict[str, str]] = {
    "dr": _joined("was|morning sending|for rest|in the|strength and|have to|them hath|loved in|all "),
    "etheridge": _joined("thirty|and men|in"),
    "leeser": _joined("psalm|and"),
    "nheb": _joined("say|that"),
    "oeb": _joined("those|who me|to me|in Lord|will me|and"),
    "roth": _joined(
        "evening|and river|the city|the him|and me|the man|according him|by them|by land|the people|the "
        "son|my thee|the him|in Yahweh|the they|the men|the God|who you|men thee|and God|in had|out him|with "
        "you|even Yahweh|and father|the heard|that Yahweh|to yea|and man|to interpretation|unto that|just "
        "you|not you|that you|in Man|coming but|that know|that dry-ground wild-beasts age-abiding sin-bearer "
        "branch-apple burying-places ever-flowing "
    ),
    "rwebster": _joined("to|his that|is"),
    "wesley": _joined("dead|to without|shedding"),
    "wmth": _joined("compassions|of"),
}

# Words that the heuristics would split wrongly.
NOT_JOINED = frozenset(
    (
        "saddlebags crossbreed damaged grapevine coastline irshemesh hakore alright fittest evilmerodach "
        "tobadonijah mansion shearjashub blacksmith quartermaster laughingstock pancake lifespan dumbfounded "
        "housewife zebulon thundercloud thankoffering thankofferings downhearted meleah rededication "
        "barjoshua farewells racecourse broadcast lapsing buckthorn calluses sidepiece eziongeber milchah "
        "bethjeshimoth yearim bethhoron bethshean hebel doorposts seena gethur lotans aiyah jeish tyreans "
        "passhur hamans breastworks sandalled crossmark assailing alarms supporter bargained allah wedan "
        "earthwork footpaths forthgoings noblest crossways immersing blindfolding rulerships highpriest "
        "soberminded fellowfeeling brandmarks highroad lustre handstaff neckchain hasso headset whosesoever "
        "alternation roiled downtreading forwardness regemmelech outpoured outburst installed install stored "
        "afterpart hinderpart breastpiece atrothbeth calledst uprisen "
    ).split()
)

# The lost separator, if not a space: Rotherham's dash. In nheb and oeb, line breaks in poetry were lost.
JOINED_BY = {"roth": "\u2014"}
POETRY_JOINED = frozenset({"nheb", "oeb", "roth"})
VOCABULARY_SOURCES = ("kjv", "asv", "dar", "ylt", "web", "wbs", "leeser", "wmth")

_FUNCTION_WORDS = frozenset(
    "a an the and or but nor for to of in on at by with from unto upon into as if when then than that this these those "
    "there thy thee thou my mine his her our your their its he she it we ye you they him them us me i is are was were "
    "be been am shall shalt will wilt hath have has had hast do did not no so all who whom which what where whose one "
    "before because according until through also even let may yet now how saying said neither yea lo every again till "
    "between among against like whether would could should two three forty some any after above without".split()
)
_PREFIXES = frozenset(
    "a an at as be by for in me no not of on one or so to up us we he i his all re un out over under fore en dis off "
    "ad ir well ill half self sea sun pre non sub mis ab am ho ra ba pr".split()
)
_SUFFIXES = frozenset(
    "a an i all like at me am as us he one or able less er en ed es ess ful fully fulness ship ness al age ward wards "
    "man men ring ate ant ants eth seth land lands ten tens ther most".split()
)


def split_joined_words(text: str, translation: str, known: Mapping[str, int], own: Mapping[str, int]) -> str:
    """Split joined words such as `templemay` and restore the separator.

    `known` counts the lower-case words of other translations, `own` the words of this one. Words in `JOINED` are always
    split. In translations that lost line breaks or dashes, a word is split if no other translation has it, this one has
    it at most twice, and it consists of two frequent words, neither of which could be an affix (or one of which is a
    function word in a position where it cannot be an affix).
    """
    return re.sub(r"[A-Za-z]{4,}", lambda word: _split(word[0], translation, known, own), text)


def _split(word: str, translation: str, known: Mapping[str, int], own: Mapping[str, int]) -> str:
    lower = word.lower()
    joint = JOINED_BY.get(translation, " ")
    if parts := JOINED.get(translation, {}).get(word):
        return parts.replace("|", joint)
    if translation not in POETRY_JOINED or lower in known or own[word] > 2 or lower in NOT_JOINED:
        return word
    best = (0, 0)
    for cut in range(1, len(word)):
        first, second = lower[:cut], lower[cut:]
        weight = min(known.get(first, 0), known.get(second, 0))
        if weight >= 12 and _are_two_words(first, second, weight, word[0].isupper()):
            best = max(best, (weight, cut))
    cut = best[1]
    return word[:cut] + joint + word[cut:] if cut else word


def _are_two_words(first: str, second: str, weight: int, is_name: bool) -> bool:
    if second in _FUNCTION_WORDS and second not in _SUFFIXES and len(first) > 1:
        return weight >= 20 and not (is_name and len(second) < 3)
    if first in _FUNCTION_WORDS and first not in _PREFIXES and len(second) > 1 and not is_name:
        return weight >= 20
    affix = (first in _PREFIXES and not is_name) or second in _SUFFIXES - {"he", "all", "one", "as", "at"}
    return not affix and min(len(first), len(second)) > 1 and max(len(first), len(second)) > 2


def count_words(texts: Iterable[str]) -> Counter[str]:
    """Count the words (letters only, case-sensitive) in `texts`."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"[A-Za-z]+", text))
    return counts


def without_borrowed(
    verses: Mapping[int, str], donors: Iterable[Mapping[int, str]], known: Mapping[str, int]
) -> dict[int, str]:
    """Drop verses that were copied from another translation (gb).

    In the package, almost half of the Geneva Bible of 1599, which has its own spelling, consists of King James and
    Webster verses. A verse counts as copied if all its words have a known spelling (`known`) and its word set has a
    Jaccard similarity of at least 0.7 to the same verse in one of the `donors`.
    """
    donors = list(donors)

    def is_borrowed(verse_id: int, text: str) -> bool:
        words = set(re.findall(r"[a-z]+", text.lower()))
        if not all(word in known for word in re.findall(r"\b[a-z]+", text)):  # names are spelt in many ways
            return False
        others = (set(re.findall(r"[a-z]+", donor.get(verse_id, "").lower())) for donor in donors)
        return any(10 * len(words & other) >= 7 * len(words | other) for other in others)

    return {verse_id: text for verse_id, text in verses.items() if not is_borrowed(verse_id, text)}


def repair_across(
    bibles: dict[str, dict[int, str]], dropped: dict[str, Counter[str]], repaired: dict[str, int]
) -> None:
    """Apply the rules that compare translations, in place, and count repairs and drops.

    Translations in `VOCABULARY_SOURCES` and donors that are missing from `bibles` are skipped.
    """
    known = count_words(text.lower() for name in VOCABULARY_SOURCES for text in bibles.get(name, {}).values())
    for name in sorted((JOINED.keys() | POETRY_JOINED) & bibles.keys()):
        own = count_words(bibles[name].values())
        split = {v: split_joined_words(text, name, known, own) for v, text in bibles[name].items()}
        repaired[name] += sum(split[v] != text for v, text in bibles[name].items())
        bibles[name] = split
    if "gb" in bibles:
        donors = [bibles[name] for name in ("kjv", "wbs", "rwebster") if name in bibles]
        genuine = without_borrowed(bibles["gb"], donors, known)
        dropped["gb"]["taken from the King James or Webster Bible"] += len(bibles["gb"]) - len(genuine)
        bibles["gb"] = genuine


def quality_scores(bibles: Mapping[str, Mapping[int, str]], repaired: Mapping[str, int]) -> dict[str, float]:
    """Compute each translation's `quality_score`, 0 to 10: 6 points for words, 2 for completeness, 2 for soundness.

    Words: share of word tokens that also occur in another translation with modern spelling (old spelling and OCR errors
    lower it). Completeness: number of verses relative to the King James Version in the same books. Soundness: share of
    verses without word repairs (a verse repaired by two rules counts twice). Empty if there is nothing to compare with.
    """
    vocabulary = {
        name: {word.lower() for word in count_words(bibles[name].values())}
        for name in VOCABULARY_SOURCES
        if name in bibles
    }
    if "kjv" not in bibles or len(vocabulary) < 2:
        return {}
    in_book = Counter(verse_id // 10**6 for verse_id in bibles["kjv"])
    scores = {}
    for name, verses in bibles.items():
        known = set().union(*(words for other, words in vocabulary.items() if other != name))
        counts = count_words(verses.values())
        shared = sum(count for word, count in counts.items() if word.lower() in known) / max(1, counts.total())
        expected = sum(in_book[book] for book in {verse_id // 10**6 for verse_id in verses})
        complete = min(1.0, len(verses) / max(1, expected))
        sound = max(0.0, 1 - repaired[name] / max(1, len(verses)))
        scores[name] = round(6 * shared + 2 * complete + 2 * sound, 1)
    return scores
