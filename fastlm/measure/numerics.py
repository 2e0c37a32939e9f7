"""The numerics policy, in one place: how far from the truth a kernel may be.

The truth is the op in fp64; the measure is PyTorch's own plain composition of the op in the kernel's dtype:

    fp32         largest error ≤ 4 × PyTorch's + 4 ulp of the largest value
    bf16, fp16   largest error ≤ 2 × PyTorch's + 1 rounding unit of the largest value (backward 3 ×), and, where
                 there are more than 4096 elements, mean error ≤ 1.2 × PyTorch's (backward 1.5 ×) + 1/64 unit
"""

import math
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by the names that people write


@dataclass(frozen=True)
class Comparison:
    """Largest and mean error of a result, and what is allowed; mean_allowed is None where no mean is held."""

    error: float
    allowed: float
    mean_error: float
    mean_allowed: float | None

    @property
    def ratio(self):
        """Error over allowed, the worse of largest and mean: the result holds where it is at most 1; inf for NaN."""
        if self.error != self.error:  # the largest of several ratios must not lose it
            return math.inf
        largest = self.error / self.allowed if self.allowed else float(self.error > 0)
        return largest if self.mean_allowed is None else max(largest, self.mean_error / self.mean_allowed)


def compare(got, composed, truth, *, backward=False):
    """Compares `got` with `truth` (fp64), measured by `composed` of got's dtype; all of one shape, not empty.

    Raises AssertionError where NaN and infinity are not where the truth has them.
    """
    got_, composed_ = got.double(), composed.double()
    odd = ~torch.isfinite(truth)
    same = (got_ == truth) | (got_.isnan() & truth.isnan())
    if not same[odd].all():
        raise AssertionError(f"{got_[odd & ~same][:4]} where the truth is {truth[odd & ~same][:4]}")
    error = (got_ - truth).abs().masked_fill(odd, 0.0)
    theirs = (composed_ - truth).abs().masked_fill(odd | ~torch.isfinite(composed_), 0.0)
    largest = truth.abs().masked_fill(odd, 0.0).max()
    unit = torch.finfo(got.dtype).eps * largest + torch.finfo(got.dtype).smallest_normal
    mean_allowed = None
    if got.dtype in (torch.float32, torch.float64):
        allowed = 4 * theirs.max() + 4 * unit
    else:
        allowed = (3 if backward else 2) * theirs.max() + unit
        if got.numel() > 4096:
            mean_allowed = float((1.5 if backward else 1.2) * theirs.mean() + unit / 64)
    return Comparison(float(error.max()), float(allowed), float(error.mean()), mean_allowed)


def norm_ratio(got, composed, truth, *, least=0.0):
    """Error over allowed by tensor norm, where rounding adds up over layers: 4 × the composition's + 8 units.

    least: the relative error that the composition may have had by luck alone, where the quantity is a single number.
    """
    error, theirs = (float((value.double() - truth).norm()) for value in (got, composed))
    theirs = max(theirs, least * float(truth.norm()))
    allowed = 4 * theirs + 8 * torch.finfo(got.dtype).eps * float(truth.norm())
    return error / allowed if error == error else math.inf
