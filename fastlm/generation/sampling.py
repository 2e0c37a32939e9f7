"""Sampling: the next token of every row from its logits.

    p = softmax(logits / temperature)    of the top_k largest, then of the smallest set whose p reaches top_p
    token = first id whose cumulative p exceeds u, a Philox number of seed, prompt, sequence and step
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from fastlm.backends import native
from fastlm.backends.machine import machine_why_not
from fastlm.backends.philox import philox
from fastlm.dispatch.forcing import forced

BAD = -2  # in place of a token


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn: the ids below `choices`, the largest at temperature 0, of top_k and top_p (None: all)."""

    choices: int
    temperature: float
    top_k: int | None
    top_p: float | None

    def __call__(self, logits, uniform):
        """`choose` of logits (B, V); on a CPU the native kernel, where it was built."""
        logits = logits[:, : self.choices]
        native_here = logits.device.type == "cpu" and machine_why_not("cpu") is None
        if not native_here or forced("decode_attention") is not None:
            return choose(logits, self.temperature, self.top_k, self.top_p, uniform)
        return native.cpu.draw(logits.float(), uniform, **self.fields)

    @property
    def fields(self):
        """The settings as the kernels take them (csrc/fastlm.h, Draw)."""
        return {"temperature": float(self.temperature), "top_k": min(self.top_k or 0, self.choices),
                "top_p": 1.0 if self.top_p is None else float(self.top_p)}


def check_sampling(temperature, top_k, top_p, seed):
    """Raises ValueError for settings that describe no draw."""
    if not (isinstance(temperature, Real) and math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature!r}, wanted a finite number ≥ 0 (0 is greedy)")
    if top_k is not None and not (isinstance(top_k, Integral) and top_k >= 1):
        raise ValueError(f"top_k is {top_k!r}, wanted a whole number ≥ 1, or None for all tokens")
    if top_p is not None and not (isinstance(top_p, Real) and 0 < top_p <= 1):
        raise ValueError(f"top_p is {top_p!r}, wanted 0 < top_p ≤ 1, or None for all tokens")
    if seed is not None and not (isinstance(seed, Integral) and 0 <= seed < 2**64):
        raise ValueError(f"seed is {seed!r}, wanted a whole number from 0 to 2^64 - 1, or None")


def uniforms(seed, prompts, sequences, steps, device, first=0):
    """Numbers in [0, 1), fp64 (prompts · sequences, steps), a row for every sequence of every prompt from the `first`.

    Each depends on seed, the numbers of prompt and sequence, and step alone, not on how many there are.
    """
    prompt = torch.arange(first, first + prompts, device=device)[:, None, None]
    sequence, step = torch.arange(sequences, device=device)[:, None], torch.arange(steps, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    high, low, _, _ = philox((step, sequence, prompt, zero), (zero + seed % 2**32, zero + seed // 2**32))
    bits = (high >> 5 << 26) | (low >> 6)  # 53 of them, as many as fp64 holds
    return (bits.double() * 2.0**-53).flatten(0, 1)


def choose(logits, temperature, top_k, top_p, uniform):
    """The next token of every row, int64 (B,), below V; BAD where a row is no distribution (NaN, +inf, all -inf).

    logits (B, V); temperature 0 takes the largest (the lowest id of equals), otherwise uniform (B,), fp64 in
    [0, 1), decides. Equals of the top_k-th are kept; of equals at the border of top_p the lowest ids are.
    """
    top, first = logits.float().max(dim=-1)
    good = torch.isfinite(top)  # the maximum of a row with NaN is NaN
    if temperature == 0:
        return torch.where(good, first, BAD)
    # In fp64, and with a largest of 0, no temperature overflows or is rounded to 0.
    logits = (logits.double() - top[:, None]) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    p = torch.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        ordered, ids = p.sort(dim=-1, descending=True, stable=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # what lies before already reaches top_p
        p = p.masked_fill(torch.zeros_like(outside).scatter_(-1, ids, outside), 0.0)
    total = p.cumsum(-1)
    drawn = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)[:, 0]
    # Where the product rounds up to the total it is the last id that has a probability.
    last = p.shape[-1] - 1 - (p > 0).flip(-1).int().argmax(-1)
    return torch.where(good, torch.minimum(drawn, last), BAD)
