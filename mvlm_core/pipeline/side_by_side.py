"""The same work on several models at once, each in a process of its own, which share the threads of the CPU.

Small models keep two processes of one thread each busier than one process of two.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

from mvlm_core.errors import Stopped
from mvlm_core.monitor import available_threads
from mvlm_core.signals import PARENT_VARIABLE

T = TypeVar("T")
_THREADS = "OMP_NUM_THREADS"


def side_by_side(work: Callable[..., T], each: Sequence[tuple[Any, ...]], *, on_cpu: bool) -> Iterator[T]:
    """``work(*arguments)`` for each of some arguments, in their order.

    Args:
        work: a function of a module; it, its arguments and its results go from process to process.
        on_cpu: otherwise, and where there is one thread only, one comes after the other in this process.

    Raises:
        Exception: what ``work`` raised; RuntimeError where its process ended without an answer.
    """
    threads, _ = available_threads()
    count = min(len(each), threads) if on_cpu else 1
    if count < 2:
        yield from (work(*arguments) for arguments in each)
        return
    with _thread_limit(threads // count), ThreadPoolExecutor(count) as pool:
        try:
            yield from pool.map(lambda arguments: _in_a_process(work, arguments), each)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


@contextmanager
def _thread_limit(threads: int) -> Iterator[None]:
    """What processes that are started meanwhile may use."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = str(threads)
    try:
        yield
    finally:
        os.environ.pop(_THREADS)
        if before is not None:
            os.environ[_THREADS] = before


def _in_a_process(work: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(writer, os.getpid(), work, arguments), daemon=True)
    process.start()
    writer.close()
    try:
        result, error = reader.recv()
    except EOFError:
        result, error = None, RuntimeError("a process ended without an answer, as when memory runs out")
    finally:
        process.join()
    if error is not None:
        raise error
    return result


def _answer(writer: Connection, parent: int, work: Callable[..., T], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGTERM, _stop)  # what it started in turn ends with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C comes to the parent as well, which decides
    if PARENT_VARIABLE in os.environ:
        os.environ[PARENT_VARIABLE] = str(parent)
    try:
        answer: tuple[T | None, Exception | None] = (work(*arguments), None)
    except Stopped:
        return
    except Exception as error:
        answer = (None, error)
    writer.send(answer)


def _stop(number: int, _frame: object) -> NoReturn:
    raise Stopped(number)
