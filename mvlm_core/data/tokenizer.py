"""Lossless byte-level BPE, the base class of both models' tokenizers."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mvlm_core.errors import Stopped, UserError
from mvlm_core.files import read_regular, write_atomic

_MAX_WORD_LENGTH = 1000  # characters; BPE training is quadratic in the length of a word
_TOO_LONG = re.compile(rf"\S{{{_MAX_WORD_LENGTH}}}")
# Byte-level BPE maps each byte to one of 256 visible characters (Radford et al. 2019), so a token's length in
# characters is the number of bytes it encodes.
_ROUND_TRIP_SAMPLE = "In the beginning  God\tcreated\n\n\u2018heaven\u2019 \u00e9\U0001f54a <eos> <|endoftext|>\r\n"
log = logging.getLogger("mvlm")


class ByteLevelBPE:
    """Byte-level BPE tokenizer; a subclass sets its special tokens and pre-tokenizer.

    The text of a special token in a document is encoded as ordinary text; special tokens are only added by id.
    """

    SPECIAL_TOKENS: ClassVar[dict[str, str]] = {}
    """Role (transformers' name: ``bos_token``, …) to text, in id order."""
    SPECIAL_TOKENS_LAST: ClassVar[bool] = False
    """Whether special ids come after the ordinary ones, as in GPT-2, or first."""
    END_ROLE: ClassVar[str | None] = "eos_token"

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer

    @classmethod
    def pre_tokenizer(cls) -> pre_tokenizers.PreTokenizer:
        """Return the pre-tokenizer, which splits text into pieces that no token spans."""
        raise NotImplementedError

    @classmethod
    def _with_model(cls, model: models.BPE) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = cls.pre_tokenizer()
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    @classmethod
    def rules(cls) -> str:
        """Cache key of everything besides text and size that determines the result of ``train``."""
        empty = cls._with_model(models.BPE()).to_str()
        return json.dumps([tokenizers.__version__, empty, cls.SPECIAL_TOKENS, cls.SPECIAL_TOKENS_LAST])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 32_000, *, show_progress: bool = False) -> Self:
        """Train a vocabulary of ``vocab_size`` entries including special tokens (fewer if the text is too small).

        Raises:
            UserError: ``vocab_size`` is too small for the 256 bytes and the special tokens.
        """
        specials = list(dict.fromkeys(cls.SPECIAL_TOKENS.values()))  # one token may have several roles
        if vocab_size < 256 + len(specials):
            raise UserError(
                f"vocab_size {vocab_size} is too small: at least {256 + len(specials)} (256 bytes and {len(specials)} "
                "special tokens)"
            )
        tokenizer = cls._with_model(models.BPE())
        added = [AddedToken(text, special=True, normalized=False) for text in specials]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(specials) if cls.SPECIAL_TOKENS_LAST else vocab_size,
            special_tokens=[] if cls.SPECIAL_TOKENS_LAST else added,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=show_progress,
        )
        tokenizer.train_from_iterator(_split_long_words(texts), trainer)
        if cls.SPECIAL_TOKENS_LAST:
            tokenizer.add_special_tokens(added)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Load ``tokenizer.json`` or a folder with it.

        Raises:
            UserError: no such file, not a tokenizer, or not lossless.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            if not file.is_file():
                raise UserError(f"no tokenizer at {path}: expected tokenizer.json")
            tokenizer = Tokenizer.from_str(_checked_json(file))
            tokenizer.no_truncation()  # the file may enable truncation or padding
            tokenizer.no_padding()
            tokenizer.post_processor = None  # transformers adds one, for special tokens, which `encode` leaves out
        except (UserError, Stopped, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in the Rust library is a BaseException
            raise UserError(f"{file} is not a readable tokenizer: {error}") from None
        loaded = cls(tokenizer)
        loaded._check(path)
        return loaded

    def _check(self, path: Path) -> None:
        missing = [text for text in self.SPECIAL_TOKENS.values() if self.tokenizer.token_to_id(text) is None]
        if missing:
            raise UserError(f"the tokenizer {path} lacks the special tokens {' '.join(missing)}")
        numbers = self.tokenizer.get_vocab(with_added_tokens=True).values()
        if set(numbers) != set(range(self.vocab_size)):
            raise UserError(f"the tokenizer {path} has {self.vocab_size} entries with ids not contiguous from 0")
        if self.decode(self.encode(_ROUND_TRIP_SAMPLE)) != _ROUND_TRIP_SAMPLE:
            raise UserError(f"the tokenizer {path} is not lossless: a byte-level BPE is needed")

    def save(self, folder: Path | str) -> Path:
        """Write ``tokenizer.json`` to ``folder``, created if missing; return its path."""
        file = Path(folder) / "tokenizer.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, self._json)
        return file

    def encode(self, text: str) -> list[int]:
        """Encode ``text`` to token ids, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode several texts in parallel."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode token ids to text, skipping special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    @cached_property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def start_id(self) -> int:
        start_id = self.token_id("bos_token")
        assert start_id is not None, "checked on load"
        return start_id

    @property
    def end_id(self) -> int | None:
        return self.token_id(self.END_ROLE)

    def token_id(self, role: str | None) -> int | None:
        """Id of the special token with this role (``pad_token``, …), or None."""
        text = self.SPECIAL_TOKENS.get(role or "")
        return None if text is None else self.tokenizer.token_to_id(text)

    @cached_property
    def _json(self) -> str:
        return self.tokenizer.to_str()

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self._json.encode()).hexdigest()

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each token, 0 for special tokens: ``[vocab]`` int64."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        special = set(self.SPECIAL_TOKENS.values())
        for text, number in self.tokenizer.get_vocab(with_added_tokens=True).items():
            lengths[number] = 0 if text in special else len(text)
        return lengths

    def for_transformers(self, context: int) -> Any:
        """Convert to transformers' ``PreTrainedTokenizerFast``."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(self._json),
            model_max_length=context,
            split_special_tokens=True,
            clean_up_tokenization_spaces=False,
            padding_side="left",
            **self.SPECIAL_TOKENS,
        )


