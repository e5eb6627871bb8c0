"""Model 2's tokenizer: byte-level BPE with a pre-tokenizer of its own."""

from __future__ import annotations

from typing import ClassVar

from tokenizers import Regex, pre_tokenizers

from mvlm_core.data.tokenizer import ByteLevelBPE

# A word includes the preceding space; digits split into groups of at most three; a run of punctuation includes the
# following line break, so that the end of a verse is usually one token instead of two.
_PIECES = r" ?\p{L}+(?:['\u2019]\p{L}+)?| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class AdvancedBPETokenizer(ByteLevelBPE):
    """Byte-level BPE with a custom pre-tokenizer: ``train``, ``encode``, ``decode``, ``save`` and ``load``.

    Verses and chapters are separated by line breaks, which are ordinary text, so the only structural tokens are
    ``<bos>`` and ``<eos>`` around each document.
    """

    SPECIAL_TOKENS: ClassVar[dict[str, str]] = {
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
    }

    @classmethod
    def pre_tokenizer(cls) -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )


BiblicalBPETokenizer = AdvancedBPETokenizer
