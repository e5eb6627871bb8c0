"""The cleaning rules on faulty verses of the real packages, each with its expected text."""

from __future__ import annotations

from collections import Counter

import pytest

from bible_corpus import cleaning, repairs

# (translation, verse id, text in the package, expected text)
# fmt: off
VERSES = [
    ("kjv", 1001002, " And the earth was without form; and darkness [was] upon the face of the deep. ",
     "And the earth was without form; and darkness was upon the face of the deep."),
    ("kjv", 40009006,
     " power on earth to forgive sins,( then saith he\n", "power on earth to forgive sins, (then saith he"),
    ("asv", 19059005, "to any wicked transgressors.[Selah", "to any wicked transgressors. Selah."),
    ("dar", 19021001, "{To the chief Musician. [A Psalm] of David.} The king",
     "To the chief Musician. A Psalm of David. The king"),
    ("dar", 19033009, " For *he* spoke, and it was [done];", "For he spoke, and it was done;"),
    ("dr", 5007011, ",11 Keep therefore the precepts", "Keep therefore the precepts"),
    ("dr", 1049011, " his ass, 0 my son, to the vine.", "his ass, O my son, to the vine."),
    ("dr", 24003025, " to the voice of theLord our God.", "to the voice of the Lord our God."),
    ("dr", 1018014, " child indeed ? ", "child indeed?"),
    ("dr", 7002024, "dummy verses inserted by amos", ""),
    ("etheridge", 48002006, " accepteth not men?s faces,---they", "accepteth not men's faces,—they"),
    ("gb", 40001001, "{\\cf2 (13:2)} And vncles & aunts [were] there: for she[is] loud",
     "And vncles and aunts were there: for she is loud"),
    ("gb", 19119001, "«A Song of degrees.» In my trouble", "A Song of degrees. In my trouble"),
    ("gb", 27003023, " fell downe bound. (3:24) And they walked (3:25) in the flame", "fell downe bound."),
    ("leeser", 2011005, " the first\x96born of the maid\x96servant, the ram\x92s \x91Ai;and Lord\x96\x96he",
     "the first-born of the maid-servant, the ram’s ‘Ai; and Lord—he"),
    ("lont", 40004004, "«Jesus answered, It is written,'Man lives not by bread.'»",
     "Jesus answered, It is written, 'Man lives not by bread.'"),
    ("mont", 42007032,
     "sitting in the market-  place; Johnthe Baptist", "sitting in the market-place; John the Baptist"),
    ("mont", 40007029, " missing fehlt/missing ", ""),
    ("nheb", 1004023, 'his wives,"Adah and Zillah,hear my voice.You wives of Lamech',
     'his wives, "Adah and Zillah, hear my voice. You wives of Lamech'),
    ("nheb", 23041021,
     ' Produce your cause," says the Lord."Bring forth', 'Produce your cause," says the Lord. "Bring forth'),
    ("nheb", 19112008, "he will not be afraidAYINuntil he gaze.PEY", "he will not be afraid until he gaze."),
    ("nheb", 19009001, "A Psalm by David.ALEPHI will give thanks", "A Psalm by David. I will give thanks"),
    ("oeb", 40002006, " shepherd my people.’” [crosswire  amateurish codings versifikation may be wrong here ]",
     "shepherd my people.’”"),
    ("oeb", 19014001,
     " say in their heart,“There is no God.”Vile, hateful",
     "say in their heart, “There is no God.” Vile, hateful"),
    ("roth", 1001003, " And God saidLight, be, And light was. ", "And God said—Light, be, And light was."),
    ("roth", 1011009, " of all the earth. \\fs15 ", "of all the earth."),
    ("roth", 22003005, " until she please.  **** THEY  Who is", "until she please. Who is"),
    ("rwebster", 61001006, " And to knowledge self–control;", "And to knowledge self-control;"),
    ("tyn", 1005005, " he lyved were .ix. hundred and .xxx. yere", "he lyved were ix hundred and xxx yere"),
    ("ukjv", 42004001, " full of the Spirit (o. pneuma) returned", "full of the Spirit returned"),
    ("wbs", 2032011, " with [] mighty hand?+ ", "with mighty hand?"),
    ("web", 19003008, "    Your blessing be on your people. Selah.      Psalm 4  For the Chief Musician.",
     "Your blessing be on your people. Selah."),
    ("web", 1029009,
     " with her father`s sheep, for she kept [them].", "with her father's sheep, for she kept them."),
    ("wesley", 42020022, " give tribute to C?sar, or no?", "give tribute to Cæsar, or no?"),
    ("wmth", 43018031,
     " by your Law.«»We have no power,« replied –he", "by your Law.” “We have no power,” replied—he"),
    ("wmth", 40003003,
     "»The voice, `In the desert' prepare God's road", "“The voice, ‘In the desert’ prepare God’s road"),
    ("wyc", 10024009,
     " nyne hundryd [Note: in I. book.] thousynd `that  fouyten", "nyne hundryd thousynd that fouyten"),
    ("ylt", 11011005,
     " Ashtoreth god[dess] of the  Zidonians, `Lo,` she [is]", "Ashtoreth goddess of the Zidonians, 'Lo,' she is"),
]
# fmt: on


