#!/usr/bin/env python3
"""Train model 2, Enhanced SIM-ONE, with default settings; enhanced_train.py takes flags."""

from enhanced_train import main

from mvlm_core.command_line import CommandLine
from mvlm_core.errors import run_main


def train() -> int:
    CommandLine(__doc__).parse_args()
    return main([])


if __name__ == "__main__":
    run_main(train)
