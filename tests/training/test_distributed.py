"""Two processes give what one gives: the same curve, the same files, and either goes on from the other's checkpoint."""

import os
import subprocess
import sys

import pytest
import torch

from mvlm_core.training.checkpoint import newest_checkpoint
from mvlm_core.training.distributed import ALONE, Ranks
from mvlm_core.training.history import read_history
from tests.helpers import REPOSITORY

RUN = ("-m", "tests.training.distributed_run")


def start(processes, *arguments, program=RUN):
    command = [*program, *map(str, arguments)]
    if processes > 1:
        command = [*"-m torch.distributed.run --standalone --nproc_per_node".split(), str(processes), *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=REPOSITORY)


def curve(folder, model):
    records = read_history(folder / model / "training_history.jsonl")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    scores = [record["validation_bpb"] for record in records if "validation_bpb" in record]
    return [record["train_loss"] for record in records], [record["bytes"] for record in records], scores


def weights(folder, model):
    return newest_checkpoint(folder / model / "checkpoints").tensors("model")


def test_every_item_is_in_one_part():
    for world in (1, 2, 3, 8):
        parts = [list(Ranks(rank, world).part(10)) for rank in range(world)]
        assert sum(parts, []) == list(range(10))
    assert ALONE.is_main and ALONE.sum_numbers(1, 2.5) == [1, 2.5] and ALONE.share("x") == "x"


@pytest.mark.parametrize(
    ("model", "ways"),
    [("mvlm_gpt2", ["by two"]), ("simone_enhanced", ["by two", "by turns"])],
)
def test_two_processes_give_the_curve_of_one(model, ways, tiny_corpus, tmp_path):
    """Fifty steps in float64: alone, by two, and by one, two and one through each other's checkpoints."""
    starts = {"alone": [(1, 99)], "by two": [(2, 99)], "by turns": [(1, 13), (2, 20), (1, 99)]}
    for way in ("alone", *ways):
        for processes, steps in starts[way]:
            result = start(processes, tiny_corpus, tmp_path / way, model, steps)
            assert result.returncode == 0, result.stderr
    losses, sizes, scores = curve(tmp_path / "alone", model)
    assert len(losses) == 50 and len(scores) == 5
    for way in ways:
        other, other_sizes, other_scores = curve(tmp_path / way, model)
        assert other == pytest.approx(losses, rel=0, abs=1e-8)
        assert other_sizes == sizes, "each token once"
        assert other_scores == pytest.approx(scores, rel=0, abs=1e-6), "scored in float32, each document once"
        for name, tensor in weights(tmp_path / "alone", model).items():
            torch.testing.assert_close(weights(tmp_path / way, model)[name], tensor, rtol=0, atol=1e-7)


def test_a_failing_process_ends_the_run(tiny_corpus, tmp_path):
    script = tmp_path / "one_fails.py"
    script.write_text(
        "import os\nfrom tests.training import distributed_run\n"
        "from mvlm_core.training.distributed import Ranks\nreal = Ranks.sum_numbers\n"
        "def failing(self, *values):\n"
        "    failing.calls += 1\n"
        "    if self.rank == 1 and failing.calls == 5: os._exit(9)\n"
        "    return real(self, *values)\n"
        "failing.calls = 0\nRanks.sum_numbers = failing\n"
        "from mvlm_core.errors import run_main\nrun_main(distributed_run.main)\n"
    )
    result = start(2, tiny_corpus, tmp_path, "mvlm_gpt2", 99, program=[str(script)])
    assert result.returncode != 0
    assert newest_checkpoint(tmp_path / "mvlm_gpt2" / "checkpoints").step == 0
