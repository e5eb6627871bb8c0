"""The supervisor of a run's ranks: how many there are, their environment, signals, and a rank that dies or hangs.

It starts each rank with the trainer's own command line and never initializes CUDA itself. Ranks rendezvous through a
file in a private folder and communicate over the loopback interface, so no other user can join or listen.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from mvlm_core.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, TrainingError, UserError, printable
from mvlm_core.hardware import COMPILE_THREADS, compile_workers
from mvlm_core.machine import gpu_count
from mvlm_core.settings import TrainingSettings
from mvlm_core.signals import PARENT_VARIABLE, parent_is_gone, signal_name

FOLDER_VARIABLE, MEMORY_VARIABLE = "MVLM_RANKS_FOLDER", "MVLM_RANKS_MEMORY"
SHARED_BYTES = 16 << 20  # per CPU rank: larger all-reduces are chunked, which keeps the chunks in the CPU cache
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 15.0  # for the other ranks to exit by themselves after one has
_TAIL_LINES = 12
_CODES_KEPT = (EXIT_DONE, EXIT_BAD_INPUT, 128 + signal.SIGINT, 128 + signal.SIGTERM)
log = logging.getLogger("mvlm")


def rank_count(settings: TrainingSettings) -> int:
    """Return how many ranks this process must start; 1 if it should train itself, alone or as one of several ranks.

    Raises:
        UserError: more GPUs than available, ``--processes`` together with a GPU or torchrun, or several models on
            several machines.
    """
    if "WORLD_SIZE" in os.environ:
        if settings.processes > 1 and FOLDER_VARIABLE not in os.environ:
            raise UserError(f"--processes {settings.processes} starts its own processes: use it without torchrun")
        if settings.num_models > 1 and os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
            raise UserError(
                f"--num_models {settings.num_models}: not supported on several machines, as the student reads its "
                "teachers from one machine's disk. Use --num_models 1, or copy the teachers' exports to every machine "
                "and pass them with --teacher"
            )
        return 1
    gpus = 0 if settings.device == "cpu" else gpu_count()
    if settings.gpus and settings.gpus > gpus:
        chosen = " with --device cpu" if settings.device == "cpu" else " to torch on this machine"
        raise UserError(f"--gpus {settings.gpus}: only {gpus} available{chosen}")
    if settings.processes > 1:
        if gpus:
            raise UserError(f"--processes {settings.processes} is for CPU training: use --gpus N to choose GPUs")
        return settings.processes
    return max(1, min(settings.gpus or gpus, settings.sequences_per_step))


def planned_gpus(settings: TrainingSettings, *, here: bool) -> tuple[int, int]:
    """Number of GPUs that the planned run uses, and of the machine, all of which are paid for.

    Args:
        here: whether the run is planned on the machine that would train; otherwise for one with ``--gpus`` GPUs.
    """
    if here:
        return rank_count(settings), gpu_count()
    gpus = settings.gpus or 1
    return min(gpus, settings.sequences_per_step), gpus


def describe_gpus(settings: TrainingSettings) -> str:
    """Describe for the plan how many GPUs the run would use."""
    gpus = 0 if settings.device == "cpu" else gpu_count()
    if not gpus and settings.gpus:
        return f"GPUs: none here; planned for a machine with {settings.gpus} (--gpus)"
    if not gpus:
        return "GPUs: none here; with several, each batch is split across all of them, or across --gpus N"
    return f"GPUs: each batch is split across {rank_count(settings)} of the {gpus} on this machine"


def rank_environment(rank: int, world_size: int, folder: Path | str) -> dict[str, str]:
    """Environment variables of one rank on this machine; ``folder`` is empty and private to the run."""
    interface = _loopback()
    alone = str(compile_workers(1))  # has already been set in this process, unless the user has set another number
    workers = os.environ.get(COMPILE_THREADS, alone)
    return {
        COMPILE_THREADS: str(compile_workers(world_size)) if workers == alone else workers,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        FOLDER_VARIABLE: str(folder),
        PARENT_VARIABLE: str(os.getpid()),
    }


def shared_memory(world_size: int) -> int:
    """Create anonymous shared memory for the all-reduce of CPU ranks; return its descriptor, which ranks inherit."""
    memory = os.memfd_create("mvlm_sums", 0)
    os.truncate(memory, world_size * SHARED_BYTES)
    return memory


def _loopback() -> str:
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.family == socket.AF_INET and address.address == "127.0.0.1" for address in addresses):
            return name
    return "lo"


@dataclass
class _Rank:
    """A rank's process; its output goes to ``log``, or for the main rank (None) to the supervisor's own streams."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path | None
    folder: Path
    ended: float | None = None

    @property
    def code(self) -> int | None:
        return self.process.returncode

    def failure(self) -> tuple[int, str] | None:
        """Severity (0 is the likeliest root cause) and description; None if it succeeded or only lost its peers."""
        if self.ended is None:
            return 2, "does not respond"
        if not self.code or (self.folder / f"lost.{self.number}").exists() or self.code == -signal.SIGABRT:
            return None  # NCCL aborts a rank with SIGABRT when another one does not respond
        if self.code < 0:
            return 0, f"was killed by {signal_name(-self.code)} (out of memory? see dmesg)"
        return 1, f"failed with exit code {self.code}"

    def last_lines(self) -> str:
        if self.log is None:
            return ""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        tail = "\n".join(f"  {line}" for line in text.strip().splitlines()[-_TAIL_LINES:])
        lines = printable(tail, keep="\n")
        return f"; the end of {self.log}:\n{lines}" if lines else f"; {self.log} is empty"


