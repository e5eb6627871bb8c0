"""What the presets read of this corpus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from bible_corpus.books import PRIMARY_TRANSLATION
from mvlm_core.settings import CONTINUED, TrainingSettings


@dataclass
class BibleSettings(TrainingSettings):
    """Training settings whose small presets weight or select the primary translation."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # Half of the text that is read is the primary translation, the other half all translations alike.
        "cpu": {"train_mix": f"bible/{PRIMARY_TRANSLATION}=16"},
        "smoke": {"data_subset": f"bible/{PRIMARY_TRANSLATION}"},
        CONTINUED: {"train_mix": None, "data_subset": None},  # the text is the user's
    }
