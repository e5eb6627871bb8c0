"""Finished tiny runs that the tests of the experiments share."""

from pathlib import Path

import pytest

from benchmarks.experiments.runner import Run
from tests.helpers import MODELS, TINY


@pytest.fixture(scope="session")
def finished(trained: Path) -> dict[str, Run]:
    """A tiny run of each model as an experiment finds it once it is finished; to be read, not written."""
    places = {"data_dir": str(trained / "corpus"), "cache_dir": str(trained / "cache")}
    values = {model: TINY | places | {"seed": 0, "output_dir": str(trained / model)} for model in MODELS}
    return {model: Run(model, model, values[model]) for model in MODELS}