class Supervisor:
    """Starts the ranks of a run, forwards signals, and kills all ranks when one dies or hangs.

    Args:
        command: the trainer's own command line.
        log_file: ranks other than the main one write to ``<log_file>.rank<number>``; if None, to the private folder,
            which is kept if the run fails.
        shares_memory: whether all-reduces go through shared memory (CPU ranks).
    """

    def __init__(self, command: list[str], world_size: int, log_file: str | None, *, shares_memory: bool) -> None:
        self.command, self.world_size, self.log_file, self.shares_memory = command, world_size, log_file, shares_memory
        self.signals: list[int] = []
        self.ranks: list[_Rank] = []
        self._forwarded = False

    def run(self) -> int:
        """Run all ranks and return the main rank's exit code.

        Raises:
            TrainingError: a rank died or does not respond; the message includes its number and the end of its log.
        """
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        folder = Path(tempfile.mkdtemp(prefix="mvlm_ranks_"))  # readable only by its owner
        keep = False
        try:
            self._start(folder)
            return self._watch()
        except TrainingError:
            keep = self.log_file is None
            raise
        finally:
            self._kill()
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.signals.append(number)

    def _start(self, folder: Path) -> None:
        environment = dict(os.environ)
        memory = shared_memory(self.world_size) if self.shares_memory else None
        if memory is not None:
            environment[MEMORY_VARIABLE] = str(memory)
        for number in range(self.world_size):
            path = None
            options: dict[str, Any] = {}
            if number:
                path = Path(f"{self.log_file}.rank{number}") if self.log_file else folder / f"rank{number}.log"
                path.parent.mkdir(parents=True, exist_ok=True)
                options = {"stdout": path.open("wb"), "stderr": subprocess.STDOUT}
            # In its own session, so that Ctrl-C reaches a rank only once, forwarded from here.
            process = subprocess.Popen(
                self.command,
                env=environment | rank_environment(number, self.world_size, folder),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=() if memory is None else (memory,),
                **options,
            )
            self.ranks.append(_Rank(number, process, path, folder))
            if options:
                options["stdout"].close()
        if memory is not None:
            os.close(memory)
        log.debug("process ids of the ranks: %s", ", ".join(str(rank.process.pid) for rank in self.ranks))

    def _watch(self) -> int:
        self._poll_until(self._is_over)
        main = self.ranks[0]
        if self.signals.count(signal.SIGINT) > 1:
            return 128 + signal.SIGINT
        if self._main_code() not in _CODES_KEPT[1:]:
            deadline = time.monotonic() + _GRACE_SECONDS
            self._poll_until(lambda: all(rank.ended for rank in self.ranks) or time.monotonic() > deadline)
        code = self._main_code()
        if code in _CODES_KEPT:
            return code
        outcomes = [(rank.failure(), rank.ended or 0.0, rank.number) for rank in self.ranks]
        causes = sorted((failure, ended, number) for failure, ended, number in outcomes if failure)
        if not causes:
            logs = ", ".join(str(rank.log) for rank in self.ranks[1:])
            advice = "" if self.shares_memory else "; --gpus 1 trains without NCCL; in Docker, --shm-size=1g may help"
            raise TrainingError(
                f"the {self.world_size} processes lost contact with each other, and none of them reported why (a GPU "
                f"fault ends a process this way: see dmesg and {logs}); the same command, without "
                f"--fresh, resumes{advice}"
            )
        if causes[0][2] == 0 and main.code == EXIT_FAILED:
            return EXIT_FAILED  # the main rank has already printed the reason
        (_, description), _, number = causes[0]
        raise TrainingError(
            f"process {number} of {self.world_size} {description}: all processes were killed; the same command, "
            f"without --fresh, resumes from the newest checkpoint{self.ranks[number].last_lines()}"
        )

    def _main_code(self) -> int:
        """The main rank's exit code as a shell reports it; ``EXIT_FAILED`` while it is running."""
        code = self.ranks[0].code
        if code is None:
            return EXIT_FAILED
        return 128 - code if -code in (signal.SIGINT, signal.SIGTERM) else code

    def _is_over(self) -> bool:
        failed = [rank.ended for rank in self.ranks if rank.ended is not None and rank.code]
        return (
            self.ranks[0].ended is not None
            or any(time.monotonic() - since > _GRACE_SECONDS for since in failed)
            or self.signals.count(signal.SIGINT) > 1
        )

    def _poll_until(self, over: Callable[[], bool]) -> None:
        while True:
            for rank in self.ranks:
                if rank.ended is None and rank.process.poll() is not None:
                    rank.ended = time.monotonic()
            if over():
                return
            self._forward_signal()
            time.sleep(_POLL_SECONDS)

    def _forward_signal(self) -> None:
        """Forward the first signal to the main rank, which agrees with the others on the step at which to stop."""
        if not self.signals and parent_is_gone():
            self.signals.append(signal.SIGTERM)
        if self.signals and not self._forwarded:
            self._forwarded = True
            if self.ranks[0].ended is None:
                self.ranks[0].process.send_signal(self.signals[0])

    def _kill(self) -> None:
        for rank in self.ranks:
            if rank.process.poll() is None:
                rank.process.kill()
        for rank in self.ranks:
            rank.process.wait()
