"""Exit codes of this repository's programs and the exceptions that lead to them."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2
COMPILATION_FAILED = "torch.compile failed"  # how a trainer says so, and the job that started it knows
_NO_SPACE_OR_PERMISSION = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def printable(text: str, keep: str = "", limit: int = 4000) -> str:
    """Make ``text`` safe for a terminal, a log or a JSON file; truncate it to ``limit`` characters and an ellipsis.

    Names and values from damaged files may hold terminal control sequences and lone surrogates, which UTF-8 cannot
    encode. Both are escaped, as are line breaks unless they are in ``keep``.
    """
    text = text if len(text) <= limit else text[:limit] + "…"
    return "".join(
        character if character.isprintable() or character in keep else character.encode("unicode_escape").decode()
        for character in text
    )


def describe_os_error(error: OSError) -> str:
    """Describe the error for a terminal; if space or permissions are missing, say what to do next."""
    advice = "; free space or fix the permissions, then run the same command again"
    return printable(str(error)) + (advice if error.errno in _NO_SPACE_OR_PERMISSION else "")


class UserError(Exception):
    """Bad arguments or input: every problem is reported, without a traceback, with exit code 2.

    Args:
        problems: one sentence, or one for each problem, so that all can be fixed at once.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))


class TrainingError(Exception):
    """The run cannot continue although its arguments are valid: exit code 1, reported in one sentence."""


class Stopped(Exception):
    """A signal ended the run after a checkpoint was written: exit code 128 + signal number."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and exit with the code for its result or exception."""
    try:
        sys.exit(main() or EXIT_DONE)
    except UserError as error:
        for problem in error.problems:
            print("error: " + printable(problem, keep="\n"), file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except TrainingError as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except Stopped as stop:
        print(f"{stop}; run the same command again, without --fresh and --resume_from, to resume", file=sys.stderr)
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for output still buffered
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        print(f"failed: {describe_os_error(error)}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
