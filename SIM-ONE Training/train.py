#!/usr/bin/env python3
"""Train model 2, Enhanced SIM-ONE, with default settings; enhanced_train.py takes flags."""

import argparse

from enhanced_train import main

from mvlm_core.errors import run_main

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    run_main(lambda: main([]))
