"""Loader: batches of token windows, a pure function of the seed and the step.

Sequence n of a run lies in epoch n // windows. Every epoch cuts each shard into windows of T+1 tokens at a
new random offset and visits them in a new random order, so each token is read once an epoch, but for fewer
than 2T at a shard's edges. Nothing is kept between calls: a run that resumes at step i reads what one that
never stopped would have read, and a step's sequences are the same however they are divided into micro-batches
or among processes. Windows do not cross shards. Offsets and order come from Philox's raw numbers, which numpy
promises never to change.
"""

import bisect
import functools
import itertools

import numpy as np
import torch


class Loader:
    """Batches of (tokens, targets) from `shards`, {name: 1-D token array} as `read_split` gives.

    `windows` is the number of sequences an epoch, `tokens` that of all tokens. Raises ValueError where no
    shard holds a sequence and its target, and, when a batch is read, for token ids outside the vocabulary.
    """

    def __init__(self, shards, sequence_length, batch_size, vocab_size, seed=0):
        for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"Loader: {name} is {value}, wanted at least 1")
        if not 0 <= seed < 2**64:
            raise ValueError(f"Loader: seed is {seed}, wanted 0 to 2**64 - 1")
        if not shards:
            raise ValueError("Loader: no shards; make them with `fastlm data prepare`")
        self.shards, self.sequence_length, self.batch_size = dict(shards), sequence_length, batch_size
        self.vocab_size, self.seed = vocab_size, seed
        self._names, self._arrays = list(self.shards), list(self.shards.values())
        self.tokens = sum(map(len, self._arrays))
        T = sequence_length
        # One window less than fits leaves room for a random offset; a shard of a single window keeps it.
        counts = [max((len(array) - T) // T, int(len(array) > T)) for array in self._arrays]
        self._slack = [max(len(array) - 1 - count * T, 0) for array, count in zip(self._arrays, counts)]
        self._ends = list(itertools.accumulate(counts))  # the number of windows up to and with each shard
        self.windows = self._ends[-1]
        if not self.windows:
            longest = max(map(len, self._arrays))
            shorter = f"set sequence_length to {longest - 1} or less, or " if longest > 1 else ""
            raise ValueError(
                f"{self._names[0]}: a sequence of {T} and its target need {T + 1} tokens, but the "
                f"longest shard has {longest}; {shorter}add text"
            )
        self._epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def batch(self, step, first=0, count=None):
        """(tokens, targets, index) of `count` sequences from the `first` of a step's, int64 (count, T) each.

        targets[b, t] follows tokens[b, t]; index is the number of the first sequence in the whole run.
        """
        count = self.batch_size - first if count is None else count
        if step < 0 or first < 0 or count < 1 or first + count > self.batch_size:
            raise ValueError(
                f"Loader.batch: step {step}, sequences {first} to {first + count - 1}; a step has 0 to "
                f"{self.batch_size - 1}"
            )
        index = step * self.batch_size + first
        return *_split(np.stack([self._window(index + b) for b in range(count)])), index

    @property
    def targets(self):
        """How many tokens `whole` has as targets."""
        return self.tokens - len(self._arrays)

    def whole(self, batch_size, most=None):
        """(tokens, targets) over the whole split in order, or the first `most` targets of it.

        Every token but each shard's first is once a target. Full windows come in batches of up to
        `batch_size`; a shard's end, and that of `most`, comes as (1, less than T).
        """
        T, left = self.sequence_length, self.targets if most is None else most
        for tokens, targets in self._whole(batch_size):
            if targets.numel() > left:
                rows, rest = divmod(left, T)
                if rows:
                    yield tokens[:rows], targets[:rows]
                if rest:
                    yield tokens[rows : rows + 1, :rest], targets[rows : rows + 1, :rest]
                return
            yield tokens, targets
            left -= targets.numel()

    def _whole(self, batch_size):
        T = self.sequence_length
        for array, name in zip(self._arrays, self._names):
            full = (len(array) - 1) // T
            for at in range(0, full, batch_size):
                rows = min(batch_size, full - at)
                tokens = self._read(array, name, at * T, rows * T + 1)
                yield _split(np.lib.stride_tricks.sliding_window_view(tokens, T + 1)[::T].copy())
            if full * T + 1 < len(array):
                yield _split(self._read(array, name, full * T, len(array) - full * T)[None])

    def _window(self, index):
        """The tokens (T+1,) of sequence `index` of the run."""
        epoch, at = divmod(index, self.windows)
        offsets, order = self._epoch(epoch)
        at = int(order[at])
        shard = bisect.bisect_right(self._ends, at)
        before = self._ends[shard - 1] if shard else 0
        start = offsets[shard] + (at - before) * self.sequence_length
        return self._read(self._arrays[shard], self._names[shard], start, self.sequence_length + 1)

    def _epoch(self, epoch):
        """An epoch's offset in every shard, and the order (windows,) of all windows."""
        random = np.random.Philox(key=[self.seed, epoch])
        # Below T, so that an epoch leaves out less than a window at the front.
        rooms = [min(self.sequence_length - 1, slack) + 1 for slack in self._slack]
        offsets = [int(number) % room for number, room in zip(random.random_raw(len(rooms)), rooms)]
        order = np.argsort(random.random_raw(self.windows), kind="stable")
        return offsets, order.astype(np.uint32) if self.windows < 2**32 else order

    def _read(self, array, name, start, length):
        window = np.asarray(array[start : start + length], dtype=np.int64)
        if window.max() >= self.vocab_size or window.min() < 0:
            at = start + int(np.argmax((window >= self.vocab_size) | (window < 0)))
            raise ValueError(
                f"{name}: token id {int(array[at])} at {at}, but the vocabulary has {self.vocab_size}; "
                "was the data prepared with another tokenizer?"
            )
        return window


def _split(windows):
    """tokens (B, T) and targets (B, T) of windows (B, T+1)."""
    windows = torch.from_numpy(windows)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
