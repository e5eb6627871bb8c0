"""Process several models in parallel, each in its own process with a share of the CPU threads.

For small models, two single-threaded processes use two cores better than one process with two threads.
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

from mvlm_core.machine import available_threads
from mvlm_core.signals import PARENT_VARIABLE, end_on_sigterm

T = TypeVar("T")


def parallel_map(work: Callable[..., T], each: Sequence[tuple[Any, ...]], *, on_cpu: bool) -> Iterator[T]:
    """Yield ``work(*arguments)`` for each element of ``each``, in order.

    Args:
        work: a module-level function; it, its arguments and its results are sent between processes.
        on_cpu: if False, or with one thread only, run sequentially in this process.

    Raises:
        Exception: raised by ``work``; BrokenProcessPool if its process died.
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
    """Initialize a worker process, before torch is imported."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.pop(PARENT_VARIABLE, None)  # it names the grandparent
    end_on_sigterm()  # so that its own children are cleaned up
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    while True:  # the first signal ends the work but not the pool's own loop; a second one ends that
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
