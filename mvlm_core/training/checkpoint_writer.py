"""Asynchronous checkpoints: tensors are copied to host memory, and a thread writes the copy.

Training waits only for the copy, not for hashing or disk writes. Saves run one at a time and none is skipped, so the
set of checkpoints does not depend on disk speed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Thread

import torch
from torch import Tensor

NamedTensors = dict[str, dict[str, Tensor]]
log = logging.getLogger("mvlm")


class CheckpointWriter:
    """Copies tensors and passes the copy to a function that runs in a background thread."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Whether a save has ended and ``wait`` has not yet collected its result."""
        return self._thread is not None and not self._thread.is_alive()

    def start(self, tensors: NamedTensors, write: Callable[[NamedTensors], None]) -> None:
        """Copy ``tensors`` and call ``write`` with the copy in a thread.

        CUDA copies are enqueued on the current stream, so work enqueued later, such as the next step, cannot change
        them; only the thread waits for them to complete.
        """
        self.wait()
        copy = {file: {name: _copy(tensor) for name, tensor in named.items()} for file, named in tensors.items()}
        copied = None
        if any(tensor.is_cuda for named in tensors.values() for tensor in named.values()):
            copied = torch.cuda.Event()
            copied.record()

        def work() -> None:
            try:
                if copied is not None:
                    copied.synchronize()
                write(copy)
            except BaseException as error:  # re-raised by ``wait``, where the loop can handle it
                self._error = error

        self._thread = Thread(target=work, name="checkpoint writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save in progress, if any, and re-raise its exception."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error


def _copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to host memory, pinned for CUDA tensors; torch caches pinned memory for the next save."""
    try:
        memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    except RuntimeError as error:
        log.warning("no pinned memory for a checkpoint (%s): the copy is slower", str(error).splitlines()[0])
        memory = torch.empty(tensor.shape, dtype=tensor.dtype)
    return memory.copy_(tensor.detach(), non_blocking=True)
