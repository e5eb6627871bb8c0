"""Preset values specific to the Bible corpus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from bible_corpus.books import PRIMARY_TRANSLATION
from mvlm_core.settings import FINE_TUNING, TrainingSettings


@dataclass
class BibleSettings(TrainingSettings):
    """Training settings whose small presets upweight or select the primary translation."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # Half of the training text is the primary translation, the other half all translations equally.
        "cpu": {"train_mix": f"bible/{PRIMARY_TRANSLATION}=16"},
        "smoke": {"data_subset": f"bible/{PRIMARY_TRANSLATION}"},
        FINE_TUNING: {"train_mix": None, "data_subset": None},  # fine-tuning uses the user's text
    }
