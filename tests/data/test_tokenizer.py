"""Both tokenizers: exact round trips of any text, special tokens only as ids, frequent words as single tokens."""

import multiprocessing
import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mvlm_trainer
from mvlm_core.data.corpus import load_corpus
from mvlm_core.data.token_store import alignment_weights, build_token_store, token_folder
from mvlm_core.data.tokenizer import ByteLevelBPE, cached_tokenizer
from mvlm_core.errors import UserError
from prioritary_mvlm import AdvancedBPETokenizer, BiblicalBPETokenizer
from tests.helpers import cases

ODD = [
    "",
    " ",
    "\n\n\n",
    "a  b\t\r\n",
    "<eos> <bos><|endoftext|><pad>",
    "\u2018Selah\u2019",
    "é\u0301 🕊️ \x00\x7f",
    "ﬁ Å",
]
KINDS = {"simone": AdvancedBPETokenizer, "gpt2": mvlm_trainer.tokenizer_class()}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, real_text) -> ByteLevelBPE:
    return KINDS[request.param].train(real_text, 1000)


def test_biblical_tokenizer_is_an_alias_of_the_advanced_tokenizer():
    assert BiblicalBPETokenizer is AdvancedBPETokenizer


def test_vocabulary_has_the_requested_size(tokenizer):
    assert tokenizer.vocab_size == 1000
    special = {tokenizer.start_id} | {tokenizer.token_id(role) for role in tokenizer.SPECIAL_TOKENS}
    assert special == ({999} if tokenizer.end_id is None else {0, 1, 2, 3})


@pytest.mark.parametrize("text", ODD)
def test_unusual_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@cases(200)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert sum(tokenizer.token_bytes()[ids]) == len(text.encode())


def test_special_token_text_is_encoded_as_ordinary_text(tokenizer, real_text):
    special = {tokenizer.token_id(role) for role in tokenizer.SPECIAL_TOKENS}
    for text in tokenizer.SPECIAL_TOKENS.values():
        assert special.isdisjoint(tokenizer.encode(f"and {text} said"))
    assert tokenizer.decode([tokenizer.start_id, *tokenizer.encode("Amen.")]) == "Amen."
    assert tokenizer.token_bytes()[tokenizer.start_id] == 0


def test_save_and_load_round_trip(tokenizer, real_text, tmp_path):
    tokenizer.save(tmp_path)
    again = type(tokenizer).load(tmp_path)
    assert again.sha256 == tokenizer.sha256
    assert again.encode_batch(real_text) == [tokenizer.encode(text) for text in real_text]


def test_exported_transformers_tokenizer_encodes_identically(tokenizer, real_text, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    exported = tokenizer.for_transformers(64)
    assert isinstance(exported, PreTrainedTokenizerFast)
    exported.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*real_text[:5], *ODD[1:]]:
        ids = loaded(text, add_special_tokens=False, verbose=False).input_ids
        assert ids == tokenizer.encode(text)
        assert loaded.decode(ids) == text
    assert loaded.bos_token_id == tokenizer.start_id
    assert type(tokenizer).load(tmp_path).sha256 == tokenizer.sha256, (
        "a run with --tokenizer_path has the same tokenizer"
    )


def test_invalid_tokenizers_are_rejected_with_a_reason(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="not a readable tokenizer"):
        AdvancedBPETokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no tokenizer at"):
        AdvancedBPETokenizer.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="too small"):
        AdvancedBPETokenizer.train(["text"], 100)


def test_a_tokenizer_of_the_other_model_is_refused(real_text, tmp_path):
    KINDS["gpt2"].train(real_text, 600).save(tmp_path)
    with pytest.raises(UserError, match="lacks the special tokens <pad>"):
        AdvancedBPETokenizer.load(tmp_path)


@pytest.mark.parametrize("word", ["Jerusalem", "righteousness", "covenant"])
def test_frequent_words_of_scripture_are_single_tokens(biblical_32k, word):
    assert len(biblical_32k.encode(f" {word}")) == 1
    assert len(biblical_32k.encode(f"the {word} of")) == 3


@pytest.fixture(scope="module")
def biblical_32k(repository, tmp_path_factory):
    data = repository / "mvlm_training_dataset_complete"
    if not (data / "bible" / "kjv").is_dir():
        pytest.skip("the corpus is not built: run prepare_dataset.py")
    corpus = load_corpus(data, only="bible/kjv")
    return AdvancedBPETokenizer.train(document.read() for document in corpus.split("train"))


