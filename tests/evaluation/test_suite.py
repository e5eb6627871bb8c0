"""The probes, on real text: known values by hand, and tiny models of which it is known what they can do."""

import importlib.util
import json
import math
import sys

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bible_corpus.grammar import RULES
from mvlm_core.data.corpus import load_corpus
from mvlm_core.data.verses import Verse, followed_by, matched_verses, sample_verses, verses_of
from mvlm_core.evaluation import generation, memorization
from mvlm_core.evaluation.bits_per_byte import bits_per_byte_by_part, context_of, encode, score_documents
from mvlm_core.evaluation.calibration import calibration, calibration_error
from mvlm_core.evaluation.minimal_pairs import Pair, minimal_pairs, pair_accuracy, pair_point
from mvlm_core.evaluation.suite import over_seeds
from mvlm_core.evaluation.suite_table import share
from prioritary_mvlm import AdvancedBPETokenizer
from simone_transformer import EnhancedSIMONEConfig, EnhancedSIMONEModel
from tests.helpers import build_tiny_corpus

CONTEXT, VOCABULARY, KNOWN = 96, 600, 40


def line(text):
    """A verse that is its document's only line."""
    return Verse(text + "\n", 0, len(text), text[:20], None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return load_corpus(build_tiny_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(scope="module")
def tokenizer(real_text):
    return AdvancedBPETokenizer.train(real_text, VOCABULARY).for_transformers(CONTEXT)


def make(tokenizer, name="simone", width=64):
    torch.manual_seed(0)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    if name == "gpt2":
        shape = {"n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **shape, **ids)).eval()
    shape = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}
    return EnhancedSIMONEModel(EnhancedSIMONEConfig(vocab_size=VOCABULARY, **shape, **ids)).eval()


@pytest.fixture(scope="module")
def couples(corpus, tokenizer):
    """Documents of two neighbouring verses each, from the train books of the King James Version; short ones."""
    verses = [v for v in verses_of(d for d in corpus.split("train") if d.translation == "kjv") if v.text[0].isalpha()]
    found = []
    for first, second in zip(verses[::2], verses[1::2], strict=False):
        text = f"{first.text}\n{second.text}\n"
        if len(encode(tokenizer, text)) < CONTEXT - 8 and min(len(v.text.split()) for v in (first, second)) >= 6:
            cut = len(first.text) + 1
            found.append((Verse(text, 0, cut - 1, "first", "kjv"), Verse(text, cut, len(text) - 1, "second", "kjv")))
    return found


@pytest.fixture(scope="module")
def overfitted(tokenizer, couples):
    """A model that has read the first ``KNOWN`` couples again and again, each after the start token."""
    model = make(tokenizer)
    texts = [first.document for first, _ in couples[:KNOWN]]
    rows = [[tokenizer.bos_token_id, *encode(tokenizer, text)] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (length - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    order = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(220):
        batch = torch.randperm(KNOWN, generator=order)[:16]
        model(input_ids=ids[batch], labels=labels[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


# --- verses -------------------------------------------------------------------------------------------------


def test_verses_know_their_place_and_what_stands_before_them(corpus):
    verses = list(verses_of(corpus.split("validation")))
    assert len(verses) == 2 * len({verse.place for verse in verses}), "two translations of the same places"
    sixteenth = next(v for v in verses if v.place == "Ruth 1:16" and v.translation == "kjv")
    assert sixteenth.text.startswith("And Ruth said, Intreat me not to leave thee")
    assert sixteenth.before.endswith("return thou after thy sister in law.\n")
    assert sixteenth.document.startswith(sixteenth.before + sixteenth.text + "\n")
    assert followed_by(sixteenth, 4) == "And Ruth said, Intreat"
    assert followed_by(verses[0], 4) is None, "nothing stands before the first verse"
    assert followed_by(sixteenth, 10**6) is None


def test_a_sample_has_no_place_twice_and_is_the_seeds_own(corpus):
    verses = list(verses_of(corpus.documents))
    places = {verse.place for verse in verses}
    whole = sample_verses(verses, 10**6, 1)
    assert {verse.place for verse in whole} == places and len(whole) == len(places) == len(verses) / 2
    assert 0.35 < sum(v.translation == "kjv" for v in whole) / len(whole) < 0.65
    assert sample_verses(verses, 30, 1) == whole[:30] != sample_verses(verses, 30, 2)


def test_matched_verses_are_of_the_same_translation_and_length(corpus):
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
    three, eight, ten = (line(" ".join(["word"] * words)) for words in (3, 8, 10))
    asked = [line(" ".join(["word"] * words)) for words in (1, 5, 6, 9, 10, 40)]
    assert matched_verses(asked, [ten, three, eight], 0) == [three, three, eight, eight, ten, ten]


# --- continuations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["simone", "gpt2"])
def test_a_batch_says_what_each_prompt_says_alone(name, tokenizer, real_text):
    model = make(tokenizer, name)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)  # fresh weights hardly look back
        model.lm_head.weight[tokenizer.all_special_ids] *= 3  # would win now and then
    prompts = [[tokenizer.bos_token_id, *encode(tokenizer, text)][: 3 + 9 * n] for n, text in enumerate(real_text[:9])]
    lengths = [3, 12, 7, 21, 0, 5, 9, 21, 1]
    said = generation.continuations(model, tokenizer, prompts, lengths, batch_size=4)
    for prompt, length, text in zip(prompts, lengths, said, strict=True):
        ids = list(prompt)
        for _ in range(length):
            with torch.no_grad():
                logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            logits[tokenizer.all_special_ids] = -math.inf
            ids.append(int(logits.argmax()))
        assert text == tokenizer.decode(ids[len(prompt) :])
    with pytest.raises(ValueError, match=f"context of {CONTEXT}"):
        generation.continuations(model, tokenizer, [prompts[0]], [CONTEXT])


def test_sampling_follows_the_seed_and_leaves_other_random_numbers_alone(tokenizer, overfitted):
    prompts = [[tokenizer.bos_token_id]] * 6
    before = torch.random.get_rng_state()
    one, again, other = (
        generation.continuations(overfitted, tokenizer, prompts, [12] * 6, sample=True, seed=seed) for seed in (1, 1, 2)
    )
    assert one == again != other and len(set(one)) > 1
    assert torch.equal(before, torch.random.get_rng_state())


# --- calibration and bits per byte --------------------------------------------------------------------------


def test_calibration_error_of_known_distributions():
    chance = np.random.default_rng(0)
    confidence = chance.uniform(0.02, 1, 200_000)
    calibrated = calibration_error(confidence, chance.uniform(size=200_000) < confidence)
    assert calibrated.error < 0.01 and calibrated.tokens == 200_000
    assert calibration_error([0.9] * 10, [1, 0] * 5).error == pytest.approx(0.4), "over-confident by 0.4"
    mixed = calibration_error([0.95, 0.95, 0.5, 0.5], [1, 0, 1, 1])
    assert (mixed.error, mixed.confidence, mixed.accuracy) == pytest.approx((0.475, 0.725, 0.75))
    # One bin holds (14/15, 1]: gaps of opposite sign cancel in a bin and add up between two.
    assert calibration_error([0.95, 0.99], [0, 1]).error == pytest.approx(0.47)
    assert calibration_error([14 / 15, 0.99], [0, 1]).error == pytest.approx((14 / 15 + 0.01) / 2)
    assert math.isnan(calibration_error([], []).error)


def test_calibration_looks_at_each_token_of_the_verses_in_their_context(corpus, tokenizer, overfitted):
    verses = sample_verses(verses_of(corpus.split("validation")), 12, 3)
    verses += [v for v in verses_of(corpus.split("validation")) if v.begin == 0]
    confidence, correct = [], []
    for verse in verses:
        new = encode(tokenizer, verse.text + "\n")
        ids = [tokenizer.bos_token_id, *encode(tokenizer, verse.before), *new][-CONTEXT - 1 :]
        with torch.no_grad():
            logits = overfitted(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
        count = min(len(new), len(ids) - 1)
        top, answer = logits.softmax(-1)[-count:].max(-1)
        confidence += top.tolist()
        correct += (answer == torch.tensor(ids[-count:])).tolist()
    expected = calibration_error(confidence, correct)
    for size in (1, 5):
        found = calibration(overfitted, tokenizer, verses, batch_size=size)
        assert found.tokens == expected.tokens
        assert (found.error, found.confidence, found.accuracy) == pytest.approx(
            (expected.error, expected.confidence, expected.accuracy), rel=1e-4
        )
    assert expected.confidence > expected.accuracy + 0.1, "an overfitted model is too sure of itself"


def test_parts_make_up_the_whole(corpus, tokenizer, overfitted):
    documents = [d for split in ("validation", "test") for d in corpus.split(split)]
    texts = ((document.path, document.read()) for document in documents)
    start, context = tokenizer.bos_token_id, context_of(overfitted)
    score = score_documents(overfitted, lambda text: encode(tokenizer, text), texts, start_id=start, context=context)
    found = bits_per_byte_by_part(score, documents)
    assert set(found.books) == {"Ruth", "Ecclesiastes"} and set(found.translations) == {"kjv", "plain"}
    for attribute, parts in (("book", found.books), ("translation", found.translations)):
        weighted = sum(parts[getattr(d, attribute)] * d.size for d in documents) / sum(d.size for d in documents)
        assert weighted == pytest.approx(found.all, rel=1e-9)
    assert found.translations["plain"] > found.translations["kjv"], "the one it did not read"


# --- what is known by heart ---------------------------------------------------------------------------------


def test_an_overfitted_model_recalls_what_it_read_and_nothing_else(couples, tokenizer, overfitted):
    known, control = ([first for first, _ in part] for part in (couples[:KNOWN], couples[KNOWN:]))
    train, held_out = (memorization.recall(overfitted, tokenizer, verses) for verses in (known, control))
    assert train.exact.count == KNOWN and held_out.exact.count == len(control) >= 40
    assert train.exact.value > 0.8 and held_out.exact.value < 0.05
    assert train.prefix.value > 0.85 > 0.3 > held_out.prefix.value
    assert held_out.longest.value >= held_out.prefix.value
    difference = train - held_out
    assert difference.exact.value == pytest.approx(train.exact.value - held_out.exact.value)
    assert difference.prefix.error == pytest.approx(math.hypot(train.prefix.error, held_out.prefix.error))
    untrained = memorization.recall(make(tokenizer), tokenizer, known)
    assert untrained.exact.value == 0 and untrained.prefix.value < 0.05


def test_overlap_by_hand():
    wanted = "and the earth was void".split()
    assert memorization.overlap("and the earth was void and".split(), wanted) == (1.0, 1.0, 1.0)
    assert memorization.overlap("and the sea the earth was".split(), wanted) == (0.0, 0.4, 0.6)
    assert memorization.overlap("and the".split(), wanted) == (0.0, 0.4, 0.4)
    assert memorization.overlap([], wanted) == (0.0, 0.0, 0.0)


def test_the_last_word_is_named_with_the_context_it_was_learnt_with(couples, tokenizer, overfitted):
    known, control = couples[:KNOWN], couples[KNOWN:]
    firsts = memorization.cloze(overfitted, tokenizer, [first for first, _ in known])
    assert firsts.full == firsts.alone and firsts.full.value > 0.9, "a first verse has nothing before it"
    seconds = memorization.cloze(overfitted, tokenizer, [second for _, second in known])
    assert seconds.full.value > 0.9 and seconds.full.value > seconds.alone.value + 0.2
    unread = memorization.cloze(overfitted, tokenizer, [second for _, second in control])
    assert unread.full.value < 0.3 and unread.full.count == len(control)


def test_a_named_word_is_the_whole_word():
    assert (
        memorization._says(" God.", " God")
        and memorization._says(" God", " God")
        and memorization._says(" God,\nAnd", " God")
    )
    assert not memorization._says(" Gods.", " God") and not memorization._says(" God's hand", " God")
    assert not memorization._says(" the God", " God") and not memorization._says(" god.", " God")


# --- repetition ---------------------------------------------------------------------------------------------


def test_repetition_by_hand_and_of_real_text(real_text):
    found = generation.diversity(["a b c d a b c d".split(), "e f".split()])
    assert found.rep_4.value == pytest.approx((1 / 5 + 0) / 2)
    assert (found.distinct_2, found.words) == (5 / 8, 5.0)
    repeated = generation.diversity([("In the beginning " * 100).split()])
    assert repeated.rep_4.value > 0.98 and repeated.distinct_2 < 0.02
    real = generation.diversity([text.split()[:64] for text in real_text])
    assert real.rep_4.value < 0.05 and real.distinct_2 > 0.5


def test_the_likeliest_text_repeats_more_than_a_sampled_or_the_real_one(corpus, tokenizer, overfitted):
    verses = sample_verses(verses_of(corpus.split("validation")), 24, 0)
    asked = [verse for verse in verses if followed_by(verse, 24) is not None]
    found = generation.repetition(overfitted, tokenizer, verses, words=24, seed=5)
    assert found.reference == generation.diversity([followed_by(verse, 24).split() for verse in asked])
    assert found.reference.words == 24 and found.greedy.rep_4.count == len(asked) > 15
    assert found.greedy.distinct_2 < found.sampled.distinct_2
    assert found == generation.repetition(overfitted, tokenizer, verses, words=24, seed=5)
    assert found.sampled != generation.repetition(overfitted, tokenizer, verses, words=24, seed=6).sampled
    stuck = make(tokenizer)
    with torch.no_grad():
        stuck.lm_head.weight.zero_()  # all tokens alike: the likeliest one is always the first
    assert generation.repetition(stuck, tokenizer, verses, words=24).greedy.words < 2


# --- minimal pairs ------------------------------------------------------------------------------------------


def test_pairs_of_known_verses():
    verses = [
        "And she said unto her, All that thou sayest unto me I will do: for thou art a virtuous woman.",
        "And they said unto him, These things hath he done, and he hath no rest this day.",
        "Ye are the salt of the earth: and we have seen it.",
        "They that dwell in Shethou art said that he is of himself.",
    ]
    pairs = minimal_pairs([line(text) for text in [*verses, verses[0]]], RULES)
    changes = {}
    for pair in pairs:
        good, bad = pair.good.split(), pair.bad.split()
        (place,) = [n for n, (a, b) in enumerate(zip(good, bad, strict=True)) if a != b]
        changes.setdefault(pair.rule, set()).add((verses.index(pair.good), good[place], bad[place]))
    assert changes == {
        "verb after thou": {(0, "art", "is")},
        "verb after he, she, it": {(1, "hath", "hast"), (3, "is", "art")},
        "verb after they, ye, we": {(2, "are", "is")},
        "pronoun after a preposition": {(0, "me", "I"), (1, "him,", "he,")},
        "pronoun as subject": {(1, "they", "them"), (2, "we", "us")},
        "noun after these, those": {(1, "things", "thing")},
        "this before a singular noun": {(1, "this", "these")},
    }


def test_every_rule_finds_pairs_in_the_corpus_and_keeps_to_its_number(corpus):
    verses = list(verses_of(corpus.documents))
    pairs = minimal_pairs(verses, RULES, per_rule=15, seed=1)
    counts = {rule.name: sum(pair.rule == rule.name for pair in pairs) for rule in RULES}
    assert all(3 <= count <= 15 for count in counts.values()) and counts["verb after he, she, it"] == 15
    assert (
        pairs == minimal_pairs(verses, RULES, per_rule=15, seed=1) != minimal_pairs(verses, RULES, per_rule=15, seed=2)
    )
    assert len({(pair.rule, pair.good) for pair in pairs}) == len(pairs)


def test_a_tie_is_half_a_point():
    assert [pair_point(10.0, 11.0), pair_point(11.0, 10.0), pair_point(10.0, 10.0)] == [1.0, 0.0, 0.5]
    assert pair_point(10.0, 10.000001) == 0.5 and pair_point(10.0, 10.001) == 1.0


def test_a_model_prefers_the_verses_it_read(couples, tokenizer, overfitted):
    pairs = [
        Pair("all", p.good, p.bad)
        for p in minimal_pairs([verse for couple in couples[:KNOWN] for verse in couple], RULES)
    ]
    assert len(pairs) >= 20
    turned = [Pair("turned", pair.bad, pair.good) for pair in pairs]
    ties = [Pair("ties", pair.good, pair.good) for pair in pairs]
    few = [Pair("few", pair.good, pair.bad) for pair in pairs[:19]]
    found = pair_accuracy(overfitted, tokenizer, [*pairs, *turned, *ties, *few])
    assert set(found) == {"all", "turned", "ties"}, "fewer than 20 pairs say nothing"
    assert found["all"].value > 0.95 and found["all"].count == len(pairs)
    assert found["turned"].value == pytest.approx(1 - found["all"].value)
    assert (found["ties"].value, found["ties"].error) == (0.5, 0.0)


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def command(repository, corpus, monkeypatch):
    """``evaluate_models.py``, few questions: a function of the folders and more arguments."""
    spec = importlib.util.spec_from_file_location("text_probes_command", repository / "evaluate_models.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def run(*arguments):
        sizes = ["--verses", "12", "--prompts", "4", "--words", "10", "--pairs", "25"]
        given = [*map(str, arguments), *sizes, "--data_dir", str(corpus.root)]
        monkeypatch.setattr(sys, "argv", ["evaluate_models.py", *given])
        return module.main()

    return run


def export(tokenizer, folder, width):
    make(tokenizer, "gpt2", width).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def table_in(printed):
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in printed.splitlines() if row.startswith("|")]


def test_the_command_prints_one_table_for_all_models(command, tokenizer, tmp_path, capsys):
    for name, width in (("narrow", 16), ("wide", 32)):
        export(tokenizer, tmp_path / name, width)
    arguments = [tmp_path / "narrow", tmp_path / "wide", "--json", tmp_path / "out.json"]
    command(*arguments)
    printed = capsys.readouterr().out
    table = table_in(printed)
    assert table[0] == ["validation", "text", "narrow", "wide"] and {len(row) for row in table} == {4}
    labels = [row[0] for row in table]
    assert {"bits per byte", "· Ruth", "· kjv", "· plain", "calibration error (ECE)", "rep-4, sampled"} <= set(labels)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    narrow = results[str(tmp_path / "narrow")]
    assert f"{narrow['bits_per_byte']['all']:.4f}" == table[labels.index("bits per byte")][2]
    assert narrow["recall_train"]["exact"]["count"] == narrow["cloze"]["full"]["count"] == 12
    assert printed.count("was trained on another corpus") == 2, "no record of training is there"
    command(*arguments)
    again = capsys.readouterr()
    assert "narrow:" not in again.err and table_in(again.out) == table, "nothing is measured twice"
    make(tokenizer, "gpt2", 48).save_pretrained(tmp_path / "wide")
    command(*arguments)
    assert "wide:" in (third := capsys.readouterr()).err and "narrow:" not in third.err


def test_a_folder_of_seeds_is_one_column_their_mean(command, tokenizer, tmp_path, capsys):
    for seed, width in enumerate((16, 24, 32)):
        export(tokenizer, tmp_path / "line" / f"seed{seed}", width)
    command(tmp_path / "line", tmp_path / "line" / "seed0", "--no_bits_per_byte", "--json", tmp_path / "out.json")
    table = table_in(capsys.readouterr().out)
    assert table[0] == ["validation", "text", "line", "seed0"]
    results = [
        json.loads((tmp_path / "out.json").read_text())["results"][str(tmp_path / "line" / f"seed{n}")]
        for n in range(3)
    ]
    rows = {row[0]: row[2] for row in table}
    errors = [result["calibration"]["error"] for result in results]
    assert rows["calibration error (ECE)"] == f"{sum(errors) / 3:.2%}" and len(set(errors)) == 3
    values = [result["memorised"]["longest"]["value"] for result in results]
    spread = np.std(values, ddof=1) / 3**0.5
    assert rows["· memorised (difference)"] == f"{np.mean(values):+.1%} ± {spread:.1%}" and spread > 0
    text = next(row[1] for row in table if row[0] == "rep-4, greedy")
    assert "±" in text and text == share(results[0]["repetition"]["reference"]["rep_4"]), "the text is one, not three"


def test_what_one_seed_could_not_be_asked_has_no_mean():
    known, unknown = {"value": 0.5, "error": 0.1, "count": 4}, {"value": None, "error": None, "count": 0}
    assert over_seeds([{"a": known}, {"a": unknown}]) == {"a": {"value": None, "error": None, "count": 4}}
    assert over_seeds([{"a": known}]) == {"a": known}
    assert over_seeds([{"b": 0.5}, {"b": None}]) == over_seeds([{"b": None}, {"b": 0.5}]) == {"b": None}
    assert over_seeds([{"b": 0.5}, {"b": 0.25}]) == {"b": 0.375}


def test_memorisation_asks_for_train_verses_beside_held_out_ones_as_long(corpus, tokenizer, monkeypatch):
    from mvlm_core.evaluation import suite as text_probe_run

    asked, recall = [], memorization.recall
    monkeypatch.setattr(memorization, "recall", lambda *given: asked.append(given[2]) or recall(*given))
    found = text_probe_run.memorisation(make(tokenizer), tokenizer, corpus, verses=20)
    texts = {
        split: {d.read() for d in corpus.split(split) if d.translation == "kjv"} for split in ("train", "validation")
    }
    known, control = asked
    assert {v.document for v in known} <= texts["train"] and {v.document for v in control} <= texts["validation"]
    lengths = [sum(len(v.text.split()) for v in verses) for verses in asked]
    assert len(known) == len(control) == 20 and lengths[0] == pytest.approx(lengths[1], rel=0.05)
    assert list(found) == ["train", "held_out"] and found["train"]["exact"]["value"] == 0.0