def _checked_json(file: Path) -> str:
    """Read ``tokenizer.json``. Raises ValueError if its model is not plain BPE: the library panics on some others."""
    text = read_regular(file).decode()
    value = json.loads(text)
    model = value.get("model") if isinstance(value, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ValueError("it holds no BPE model")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
        if model.get(name):
            raise ValueError(f"a byte-level BPE has no {name}")
    return text


def _split_long_words(texts: Iterable[str]) -> Iterator[str]:
    """Split texts within words of ``_MAX_WORD_LENGTH`` characters (no language has any); yield others unchanged."""
    for text in texts:
        start = 0
        if max(map(len, text.split("\n"))) >= _MAX_WORD_LENGTH:
            for word in _TOO_LONG.finditer(text):
                yield text[start : word.end()]
                start = word.end()
        yield text[start:]


def tokenizer_folder(cls: type[ByteLevelBPE], fingerprint: str, vocab_size: int, cache_dir: Path | str) -> Path:
    """Cache folder of ``cached_tokenizer`` for this text and size."""
    name = hashlib.sha256(f"{cls.rules()}:{fingerprint}:{vocab_size}".encode()).hexdigest()[:32]
    return Path(cache_dir) / "tokenizers" / name


def load_cached(cls: type[ByteLevelBPE], folder: Path) -> ByteLevelBPE | None:
    """Load a tokenizer from the cache; None if it is missing or damaged, and so must be trained again."""
    if not (folder / "tokenizer.json").exists():
        return None
    try:
        return cls.load(folder)
    except UserError as error:
        log.warning("%s; training it again", error)
        return None


def cached_tokenizer(
    cls: type[ByteLevelBPE],
    texts: Iterator[str],
    fingerprint: str,
    vocab_size: int,
    cache_dir: Path | str,
    *,
    quiet: bool,
) -> ByteLevelBPE:
    """Train the tokenizer for this training text, or load it from the cache if the text is unchanged."""
    folder = tokenizer_folder(cls, fingerprint, vocab_size, cache_dir)
    if (cached := load_cached(cls, folder)) is not None:
        return cached
    log.info("training a byte-level BPE of %s entries on the training text", f"{vocab_size:,}")
    tokenizer = cls.train(texts, vocab_size, show_progress=not quiet and sys.stderr.isatty())
    if tokenizer.vocab_size < vocab_size:
        log.info(
            "the text yields %s entries, fewer than --vocab_size %s", f"{tokenizer.vocab_size:,}", f"{vocab_size:,}"
        )
    tokenizer.save(folder)
    return tokenizer