def test_token_store_holds_the_documents_and_is_reused_until_they_change(tiny_corpus, tmp_path):
    corpus = load_corpus(tiny_corpus)
    train = corpus.split("train")
    pieces = (document.read() for document in train)
    tokenizer = cached_tokenizer(AdvancedBPETokenizer, pieces, corpus.fingerprint, 700, tmp_path, quiet=True)
    store = build_token_store(corpus, tokenizer, tmp_path, quiet=True)
    assert len(store.starts) == len(train) + 1 and store.text_bytes == sum(document.size for document in train)
    for number, document in enumerate(train):
        ids = store.tokens[store.starts[number] : store.starts[number + 1]].tolist()
        assert (ids[0], ids[-1]) == (tokenizer.start_id, tokenizer.end_id)
        assert tokenizer.decode(ids) == document.read()
    assert store.token_bytes[store.tokens].sum() == store.text_bytes
    file = token_folder(corpus, tokenizer, tmp_path) / "tokens.bin"
    made = file.stat().st_mtime_ns
    build_token_store(corpus, tokenizer, tmp_path, quiet=True)
    assert file.stat().st_mtime_ns == made

    changed = train[0].file
    changed.write_text(changed.read_text().replace("God", "god", 1))
    build_token_store(load_corpus(tiny_corpus), tokenizer, tmp_path, quiet=True)
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_a_damaged_cached_tokenizer_is_trained_again(tiny_corpus, tmp_path, caplog):
    corpus = load_corpus(tiny_corpus)

    def tokenizer():
        pieces = (document.read() for document in corpus.split("train"))
        return cached_tokenizer(AdvancedBPETokenizer, pieces, corpus.fingerprint, 700, tmp_path, quiet=True)

    expected = tokenizer().sha256
    (file,) = tmp_path.rglob("tokenizer.json")
    file.write_bytes(file.read_bytes()[:-100])
    assert tokenizer().sha256 == expected and "training it again" in caplog.text
    assert AdvancedBPETokenizer.load(file).sha256 == expected


def test_temporary_folders_of_killed_runs_are_deleted(tiny_corpus, tmp_path):
    corpus = load_corpus(tiny_corpus)
    pieces = (document.read() for document in corpus.split("train"))
    tokenizer = cached_tokenizer(AdvancedBPETokenizer, pieces, corpus.fingerprint, 700, tmp_path, quiet=True)

    def killed():
        tokenizer.encode_batch = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        build_token_store(corpus, tokenizer, tmp_path, quiet=True)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(list((tmp_path / "tokens").iterdir())) == 1
    build_token_store(corpus, tokenizer, tmp_path, quiet=True)
    assert list((tmp_path / "tokens").iterdir()) == [token_folder(corpus, tokenizer, tmp_path)]


def test_concurrent_runs_do_not_replace_each_others_token_store(tiny_corpus, tmp_path):
    """Two runs tokenize the same new text at once: the slower must not replace the files that the faster reads."""
    corpus = load_corpus(tiny_corpus)
    pieces = (document.read() for document in corpus.split("train"))
    tokenizer = cached_tokenizer(AdvancedBPETokenizer, pieces, corpus.fingerprint, 700, tmp_path, quiet=True)
    faster, file = [], token_folder(corpus, tokenizer, tmp_path) / "tokens.bin"
    encode_batch = tokenizer.encode_batch

    class Slower:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode_batch(self, texts):
            if not faster:
                faster.append(build_token_store(corpus, tokenizer, tmp_path, quiet=True))
                faster.append(os.stat(file).st_ino)
            return encode_batch(texts)

    slower = build_token_store(corpus, Slower(), tmp_path, quiet=True)
    assert os.stat(file).st_ino == faster[1]
    assert (slower.tokens == faster[0].tokens).all()
    assert list((tmp_path / "tokens").iterdir()) == [file.parent], "nothing is left over"


def test_alignment_weights_have_mean_one_over_the_tokens(tiny_corpus):
    import numpy as np

    documents = load_corpus(tiny_corpus).split("train")
    lengths = np.array([document.size for document in documents])
    weights = alignment_weights(documents, lengths)
    assert (weights * lengths).sum() / lengths.sum() == pytest.approx(1)
    by_translation = {document.translation: weight for document, weight in zip(documents, weights, strict=True)}
    assert by_translation["plain"] / by_translation["kjv"] == pytest.approx(0.8)
