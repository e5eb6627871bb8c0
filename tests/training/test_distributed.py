"""Several ranks match a single process: same curve, same files, and either resumes the other's checkpoint."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.forked_ranks import fork_ranks
from mvlm_core.errors import TrainingError
from mvlm_core.export.manifest import TEACHERS, training_config
from mvlm_core.training import distributed, gradients, supervisor
from mvlm_core.training import loop as training_loop
from mvlm_core.training.checkpoint import newest_checkpoint
from mvlm_core.training.distributed import SINGLE_RANK, Ranks, init_ranks
from mvlm_core.training.gradients import GradientReducer
from mvlm_core.training.history import read_history
from mvlm_core.training.loop import TrainingLoop
from tests.helpers import REPOSITORY, StopAfter, make_loop, tiny_settings
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


def test_shards_cover_every_item_once_and_are_balanced():
    for world in (1, 2, 3, 8):
        shards = [list(Ranks(rank, world).shard(10)) for rank in range(world)]
        assert sum(shards, []) == list(range(10))
        sizes = [9, 1, 1, 1, 8, 2, 7, 3]
        balanced = [Ranks(rank, world).balanced_shard(sizes) for rank in range(world)]
        assert sorted(sum(balanced, [])) == list(range(8)) and all(shard == sorted(shard) for shard in balanced)
        loads = [sum(sizes[index] for index in shard) for shard in balanced]
        assert max(loads) == max(9, -(-32 // world)), "no rank has more than it must"
    assert (
        SINGLE_RANK.is_main and SINGLE_RANK.all_reduce_scalars(1, 2.5) == [1, 2.5] and SINGLE_RANK.broadcast("x") == "x"
    )


def in_ranks(world, work):
    """Runs ``work(ranks)`` in forked ranks, which have imported everything already; each must succeed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child cannot use its parent's threads
    with tempfile.TemporaryDirectory() as folder:
        if (main := os.fork()) == 0:
            try:
                rank = fork_ranks(world, Path(folder))
                signal.alarm(100)  # a rank that hangs must not block the tests
                work(init_ranks("cpu"))
                codes = [os.wait()[1] for _ in range(1, world)] if rank == 0 else []
                os._exit(int(any(codes)))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        code = os.waitpid(main, 0)[1]
    torch.set_num_threads(threads)
    assert code == 0


def by(world, *arguments, **more):
    """``distributed_run.run`` with ``world`` ranks."""
    in_ranks(world, lambda ranks: distributed_run.run(*arguments, ranks, **more))


def alone(*arguments, **more):
    threads = torch.get_num_threads()
    try:
        distributed_run.run(*arguments, **more)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [True, False])
def test_collectives_are_correct_and_identical_on_all_ranks(dtype, shared, monkeypatch):
    monkeypatch.setattr(supervisor, "SHARED_BYTES", 4096)  # so that a sum is split into many pieces

    def work(ranks):
        def mine(rank):
            generator = torch.Generator().manual_seed(rank)
            return [torch.randn(3, 1000, generator=generator, dtype=dtype), torch.full((), float(rank), dtype=dtype)]

        assert ranks.shared_memory is not None
        ranks = ranks if shared else replace(ranks, shared_memory=None)
        found = mine(ranks.rank)
        ranks.all_reduce(found)
        expected = [sum(parts) for parts in zip(*(mine(rank) for rank in range(3)), strict=True)]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert torch.equal(ranks.broadcast(found[0]), found[0])
        assert torch.equal(
            ranks.broadcast_tensors({"x": torch.arange(5)} if ranks.is_main else {})["x"], torch.arange(5)
        )
        assert ranks.all_reduce_scalars(ranks.rank, 0.5) == [3.0, 1.5] and ranks.all_reduce_max(-ranks.rank) == 0.0
        everyones = ranks.all_gather(mine(ranks.rank)[0])
        assert torch.equal(everyones, torch.cat([mine(rank)[0] for rank in range(3)]))

    in_ranks(3, work)


def test_peak_memory_is_summed_over_processes_but_not_over_gpus(tiny_corpus, tmp_path, monkeypatch):
    """A GPU's own memory is what a run has to fit into; processes on a CPU share the machine's."""

    def work(ranks):
        measured = {"cpu": 100 + ranks.rank, "cuda": 500 + ranks.rank}
        monkeypatch.setattr(training_loop, "peak_memory", measured.__getitem__)
        loop = make_loop("mvlm_gpt2", tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path), ranks)
        assert loop.peak_memory() == 100 + 101
        loop.hardware = replace(loop.hardware, device="cuda")
        assert loop.peak_memory() == 501

    in_ranks(2, work)