@pytest.mark.parametrize(("translation", "verse_id", "source", "right"), VERSES)
def test_faulty_verses_are_cleaned_to_the_expected_text(translation, verse_id, source, right):
    assert cleaning.clean_verse(translation, verse_id, source) == right
    assert cleaning.faults(right) == []


def test_every_translation_with_its_own_rules_has_test_verses():
    own_rules = {name for name, steps in cleaning.CLEANERS.items() if steps}
    assert own_rules == {name for name, *_ in VERSES}


@pytest.mark.parametrize(
    "bad", ["a [b]", "a {b}", "a`s", "« a", "a\x92s", "a\xa0b", "a  b", " a", "a ,b", "a*", "a\\b", "e\u0301"]
)
def test_faults_are_found(bad):
    assert cleaning.faults(bad)


def test_cp1252_control_characters_become_the_intended_punctuation():
    assert cleaning.tidy("\x93a\x94 \x96 b\x97c\x85 d\xad\xa0e") == "“a” – b—c... d e"


def test_verses_are_split_at_their_marks_not_at_index_offsets():
    markup = (
        "<p><sup>1</sup> In the beginning. <sup>2</sup> And the earth.</p><p><sup>1</sup> Thus <sup>1</sup> again</p>"
    )
    verses, unnumbered = cleaning.split_verses(markup, [1001001, 1001002, 1002001])
    assert {v: t.strip() for v, t in verses.items()} == {
        1001001: "In the beginning.", 1001002: "And the earth.", 1002001: "Thus",
    }  # fmt: skip
    assert unnumbered == [1002001]
    with pytest.raises(ValueError, match="4 verse ids but only 3"):
        cleaning.split_verses(markup, [1001001, 1001002, 1002001, 1002002])


def test_english_verse_numbers_in_the_text_renumber_verses():
    verses = {1042038: "Last.", 1042039: "\\43:1\\And the famine", 19003001: "+ A Psalm.", 19003002: "\\3:1\\LORD, how"}
    renumbered = cleaning.renumber(verses)
    assert list(renumbered) == [1042038, 1043001, 19003001]
    assert renumbered[19003001].split() == ["+", "A", "Psalm.", "LORD,", "how"]


def test_dropped_and_repaired_verses_are_counted():
    verses = {1001001: "[] ", 1001002: "it`s [us]", 1001003: "\u2020 x", 1001004: "bless you. Psalm 4 A Psalm."}
    cleaned, dropped, repaired = cleaning.clean_verses("web", verses)
    assert cleaned == {1001002: "it's us", 1001004: "bless you."}
    assert dropped == Counter({"empty in the source": 1, "not clean: character '†'": 1})
    assert repaired == 1
    assert cleaning.clean_verses("dr", {17010003: "For", 17010004: "Then", 27003024: "And", 67001001: "T"})[
        1
    ] == Counter({"outside the 66 books": 3})


def test_joined_words_are_split_and_real_words_are_kept():
    known = Counter(
        {
            "temple": 50,
            "may": 90,
            "dust": 40,
            "over": 90,
            "look": 60,
            "and": 900,
            "lord": 99,
            "trees": 30,
            "planted": 20,
        }
    )
    known["house"] = known["wife"] = 50

    def part(text: str, translation: str = "oeb") -> str:
        return repairs.split_joined_words(text, translation, known, Counter(text.split()))

    assert part("your templemay stand") == "your temple may stand"
    assert part("the Lordand all") == "the Lord and all"
    assert part("treesplanted", "roth") == "trees—planted"
    assert part("templemay", "kjv") == "templemay"
    assert part("overlook housewife temple") == "overlook housewife temple"
    assert part("templemay templemay templemay") == "templemay templemay templemay"
    assert part("eveningand dryground", "roth") == "evening—and dry-ground"


def test_verses_borrowed_from_another_translation_are_removed():
    king_james = {1001002: "And the earth was without form, and void", 1001003: "And God said, Let there be light"}
    known = Counter("and the earth was without form void said let there be light".split())
    geneva = {1001002: "And the earth was without form, and void", 1001003: "Then God saide, Let there be light"}
    assert repairs.without_borrowed(geneva, [king_james], known) == {1001003: geneva[1001003]}


def test_quality_falls_with_old_spelling_gaps_and_repairs():
    text = {1001000 + i: "In the beginning God created the heaven" for i in range(1, 11)}
    old = {v: "In the bigynnyng God made of nouyt heuene" for v in text}
    bibles = {"kjv": text, "asv": dict(text), "wyc": old, "gb": dict(list(text.items())[:5])}
    scores = repairs.quality_scores(bibles, {"kjv": 0, "asv": 5, "wyc": 0, "gb": 0})
    assert scores["kjv"] == 10.0
    assert scores["asv"] == 9.0
    assert scores["gb"] == 9.0
    assert 6.0 < scores["wyc"] < 8.0
