"""Saving beside the training: the tensors are copied into memory, and a thread writes the copy.

The run waits for the copy alone, not for hashing and the disk. One save at a time: the next one waits for the end of
the one before, and none is left out, so which checkpoints a run writes does not depend on the speed of its disk.
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
    """Calls a function with a copy of tensors in a thread."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Whether a save has ended whose outcome ``wait`` has yet to tell."""
        return self._thread is not None and not self._thread.is_alive()

    def start(self, tensors: NamedTensors, write: Callable[[NamedTensors], None]) -> None:
        """Copy ``tensors`` as they are now and call ``write`` with the copy in a thread.

        The copies of CUDA tensors are queued on the current stream: what is queued there later, such as the next
        step, cannot change them, and only the thread waits for them.
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
            except BaseException as error:  # raised by ``wait``, where the loop can answer it
                self._error = error

        self._thread = Thread(target=work, name="checkpoint writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save in progress, if there is one, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error


def _copy(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned where that makes it faster; torch keeps pinned memory for the next save."""
    try:
        memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    except RuntimeError as error:
        log.warning("no pinned memory for a checkpoint (%s): copied more slowly", str(error).splitlines()[0])
        memory = torch.empty(tensor.shape, dtype=tensor.dtype)
    return memory.copy_(tensor.detach(), non_blocking=True)
