"""Training code of model 2: settings, tokenizer, losses and trainer.

Submodules are imported lazily, so that ``--help`` needs only the settings and does not load torch.
"""

from importlib import import_module
from typing import Any

_SUBMODULE_OF = {
    "AdvancedBPETokenizer": "advanced_tokenizer",
    "BiblicalBPETokenizer": "advanced_tokenizer",
    "ComprehensiveTrainingLoss": "advanced_losses",
    "EnhancedPrioritaryTrainer": "enhanced_trainer",
    "PrioritaryConfig": "config",
    "RECIPE": "enhanced_trainer",
}
__all__ = list(_SUBMODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULE_OF:
        return getattr(import_module(f"{__name__}.{_SUBMODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
