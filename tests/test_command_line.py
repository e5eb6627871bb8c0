"""Errors in a command line: all of them at once, without the usage text."""

import subprocess
import sys

import pytest

from mvlm_core.command_line import CommandLine
from mvlm_core.errors import UserError
from tests.helpers import REPOSITORY

BAD = "--batch_size x --learning-rate 0.1 --max_hours 1h --colour=red"
PROBLEMS = [
    "error: --batch_size x: not a whole number",
    "error: --max_hours 1h: not a number",
    "error: --learning-rate: no such option; did you mean --learning_rate?",
    "error: --colour: no such option; --help lists the options",
]


def parser():
    parser = CommandLine("")
    parser.add_argument("--steps", type=int)
    parser.add_argument_group("group").add_argument("--rates", type=float, nargs="+")
    return parser


@pytest.mark.parametrize("script", ("mvlm_trainer.py", "SIM-ONE Training/enhanced_train.py"))
def test_a_trainer_names_every_malformed_number_and_unknown_option(script):
    done = subprocess.run([sys.executable, REPOSITORY / script, *BAD.split()], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and sorted(done.stderr.splitlines()) == sorted(PROBLEMS)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--steps", "--steps: expected one argument; --help lists the options"),
        ("--steps 1 more text", "unexpected: more text; --help lists the options"),
        ("--step 1", "--step: no such option; did you mean --steps?"),
        ("--rates 0.1 x 0.2 y", "--rates x: not a number; --rates y: not a number"),
    ],
)
def test_an_error_says_what_is_wrong(arguments, problem):
    with pytest.raises(UserError) as caught:
        parser().parse_args(arguments.split())
    assert str(caught.value) == problem


def test_numbers_are_parsed():
    assert vars(parser().parse_args("--steps -3 --rates 1e-3 2".split())) == {"steps": -3, "rates": [1e-3, 2.0]}