def test_hung_rank_ends_the_run_after_a_timeout(tiny_corpus, tmp_path, monkeypatch):
    """Ranks time out only after the first step; a slow first step and a slow save by the main rank are tolerated."""
    monkeypatch.setattr(distributed, "_STEP_TIMEOUT", timedelta(seconds=2))

    def work(ranks):
        real_step, real_save = TrainingLoop.step, TrainingLoop._save

        def step(self, stop):
            if ranks.rank == 1 and self.state.step in (0, 15):
                time.sleep(4 if self.state.step == 0 else 30)
            return real_step(self, stop)

        def save(self, **kind):
            time.sleep(4 if ranks.is_main and self.state.step == 10 else 0)
            real_save(self, **kind)

        monkeypatch.setattr(TrainingLoop, "step", step)
        monkeypatch.setattr(TrainingLoop, "_save", save)
        if ranks.is_main:
            with pytest.raises(TrainingError, match="lost their connection"):
                distributed_run.run(tiny_corpus, tmp_path, "mvlm_gpt2", 99, ranks)
            assert (Path(os.environ[supervisor.FOLDER_VARIABLE]) / "lost.0").exists()
            assert newest_checkpoint(tmp_path / "mvlm_gpt2" / "checkpoints").step == 10
            os._exit(0)
        distributed_run.run(tiny_corpus, tmp_path, "mvlm_gpt2", 99, ranks)

    in_ranks(2, work)


def test_a_lost_connection_is_explained_by_all_lines_of_the_error(monkeypatch):
    monkeypatch.delenv(supervisor.FOLDER_VARIABLE, raising=False)
    text = "NCCL error in NCCLUtils.cpp:94\nncclSystemError: System call failed.\nLast error:\nno room in /dev/shm\x1b"

    def fail():
        raise RuntimeError(text)

    with pytest.raises(TrainingError) as error:
        distributed._collective(fail)
    assert r"94 ncclSystemError: System call failed. Last error: no room in /dev/shm\x1b); look" in str(error.value)


def test_a_trained_model_is_freed(tiny_corpus, tmp_path):
    """A teacher's weights must not stay in memory while its student trains."""

    def work(ranks):
        loop = make_loop("simone_enhanced", tiny_settings("simone_enhanced", tiny_corpus, tmp_path, max_steps=2), ranks)
        parameters = [weakref.ref(p) for p in loop.task.model.parameters()]
        loop.run(StopAfter())
        assert all(parameter() is not None for parameter in parameters)
        hardware = loop.hardware
        del loop
        hardware.release()
        assert not any(parameter() is not None for parameter in parameters)

    in_ranks(2, work)


def test_waiting_for_the_first_rank_uses_no_collectives(monkeypatch):
    def work(ranks):
        started = time.monotonic()
        if ranks.is_main:
            time.sleep(1)
        else:
            monkeypatch.setattr(dist, "barrier", None)
            monkeypatch.setattr(dist, "all_reduce", None)
        ranks.wait_for_first("text")
        assert time.monotonic() - started >= 0.9

    in_ranks(2, work)


def check_curve(folder, model, expected):
    """Losses, scores and final weights match the run in ``expected`` up to rounding, and bytes match exactly."""
    (losses, sizes, scores), (other, other_sizes, other_scores) = curve(expected, model), curve(folder, model)
    assert len(losses) == 50 and len(scores) == 5
    assert other == pytest.approx(losses, rel=0, abs=1e-8)
    assert other_sizes == sizes, "each token once"
    assert other_scores == pytest.approx(scores, rel=0, abs=1e-6), "scored in float32, each document once"
    found = weights(folder, model)
    for name, tensor in weights(expected, model).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-7)


# (ranks, steps) of each part of a run; each part resumes from the checkpoint of the one before.
TURNS = {"two": [(2, 99)], "four": [(4, 99)], "turns": [(1, 13), (2, 10), (4, 12), (1, 99)]}


@pytest.mark.parametrize(
    ("model", "turns"),
    [
        ("mvlm_gpt2", "two"),
        ("simone_enhanced", "turns"),
        pytest.param("mvlm_gpt2", "four", marks=pytest.mark.integration),
        pytest.param("mvlm_gpt2", "turns", marks=pytest.mark.integration),
        pytest.param("simone_enhanced", "two", marks=pytest.mark.integration),
        pytest.param("simone_enhanced", "four", marks=pytest.mark.integration),
    ],
)
def test_several_ranks_reproduce_the_single_process_run(model, turns, tiny_corpus, tmp_path, monkeypatch):
    """Fifty steps in float64, in buckets of a few matrices; model 2's coherence loss ends half-way."""
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 50_000)
    alone(tiny_corpus, tmp_path / "alone", model, 99)
    for world, steps in TURNS[turns]:
        by(world, tiny_corpus, tmp_path / "others", model, steps)
    check_curve(tmp_path / "others", model, tmp_path / "alone")


