"""Two processes give what one gives: the same curve, the same files, and either resumes the other's checkpoint."""

import os
import socket
import subprocess
import sys
import traceback

import pytest
import torch

from mvlm_core.training.checkpoint import newest_checkpoint
from mvlm_core.training.distributed import ALONE, Ranks
from mvlm_core.training.history import read_history
from tests.helpers import REPOSITORY
from tests.training import distributed_run

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
        sizes = [9, 1, 1, 1, 8, 2, 7, 3]
        shares = [Ranks(rank, world).part_by_size(sizes) for rank in range(world)]
        assert sorted(sum(shares, [])) == list(range(8)) and all(share == sorted(share) for share in shares)
        loads = [sum(sizes[index] for index in share) for share in shares]
        assert max(loads) == max(9, -(-32 // world)), "no rank has more than it must"
    assert ALONE.is_main and ALONE.sum_numbers(1, 2.5) == [1, 2.5] and ALONE.share("x") == "x"


def by_two(*arguments):
    """``distributed_run.run`` as two ranks, forked: what ``torchrun`` does, without importing everything twice."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child cannot use its parent's threads
    children = []
    for rank in range(2):
        if child := os.fork():
            children.append(child)
            continue
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TOKENIZERS_PARALLELISM": "false"}
            distributed_run.run(*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    codes = [os.waitpid(child, 0)[1] for child in children]
    torch.set_num_threads(threads)
    assert codes == [0, 0]


def alone(*arguments):
    threads = torch.get_num_threads()
    try:
        distributed_run.run(*arguments)
    finally:
        torch.set_num_threads(threads)


def check_curve(folder, model, expected):
    """Losses, bytes and scores to rounding, and the last weights, of the run in ``expected``."""
    (losses, sizes, scores), (other, other_sizes, other_scores) = curve(expected, model), curve(folder, model)
    assert len(losses) == 50 and len(scores) == 5
    assert other == pytest.approx(losses, rel=0, abs=1e-8)
    assert other_sizes == sizes, "each token once"
    assert other_scores == pytest.approx(scores, rel=0, abs=1e-6), "scored in float32, each document once"
    found = weights(folder, model)
    for name, tensor in weights(expected, model).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("model", "turns"), [("mvlm_gpt2", False), ("simone_enhanced", False), ("simone_enhanced", True)]
)
def test_two_processes_give_the_curve_of_one(model, turns, tiny_corpus, tmp_path):
    """Fifty steps in float64: alone, by two, and by one, two and one through each other's checkpoints."""
    alone(tiny_corpus, tmp_path / "alone", model, 99)
    if turns:
        alone(tiny_corpus, tmp_path / "others", model, 13)
    by_two(tiny_corpus, tmp_path / "others", model, 20 if turns else 99)
    if turns:
        alone(tiny_corpus, tmp_path / "others", model, 99)
    check_curve(tmp_path / "others", model, tmp_path / "alone")


@pytest.mark.integration
def test_torchrun_gives_the_curve_of_one(tiny_corpus, tmp_path):
    alone(tiny_corpus, tmp_path / "alone", "simone_enhanced", 99)
    result = start(2, tiny_corpus, tmp_path / "two", "simone_enhanced", 99)
    assert result.returncode == 0, result.stderr
    check_curve(tmp_path / "two", "simone_enhanced", tmp_path / "alone")


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
