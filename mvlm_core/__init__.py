"""Code shared by both models: corpus, tokens, batches, training loop, checkpoints, evaluation, export."""

import importlib.util
import sys

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("tqdm") is None:
    print(
        f"error: {sys.executable} lacks the packages of this project: run `bash setup_environment.sh` once, then "
        "use .venv/bin/python instead of python",
        file=sys.stderr,
    )
    raise SystemExit(2)
