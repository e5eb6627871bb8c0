"""Children of the main job: their output reaches the console, and a console that does not read stops none of them."""

import json
import os
import pty
import subprocess
import sys
import tty

import pytest

from mvlm_core.pipeline.child_process import TAIL_LINES
from tests.helpers import read_all

CHILD = "for n in range(30_000): print('line', n, 'x' * 100)"
PARENT = f"""
import json, sys
from mvlm_core.pipeline.child_process import SignalForwarder, run_child
with SignalForwarder() as signals:
    for _ in range(2):
        code, tail = run_child([sys.executable, "-c", {CHILD!r}], signals)
        print("the child has ended", flush=True)
with open(sys.argv[1], "w") as file:
    json.dump([code, tail], file)
"""
OUTPUT = b"".join(b"line %d %s\n" % (n, b"x" * 100) for n in range(30_000))
TAIL = OUTPUT.decode().splitlines()[-TAIL_LINES:]


def start(file, console, program=PARENT):
    """The parent on the console, which this process then no longer holds."""
    command = [sys.executable, "-c", program, str(file)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
    os.close(console)
    return process


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_all_output_reaches_a_console_that_reads_before_later_messages(kind, tmp_path):
    reader, console = pty.openpty() if kind == "terminal" else os.pipe()
    if kind == "terminal":
        tty.setraw(console)
    process = start(tmp_path / "result", console)
    assert read_all(reader) == 2 * (OUTPUT + b"the child has ended\n")
    os.close(reader)
    assert process.wait() == 0 and json.loads((tmp_path / "result").read_text()) == [0, TAIL]


def test_children_end_although_the_terminal_does_not_read(terminal, tmp_path):
    leader, console = terminal
    process = start(tmp_path / "result", console, PARENT.replace('print("the child has ended", flush=True)', "pass"))
    assert process.wait(timeout=60) == 0
    assert json.loads((tmp_path / "result").read_text()) == [0, TAIL]
    shown = read_all(leader)
    assert 0 < len(shown) < len(OUTPUT) and OUTPUT.startswith(shown)