def test_further_training_on_two_ranks_matches_one_process(trained, tmp_path):
    corpus, more = trained / "corpus", {"init_from": str(trained / "mvlm_gpt2"), "data_subset": "bible/plain"}
    more |= {"replay": f"{corpus}=0.25", "max_steps": 6, "eval_interval": 3}
    alone(corpus, tmp_path / "alone", "mvlm_gpt2", 99, **more)
    by(2, corpus, tmp_path / "others", "mvlm_gpt2", 99, **more)
    (losses, sizes, scores), (other, other_sizes, other_scores) = (
        curve(tmp_path / place, "mvlm_gpt2") for place in ("alone", "others")
    )
    assert other == pytest.approx(losses, rel=0, abs=1e-8) and other_sizes == sizes
    before, other_before = (
        newest_checkpoint(tmp_path / place / "mvlm_gpt2" / "checkpoints").state["before"]
        for place in ("alone", "others")
    )
    assert other_before == pytest.approx(before, abs=1e-6) and None not in before.values()
    assert other_scores == pytest.approx(scores, abs=1e-6)


@pytest.mark.parametrize("started", [0, 1])
def test_out_of_memory_on_one_rank_restarts_the_step_on_all(started, tiny_corpus, tmp_path, monkeypatch):
    """Parts of 2, 3 and 3 sequences. Only the last rank runs out of memory, before it has all-reduced a gradient or
    after its first bucket: the others wait for it, and all restart the step."""
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 10_000)
    alone(tiny_corpus, tmp_path / "alone", "simone_enhanced", 12)

    def train(ranks):
        real, failures = GradientReducer._start, []

        def start(self):
            if ranks.rank == 2 and len(self._sums) == started and not failures:
                failures.append(self._missing is not None and len(self._buckets) > 5)
                raise torch.OutOfMemoryError("CUDA out of memory")
            real(self)

        monkeypatch.setattr(GradientReducer, "_start", start)
        loop = distributed_run.run(tiny_corpus, tmp_path / "others", "simone_enhanced", 12 + started, ranks)
        assert failures == ([True] if ranks.rank == 2 else [])
        assert loop.state.micro_batch == (2 if ranks.rank == 2 else 4)

    in_ranks(3, train)
    first, other = (curve(tmp_path / place, "simone_enhanced") for place in ("alone", "others"))
    assert len(first[0]) == 12 and other[0] == pytest.approx(first[0], rel=0, abs=1e-8)
    found = weights(tmp_path / "others", "simone_enhanced")
    for name, tensor in weights(tmp_path / "alone", "simone_enhanced").items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-7)


@pytest.mark.integration
def test_torchrun_reproduces_the_single_process_run(tiny_corpus, tmp_path):
    alone(tiny_corpus, tmp_path / "alone", "simone_enhanced", 99)
    result = start(2, tiny_corpus, tmp_path / "two", "simone_enhanced", 99)
    assert result.returncode == 0, result.stderr
    check_curve(tmp_path / "two", "simone_enhanced", tmp_path / "alone")


@pytest.mark.integration
def test_torchrun_trains_teachers_and_student(tiny_corpus, tmp_path):
    """Each model has a process group of its own on the agent's one store."""
    places = ["--data_dir", tiny_corpus, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"]
    flags = [*"--preset smoke --device cpu --max_steps 3 --num_models 3".split(), *places]
    result = start(2, *flags, program=("mvlm_trainer.py",))
    assert result.returncode == 0, result.stderr
    for folder in (tmp_path / "out", *(tmp_path / "out" / TEACHERS).iterdir()):
        assert training_config(folder, "results")["results"]["steps"] == 3


@pytest.mark.integration
def test_two_nodes_reproduce_the_single_process_run(tiny_corpus, tmp_path):
    """Two nodes of one process each, both on the loopback, started as in docs/h200.md."""
    alone(tiny_corpus, tmp_path / "alone", "mvlm_gpt2", 99)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [
        sys.executable,
        *"-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --master_addr 127.0.0.1".split(),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPOSITORY)}
    arguments = [*RUN, tiny_corpus, tmp_path / "two", "mvlm_gpt2", "99"]
    machines = [
        subprocess.Popen(
            [*command, "--master_port", port, "--node_rank", str(number), *arguments], env=environment, cwd=REPOSITORY
        )
        for number in range(2)
    ]
    assert [machine.wait(200) for machine in machines] == [0, 0]
    check_curve(tmp_path / "two", "mvlm_gpt2", tmp_path / "alone")


@pytest.mark.integration
def test_failing_rank_ends_the_torchrun_run(tiny_corpus, tmp_path):
    script = tmp_path / "one_fails.py"
    script.write_text(
        "import os\nfrom tests.training import distributed_run\n"
        "from mvlm_core.training.distributed import Ranks\nreal = Ranks.all_reduce_scalars\n"
        "def failing(self, *values):\n"
        "    failing.calls += 1\n"
        "    if self.rank == 1 and failing.calls == 5: os._exit(9)\n"
        "    return real(self, *values)\n"
        "failing.calls = 0\nRanks.all_reduce_scalars = failing\n"
        "from mvlm_core.errors import run_main\nrun_main(distributed_run.main)\n"
    )
    result = start(2, tiny_corpus, tmp_path, "mvlm_gpt2", 99, program=[str(script)])
    assert result.returncode != 0
    assert newest_checkpoint(tmp_path / "mvlm_gpt2" / "checkpoints").step == 0
