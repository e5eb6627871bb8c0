"""What transformers and tokenizers read once, when they are imported, is set here, before anything imports them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # tests run side by side, and spinning threads starve each other
os.environ.setdefault("MPLBACKEND", "Agg")
