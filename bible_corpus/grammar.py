"""Rules of King James grammar for minimal pairs: "thou hast", not "thou hath".

Most wrong forms of one rule are correct forms in another, so a model cannot pass by preferring the more frequent word.
"""

from __future__ import annotations

from mvlm_core.evaluation.minimal_pairs import Rule


def _rule(name: str, before: str, wrong: dict[str, str], after: str = "") -> Rule:
    return Rule(name, rf"\b{before}(?P<form>{'|'.join(wrong)})\b{after}", wrong)


_SAID = "said|saw|went|came|took|made|gave|spake|answered|shall|will|have|hath|had|was|were|are|am|is"
_PLURALS = {"things": "thing", "days": "day", "words": "word", "men": "man", "nations": "nation", "sons": "son"}
_SINGULARS = "thing|day|man|woman|word|city|place|house|book|wisdom|cause|generation|night|wind|evil"
_THOU = {"hast": "hath", "hadst": "had", "art": "is", "wast": "was", "dost": "doth", "wilt": "will", "shalt": "shall"}
_HE = {"hath": "hast", "has": "hast", "is": "art", "was": "wast", "doth": "dost", "shall": "shalt", "will": "wilt"}
RULES = (
    _rule("verb after thou", "[Tt]hou ", _THOU),
    _rule("verb after he, she, it", "(?:[Hh]e|[Ss]he|[Ii]t) ", _HE),
    _rule(
        "verb after they, ye, we",
        "(?:[Tt]hey|[Yy]e|[Ww]e) ",
        {"are": "is", "have": "hath", "were": "was", "shall": "shalt", "will": "wilt"},
    ),
    _rule(
        "pronoun after a preposition",
        "(?:[Uu]nto|[Tt]o|[Ww]ith|[Ff]rom|[Uu]pon|[Aa]gainst|[Oo]f) ",
        {"him": "he", "them": "they", "me": "I", "us": "we"},
    ),
    _rule(
        "pronoun as subject", "[Aa]nd ", {"he": "him", "they": "them", "I": "me", "we": "us"}, f"(?= (?:{_SAID})\\b)"
    ),
    _rule("noun after these, those", "(?:[Tt]hese|[Tt]hose) ", _PLURALS),
    _rule("this before a singular noun", "", {"this": "these", "This": "These"}, f"(?= (?:{_SINGULARS})\\b)"),
)
