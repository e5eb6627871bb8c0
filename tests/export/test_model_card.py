"""The model card: valid metadata and the results of the run."""

import json

import pytest

from mvlm_core.export.manifest import training_config
from mvlm_core.export.model_card import model_card
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
    results = json.loads((folder / "training_config.json").read_text())["results"]
    for key in ("validation_bpb", "test_bpb", "test_bpb_kjv"):
        assert f"{results[key]:.4f}" in card.text
    assert f"| {results['parameters']:,} |" in card.text
    recalled = results["memorization"]
    for part in ("train", "held_out"):
        exact = recalled[part]["exact"]
        assert 0 <= exact["value"] <= 1 and exact["count"] > 0 and f"of {exact['count']} |" in card.text


def test_unmeasured_scores_are_shown_as_a_dash(trained):
    config = training_config(trained / "mvlm_gpt2")
    config["results"] |= {"test_bpb": None, "test_bpb_kjv": None, "test_bpb_by_translation": {}}
    card = model_card(config, title="T", description="D", sources="S", remote_code=False)
    assert "| test, bits per byte | - |" in card
    assert "tags: [small-language-model, mvlm-gpt2]" in card, "not a model of the Bible"
