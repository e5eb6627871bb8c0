"""The model card: valid metadata and the results of the run."""

import json
from types import SimpleNamespace

import pytest

from mvlm_core.data.corpus import load_corpus
from mvlm_core.export.manifest import training_config
from mvlm_core.export.model_card import model_card
from mvlm_core.training.results import licenses_of
from tests.helpers import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_model_card_has_valid_metadata_and_the_runs_results(trained, name):
    from huggingface_hub import ModelCard

    folder = trained / name
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert (data["language"], data["license"], data["library_name"]) == ("en", "mit", "transformers")
    assert data["pipeline_tag"] == "text-generation" and "bible" in data["tags"]
    assert name.replace("_", "-") in data["tags"] and ("trust_remote_code" in card.text) == (name == "simone_enhanced")
    config = json.loads((folder / "training_config.json").read_text())
    assert f"checked with transformers {config['software']['transformers']}." in card.text
    results = config["results"]
    for key in ("validation_bpb", "test_bpb", "test_bpb_kjv"):
        assert f"{results[key]:.4f}" in card.text
    assert f"| {results['parameters']:,} |" in card.text
    assert "from scratch on English Bible translations in the public domain." in card.text
    recalled = results["memorization"]
    assert f"training verses (expected share seen in training: {recalled['read']:.1%}) |" in card.text
    for part in ("train", "held_out"):
        exact = recalled[part]["exact"]
        assert 0 <= exact["value"] <= 1 and exact["count"] > 0 and f"of {exact['count']} |" in card.text


def test_unmeasured_scores_are_shown_as_a_dash(trained):
    config = training_config(trained / "mvlm_gpt2")
    config["results"] |= {"test_bpb": None, "test_bpb_kjv": None, "test_bpb_by_translation": {}}
    card = model_card(config, title="T", description="D", sources="S", licenses=None, remote_code=False)
    assert "| test, bits per byte | - |" in card
    assert "tags: [small-language-model, mvlm-gpt2]" in card, "not a model of the Bible"


def test_other_texts_keep_their_licences_and_are_not_called_bibles(trained, tiny_corpus):
    from huggingface_hub import ModelCard

    license = """CC-BY-NC 4.0: "nur mit Namen", ü 🕊"""
    for name, metadata in (("own", {"license": license}), ("more", {"license": ["MIT"]}), ("third", {})):
        (tiny_corpus / f"{name}.txt").write_text(f"Ein Text namens {name}.\n")
        (tiny_corpus / f"{name}.json").write_text(json.dumps({"split": "train"} | metadata))
    corpus = load_corpus(tiny_corpus)
    licenses = licenses_of(SimpleNamespace(base=None, old=None, corpus=corpus))
    assert licenses == f"{license}; Public domain; ['MIT']; not recorded"
    bible = load_corpus(tiny_corpus, only="bible")
    fine_tuned = licenses_of(SimpleNamespace(base=SimpleNamespace(), old=SimpleNamespace(corpus=corpus), corpus=bible))
    assert fine_tuned == f"{licenses}; those of the model it was fine-tuned from"
    assert licenses_of(SimpleNamespace(base=None, old=None, corpus=bible)) is None

    config = training_config(trained / "mvlm_gpt2")
    card = ModelCard(model_card(config, title="T", description="D", sources="S", licenses=licenses, remote_code=False))
    data = card.data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", licenses) and "language" not in data
    assert "D, trained on the texts described under Data." in card.text and "English Bible" not in card.text
