"""The same work on several models at once, each in a process of its own, which share the threads of the CPU.

Small models keep two processes of one thread each busier than one process of two.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import starmap
from typing import Any, TypeVar

from mvlm_core.monitor import available_threads
from mvlm_core.signals import PARENT_VARIABLE, end_on_sigterm

T = TypeVar("T")


def parallel_map(work: Callable[..., T], each: Sequence[tuple[Any, ...]], *, on_cpu: bool) -> Iterator[T]:
    """``work(*arguments)`` for each of some arguments, in their order.

    Args:
        work: a function of a module; it, its arguments and its results go from process to process.
        on_cpu: otherwise, and where there is one thread only, one comes after the other in this process.

    Raises:
        Exception: what ``work`` raised; BrokenProcessPool where its process died.
    """
    threads, _ = available_threads()
    count = min(len(each), threads) if on_cpu else 1
    if count < 2:
        yield from starmap(work, each)
        return
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start, (threads // count,)) as pool:
        try:
            yield from pool.map(work, *zip(*each, strict=True))
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _start(threads: int) -> None:
    """In a new process, before torch is imported."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.pop(PARENT_VARIABLE, None)  # it names the parent's parent
    end_on_sigterm()  # what it started in turn ends with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C comes to the parent as well, which decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    while True:  # the first signal ends the work, which the pool's own loop outlives; another one ends that
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
