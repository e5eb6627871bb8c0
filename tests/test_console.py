"""The console of a run: nothing is lost while it reads, and nothing waits for it once it does not."""

import os
import pty
import re
import subprocess
import sys
import time

import pytest

from tests.helpers import read_all

PROGRAM = """
import sys, time
from mvlm_core.console import outlive_terminal
outlive_terminal()
started = time.monotonic()
for number in range({lines}):
    print("line", number, "x" * 100)
    print("error", number, file=sys.stderr)
with open(sys.argv[1], "w") as file:
    file.write(str(time.monotonic() - started))
"""


def start(program, follower, *arguments):
    """A Python program on the terminal, which this process then no longer holds."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=follower, stderr=follower)
    os.close(follower)
    return process


def lines(count):
    return b"".join(b"line %d %s\nerror %d\n" % (n, b"x" * 100, n) for n in range(count))


def test_everything_reaches_a_console_that_reads_in_order(terminal, tmp_path):
    leader, follower = terminal
    program = PROGRAM.format(lines=5000) + "print('no end of line', end='')"
    process = start(program, follower, tmp_path / "seconds")
    assert read_all(leader) == lines(5000) + b"no end of line"
    assert process.wait() == 0


def test_a_program_ends_although_its_terminal_does_not_read(terminal, tmp_path):
    leader, follower = terminal
    process = start(PROGRAM.format(lines=5000), follower, tmp_path / "seconds")
    assert process.wait(timeout=60) == 0
    assert float((tmp_path / "seconds").read_text()) < 20
    seen = read_all(leader)
    assert seen and lines(1000).startswith(seen[:50_000]) and b"error 4999" not in seen


def test_a_terminal_that_reads_again_shows_the_newest_lines_and_how_much_is_missing(terminal, tmp_path):
    leader, follower = terminal
    program = PROGRAM.format(lines=5000) + "time.sleep(3); print('end')"
    process = start(program, follower, tmp_path / "seconds")
    while not (tmp_path / "seconds").exists():
        time.sleep(0.05)
    before, note, after = re.split(rb"\n\[(\d+) bytes not shown here: .*\]\n", read_all(leader))
    assert process.wait() == 0
    assert lines(5000).startswith(before) and (lines(5000) + b"end\n").endswith(after)
    assert after.count(b"\n") == pytest.approx(1000, abs=2)
    assert len(before) + int(note) + len(after) == pytest.approx(len(lines(5000)), rel=0.01)


def test_a_closed_terminal_neither_stops_nor_fails_a_program(tmp_path):
    leader, follower = pty.openpty()
    program = "import sys; sys.stdin.read()\n" + PROGRAM.format(lines=5000)
    command = [sys.executable, "-c", program, str(tmp_path / "seconds")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=follower, stderr=follower)
    os.close(follower)
    os.close(leader)
    process.communicate(timeout=60)
    assert process.returncode == 0 and float((tmp_path / "seconds").read_text()) < 20
