"""Model 2's training: settings, tokenizer, losses and trainer.

Names are imported on first use, so that the settings alone answer ``--help`` without loading torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "AdvancedBPETokenizer": "advanced_tokenizer",
    "BiblicalBPETokenizer": "advanced_tokenizer",
    "ComprehensiveTrainingLoss": "advanced_losses",
    "EnhancedPrioritaryTrainer": "enhanced_trainer",
    "PrioritaryConfig": "config",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
