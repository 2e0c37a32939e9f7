"""The classical baseline of a language model: how well the previous token alone predicts the next."""

import numpy as np


def bigram_loss(train, held_out, vocab_size, *, strengths=(0.1, 0.3, 1, 3, 10, 30, 100)):
    """Nats per token of a bigram model on `held_out`, 1-D arrays of token ids.

    p(b | a) = (count(a, b) + k p(b)) / (count(a) + k), with p(b) = (count(b) + 1) / (N + V) over the training tokens
    and the best of the `strengths` k, chosen on the held-out text itself: no bigram of this form does better.
    """
    train, held_out = np.asarray(train, dtype=np.int64), np.asarray(held_out, dtype=np.int64)
    if len(train) < 2 or len(held_out) < 2:
        raise ValueError(f"bigram_loss: got {len(train)} and {len(held_out)} tokens, wanted at least 2 of each")
    unigram = (np.bincount(train, minlength=vocab_size) + 1) / (len(train) + vocab_size)
    seen, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    firsts = np.bincount(train[:-1], minlength=vocab_size)
    before, after = held_out[:-1], held_out[1:]
    pairs = before * vocab_size + after
    at = np.searchsorted(seen, pairs).clip(max=len(seen) - 1)
    together = np.where(seen[at] == pairs, counts[at], 0)
    losses = [
        -np.log((together + k * unigram[after]) / (firsts[before] + k)).mean() for k in strengths
    ]
    return float(min(losses))
