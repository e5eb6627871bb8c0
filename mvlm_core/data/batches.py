"""Stateless data loading: batch N is a pure function of the seed and N, so the step determines the data order.

Every epoch the documents are shuffled and concatenated, the result is cut into sequences from a random offset, and the
sequences are visited in random order. The only state is a cache of the current epoch's order, so a resumed run reads
exactly what an uninterrupted one would have read.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from mvlm_core.data.token_store import TokenStore
from mvlm_core.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Sequences of training text.

    Attributes:
        inputs, targets: ``[sequences, context]`` int64; targets are the inputs shifted by one.
        weights: ``[sequences, context]`` float32, the content-alignment weight of each target's document.
        text_bytes: UTF-8 bytes of the targets.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    text_bytes: int


class BatchSource:
    """Batches of ``batch_size`` sequences of ``context`` tokens.

    Args:
        replay: another text that supplies ``replay_share`` of the sequences, evenly interleaved; epochs still count
            passes over ``store``.
    Raises:
        UserError: the text is shorter than one sequence.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        context: int,
        batch_size: int,
        seed: int,
        replay: BatchSource | None = None,
        replay_share: Fraction = Fraction(0),
    ) -> None:
        self.store, self.context, self.batch_size, self.seed = store, context, batch_size, seed
        self.replay, self.replay_share = replay, replay_share
        self.tokens_per_epoch = int((np.diff(store.starts) * store.repeats).sum())
        self.sequences_per_epoch = (self.tokens_per_epoch - 1) // context
        if self.sequences_per_epoch < 1:
            raise UserError(
                f"the training text has {self.tokens_per_epoch} tokens, fewer than one sequence of --max_length "
                f"{context}: add text or reduce --max_length"
            )
        self._epoch = -1

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * self.context

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token, including replay."""
        if self.replay is None:
            return self.store.bytes_per_token
        share = float(self.replay_share)
        return (1 - share) * self.store.bytes_per_token + share * self.replay.store.bytes_per_token

    def epoch_at(self, step: int) -> float:
        """Epochs completed after ``step`` batches."""
        return float(step * self.batch_size * (1 - self.replay_share) / self.sequences_per_epoch)

    def steps_for_epochs(self, epochs: float) -> int:
        return max(1, round(epochs * self.sequences_per_epoch / self.batch_size / float(1 - self.replay_share)))

    def batch(self, number: int, first: int = 0, count: int | None = None) -> Batch:
        """Return sequences ``[first, first + count)`` of batch ``number`` (all by default)."""
        count = self.batch_size - first if count is None else count
        start = number * self.batch_size + first
        rows = [self._row(start + offset) for offset in range(count)]
        inputs, targets = (np.stack([row[n] for row in rows]).astype(np.int64) for n in range(2))
        weights = np.stack([row[2] for row in rows]).astype(np.float32)
        return Batch(inputs, targets, weights, int(self.store.token_bytes[targets].sum()))

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, targets and weights of sequence ``number``, counted from the start of training."""
        if self.replay is None:
            return self._sequence(number)
        replayed = number * self.replay_share // 1  # replayed sequences before this one
        if (number + 1) * self.replay_share // 1 > replayed:
            return self.replay._sequence(replayed)
        return self._sequence(number - replayed)

    def _sequence(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, targets and weights of the ``number``-th sequence drawn from this text."""
        epoch, index = divmod(number, self.sequences_per_epoch)
        self._shuffle(epoch)
        begin = self._shift + int(self._order[index]) * self.context
        tokens, weights = self._read(np.arange(begin, begin + self.context + 1) % self.tokens_per_epoch)
        return tokens[:-1], tokens[1:], weights[1:]

    def _read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and weights at positions in the current epoch's concatenated text."""
        documents = np.searchsorted(self._starts, positions, side="right") - 1
        source = positions - self._starts[documents] + self.store.starts[self._documents[documents]]
        return self.store.tokens[source], self.store.weights[self._documents[documents]]

    def _shuffle(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        lengths = np.diff(self.store.starts)
        self._documents = random.permutation(np.repeat(np.arange(len(lengths)), self.store.repeats))
        self._starts = np.concatenate(([0], np.cumsum(lengths[self._documents])))[:-1]
        # The text wraps around, so with a random offset no token is read twice in an epoch and none is always left out.
        self._shift = int(random.integers(self.tokens_per_epoch))
        self._order = random.permutation(self.sequences_per_epoch)
        self._epoch = epoch
