"""Verses of the tiny corpus: their context, samples and matches."""

from mvlm_core.data.verses import matched_verses, next_words, sample_verses, verses_of
from tests.evaluation import verse_of


def test_verses_have_their_place_and_preceding_text(corpus):
    verses = list(verses_of(corpus.split("validation")))
    assert len(verses) == 2 * len({verse.reference for verse in verses}), "two translations of the same verses"
    sixteenth = next(v for v in verses if v.reference == "Ruth 1:16" and v.translation == "kjv")
    assert sixteenth.text.startswith("And Ruth said, Intreat me not to leave thee")
    assert sixteenth.before.endswith("return thou after thy sister in law.\n")
    assert sixteenth.document.startswith(sixteenth.before + sixteenth.text + "\n")
    ruth = [v for v in verses if v.document == sixteenth.document]
    assert [v.next_begin for v in ruth] == [*(v.begin for v in ruth[1:]), len(sixteenth.document)]
    assert next_words(sixteenth, 4) == "And Ruth said, Intreat"
    assert next_words(verses[0], 4) is None, "there is no text before the first verse"
    assert next_words(sixteenth, 10**6) is None
    long = list(verses_of(corpus.split("validation"), 20))
    assert long == [verse for verse in verses if len(verse.text.split()) >= 20] and 0 < len(long) < len(verses)


def test_samples_have_no_duplicate_places_and_depend_on_the_seed(corpus):
    verses = list(verses_of(corpus.documents))
    references = {verse.reference for verse in verses}
    whole = sample_verses(verses, 10**6, 1)
    assert {verse.reference for verse in whole} == references and len(whole) == len(references) == len(verses) / 2
    assert 0.35 < sum(v.translation == "kjv" for v in whole) / len(whole) < 0.65
    assert sample_verses(verses, 30, 1) == whole[:30] != sample_verses(verses, 30, 2)


def test_matched_verses_have_the_same_translation_and_nearest_length(corpus):
    control = sample_verses(verses_of(corpus.split("validation")), 50, 0)
    pool = list(verses_of(corpus.split("train")))
    found = matched_verses(control, pool, 0)
    assert [v.translation for v in found] == [v.translation for v in control]
    lengths = {t: {len(v.text.split()) for v in pool if v.translation == t} for t in ("kjv", "plain")}
    for ours, theirs in zip(control, found, strict=True):
        words = len(ours.text.split())
        nearest = min(abs(words - n) for n in lengths[ours.translation])
        assert abs(words - len(theirs.text.split())) == nearest
    assert pool[-1].translation == "plain"
    assert matched_verses([v for v in control if v.translation == "kjv"], pool[-1:], 0) == []
    three, eight, ten = (verse_of(" ".join(["word"] * words)) for words in (3, 8, 10))
    verses = [verse_of(" ".join(["word"] * words)) for words in (1, 5, 6, 9, 10, 40)]
    assert matched_verses(verses, [ten, three, eight], 0) == [three, three, eight, eight, ten, ten]
