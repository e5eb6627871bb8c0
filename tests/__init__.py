"""Sets the environment variables that transformers and tokenizers read only once, on import."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # tests run side by side, and spinning threads starve each other
os.environ.setdefault("MPLBACKEND", "Agg")
