#!/usr/bin/env python3
"""Train model 2, Enhanced SIM-ONE: rotary position embeddings, SwiGLU, RMSNorm and governance heads."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for a Python in which this project is not installed

import prioritary_mvlm
from mvlm_core.command_line import trainer_settings
from mvlm_core.errors import run_main
from mvlm_core.settings import REPOSITORY_ROOT
from prioritary_mvlm.config import NAME, PrioritaryConfig

OUTPUT_DIR = REPOSITORY_ROOT / "models" / NAME
EXAMPLES = """examples:
  python enhanced_train.py                       train with the preset for this machine
  python enhanced_train.py --preset smoke        one-minute smoke test
  python enhanced_train.py --no_policy_head --coherence_weight 0.2
  python enhanced_train.py --init_from ../models/simone_enhanced --data_dir ../my_texts \\
      --output_dir ../models/fine_tuned --replay ../mvlm_training_dataset_complete=0.2
                                                 fine-tune a trained model on your own text
If interrupted, run the same command again, without --fresh: training resumes from the newest checkpoint.
"""


def main(arguments: list[str] | None = None) -> int:
    config = trainer_settings(PrioritaryConfig, arguments, description=__doc__, epilog=EXAMPLES, output_dir=OUTPUT_DIR)
    from mvlm_core.training.launch import train

    command = [__file__, *(sys.argv[1:] if arguments is None else arguments)]
    return train(lambda: prioritary_mvlm.RECIPE, config, command)


if __name__ == "__main__":
    run_main(main)
