"""A training task: tensors copied by name."""

import pytest
import torch

from mvlm_core.training.task import copy_named


def test_copy_named_rejects_tensors_of_another_model():
    target = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    with pytest.raises(ValueError, match="weights do not match the model: bias"):
        copy_named(target, {"weight": torch.ones(2, 2)}, "weights")
    with pytest.raises(ValueError, match="weight has shape"):
        copy_named(target, {"bias": torch.ones(2), "weight": torch.ones(2)}, "weights")
    assert not target["bias"].any(), "nothing is copied before all shapes are checked"
