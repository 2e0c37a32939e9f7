"""Sampling: the next token of every row from its logits."""

import math

import torch

from fastlm.philox import philox


def check_sampling(temperature, top_k, top_p):
    """Raises ValueError for settings that describe no distribution."""
    if not (isinstance(temperature, (int, float)) and math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature!r}, wanted a finite number ≥ 0 (0 is greedy)")
    if top_k is not None and not (isinstance(top_k, int) and top_k >= 1):
        raise ValueError(f"top_k is {top_k!r}, wanted a whole number ≥ 1, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p!r}, wanted 0 < top_p ≤ 1, or None")


def uniforms(seed, rows, steps, device):
    """Numbers in [0, 1), fp64 (rows, steps): entry (r, i) depends on seed, r and i alone, not on the batch's size."""
    row, step = torch.arange(rows, device=device)[:, None], torch.arange(steps, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    high, low, _, _ = philox((step, row, zero, zero), (zero + seed % 2**32, zero + seed // 2**32))
    return ((high >> 5) * 2.0**26 + (low >> 6)).double() * 2.0**-53


def choose(logits, temperature, top_k, top_p, uniform):
    """The next token of every row, int64 (B,), always below V.

    logits (B, V); temperature 0 takes the largest (the lowest id of equals); otherwise a draw from
    softmax(logits / temperature) over the top_k largest, then the smallest set whose probability reaches top_p, with
    uniform (B,) fp64 in [0, 1). Raises RuntimeError where a row is no distribution (NaN, +inf, or all -inf).
    """
    logits = logits.float()
    top, first = logits.max(dim=-1)
    if not torch.isfinite(top).all() or torch.isnan(logits).any():
        row = int((~torch.isfinite(top) | torch.isnan(logits).any(-1)).nonzero()[0])
        raise RuntimeError(f"the logits of row {row} hold NaN or infinity; are the model's weights good?")
    if temperature == 0:
        return first
    logits = (logits - top[:, None]) / temperature  # the largest is 0, so a small temperature cannot overflow
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    p = torch.softmax(logits.double(), dim=-1)
    if top_p is not None and top_p < 1:
        ordered, ids = p.sort(dim=-1, descending=True, stable=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # what lies before already reaches top_p
        p = p.masked_fill(torch.zeros_like(outside).scatter_(-1, ids, outside), 0.0)
    total = p.cumsum(-1)
    drawn = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)[:, 0]
    # uniform · total rounds up to total at most: then the last id that has a probability.
    last = p.shape[-1] - 1 - (p > 0).flip(-1).int().argmax(-1)
    return torch.minimum(drawn, last)
