"""Finished tiny runs shared by the experiment tests."""

from pathlib import Path

import pytest

from benchmarks.experiments.runner import Run
from benchmarks.reliability import fault_injection
from tests.helpers import MODELS, TINY


@pytest.fixture(scope="session")
def finished(trained: Path) -> dict[str, Run]:
    """A finished tiny run of each model, as an experiment finds it; read-only."""
    places = {"data_dir": str(trained / "corpus"), "cache_dir": str(trained / "cache")}
    values = {model: TINY | places | {"seed": 0, "output_dir": str(trained / model)} for model in MODELS}
    return {model: Run(model, model, values[model]) for model in MODELS}


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> fault_injection.Bench:
    """Runs of model 2 in separate processes, to be disturbed and compared with an undisturbed one."""
    fault_injection.CONTEXT.set_forkserver_preload(fault_injection.PRELOAD)
    return fault_injection.Bench("simone_enhanced", tmp_path_factory.mktemp("faults"))
