"""How a program of this repository ends: the exit codes and the exceptions that lead to them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

LINE_BREAK = "\n"
EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2


def printable(text: str, keep: str = "", limit: int = 4000) -> str:
    """``text`` made safe for a terminal, a log and a JSON file, at most ``limit`` characters and an ellipsis.

    Names and values from damaged files may hold control sequences, which a terminal obeys, and lone surrogates, which
    UTF-8 cannot hold: both are written as escapes. So are line breaks, unless they are in ``keep``.
    """
    text = text if len(text) <= limit else text[:limit] + "…"
    return "".join(
        character if character.isprintable() or character in keep else character.encode("unicode_escape").decode()
        for character in text
    )


class UserError(Exception):
    """Bad arguments or bad input: reported in full, without a traceback, with exit code 2.

    Args:
        problems: one sentence, or one for each problem, so that all can be fixed before the next try.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))


class TrainingFailed(Exception):
    """The run cannot continue, through no fault of its arguments: exit code 1, reported in one sentence."""


class Stopped(Exception):
    """A signal ended the run after its checkpoint was written: exit code 128 + the signal's number."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and leave with the exit code that fits how it ended."""
    try:
        sys.exit(main() or EXIT_DONE)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {printable(problem, LINE_BREAK)}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except TrainingFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except Stopped as stop:
        print(f"{stop}; run the same command again to resume", file=sys.stderr)
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        sys.exit(128 + signal.SIGPIPE)
