"""Loader: batches of token windows, a pure function of the seed and the step.

Sequence n of a run lies in epoch n // windows. Every epoch cuts each shard into windows of T+1 tokens at a new random
offset and visits them in a new random order, so each token is seen about once an epoch. Nothing is kept between
calls: a run that resumes at step i reads what one that never stopped would have read. Windows do not cross shards.
"""

import functools

import numpy as np
import torch


class Loader:
    """Batches of (tokens, targets) from shards {name: 1-D token array}."""

    def __init__(self, shards, sequence_length, batch_size, vocab_size, seed=0):
        self.shards, self._names, self._shards = shards, list(shards), list(shards.values())
        self.sequence_length, self.batch_size, self.vocab_size, self.seed = (
            sequence_length, batch_size, vocab_size, seed,
        )
        self.tokens = sum(map(len, self._shards))
        T = sequence_length
        # One window less than fits leaves room for a random offset; a shard of a single window has none.
        self._counts = [max((len(shard) - T) // T, int(len(shard) > T)) for shard in self._shards]
        self.windows = sum(self._counts)
        if not self.windows:
            raise ValueError(
                f"{self._names[0]}: {self.tokens} tokens, too few for a sequence of {T} and its target; "
                "shorten the sequences or add text"
            )
        self._order = functools.lru_cache(maxsize=2)(self._order)

    def batch(self, step, first=0, count=None):
        """(tokens, targets, index) of `count` sequences from the `first` of a step's, int64 (count, T) each.

        targets[b, t] follows tokens[b, t]; index is the number of the first sequence in the whole run.
        """
        count = self.batch_size - first if count is None else count
        index = step * self.batch_size + first
        rows = [self._window(index + b) for b in range(count)]
        return *_split(np.stack(rows)), index

    def whole(self, batch_size):
        """(tokens, targets) over the whole split in order; every token but each shard's first is a target once."""
        T = self.sequence_length
        for shard, name in zip(self._shards, self._names):
            starts = range(0, len(shard) - 1, T)
            full = [start for start in starts if start + T < len(shard)]
            for at in range(0, len(full), batch_size):
                windows = [self._read(shard, name, start, T + 1) for start in full[at : at + batch_size]]
                yield _split(np.stack(windows))
            if len(full) < len(starts):
                yield _split(self._read(shard, name, starts[-1], len(shard) - starts[-1])[None])

    def _window(self, index):
        epoch, at = divmod(index, self.windows)
        offsets, order = self._order(epoch)
        at = int(order[at])
        for shard, name, count, offset in zip(self._shards, self._names, self._counts, offsets):
            if at < count:
                return self._read(shard, name, offset + at * self.sequence_length, self.sequence_length + 1)
            at -= count
        raise AssertionError("window beyond the last shard")

    def _order(self, epoch):
        """An epoch's offset of every shard and order of the windows."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        T = self.sequence_length
        slack = [len(shard) - 1 - count * T for shard, count in zip(self._shards, self._counts)]
        offsets = [int(random.integers(min(T - 1, room) + 1)) if room > 0 else 0 for room in slack]
        return offsets, random.permutation(self.windows)

    def _read(self, shard, name, start, length):
        window = np.asarray(shard[start : start + length], dtype=np.int64)
        if window.max() >= self.vocab_size:
            at = start + int(np.argmax(window >= self.vocab_size))
            raise ValueError(
                f"{name}: token id {int(shard[at])} at {at}, but the vocabulary has {self.vocab_size}; "
                "was the data prepared with another tokenizer?"
            )
        return window


def _split(windows):
    """tokens (B, T) and targets (B, T) of windows (B, T+1)."""
    windows = torch.from_numpy(windows)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
