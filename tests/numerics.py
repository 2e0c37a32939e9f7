"""The numerics policy, in one place: how far from the truth a kernel may be.

The truth is the op in fp64; the measure is PyTorch's own plain composition of the op in the kernel's dtype:

    fp32         largest error ≤ 4 × PyTorch's + 4 ulp of the largest value
    bf16, fp16   largest error ≤ 2 × PyTorch's + 1 rounding unit of the largest value (backward 3 ×), and, where
                 there are more than 4096 elements, mean error ≤ 1.2 × PyTorch's (backward 1.5 ×) + 1/64 unit
"""

import torch

WORST: dict = {}  # (what, backend, dtype) → worst error / allowed


def close(what, backend, got, composed, truth, *, backward=False):
    """Raises AssertionError where `got` is further from `truth` (fp64) than the policy allows by `composed`."""
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(truth.shape)}"
    if not truth.numel():
        return
    got_, composed_ = got.double(), composed.double()
    odd = ~torch.isfinite(truth)
    same = (got_ == truth) | (got_.isnan() & truth.isnan())
    assert same[odd].all(), f"{what}: {got_[odd & ~same][:4]} where the truth is {truth[odd & ~same][:4]}"
    error = (got_ - truth).abs().masked_fill(odd, 0.0)
    theirs = (composed_ - truth).abs().masked_fill(odd | ~torch.isfinite(composed_), 0.0)
    largest = truth.abs().masked_fill(odd, 0.0).max()
    unit = torch.finfo(got.dtype).eps * largest + torch.finfo(got.dtype).smallest_normal
    if got.dtype in (torch.float32, torch.float64):
        allowed = 4 * theirs.max() + 4 * unit
    else:
        allowed = (3 if backward else 2) * theirs.max() + unit
        if got.numel() > 4096:
            mean = (1.5 if backward else 1.2) * theirs.mean() + unit / 64
            assert error.mean() <= mean, f"{what} on {backend}: mean error {error.mean():.2e}, allowed {mean:.2e}"
    ratio = float(error.max() / allowed)
    key = what, backend, str(got.dtype).removeprefix("torch.")
    WORST[key] = max(WORST.get(key, 0.0), ratio)
    assert ratio <= 1, f"{what} on {backend}: error {error.max():.2e}, allowed {allowed:.2e}, largest {largest:.2e}"


def table():
    """WORST as lines of text: a row per quantity, a column per backend and dtype."""
    columns = sorted({key[1:] for key in WORST})
    yield " " * 24 + "".join(f"{backend + ' ' + dtype.replace('float', 'f'):>20}" for backend, dtype in columns)
    for what in sorted({key[0] for key in WORST}):
        cells = (WORST.get((what, *column)) for column in columns)
        yield f"{what:24}" + "".join(f"{'' if cell is None else f'{cell:.2f}':>20}" for cell in cells)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(kind, shape, dtype, seed=0):
    """Numbers to try a kernel on: normal, scale 30, offset 100, one outlier, all equal, tiny (denormals)."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "scale 30":
        x = x * 30
    elif kind == "offset 100":
        x = x + 100
    elif kind == "outlier" and x.numel():
        x.view(-1)[x.numel() // 2] = 3e4
    elif kind == "equal":
        x = torch.full_like(x, 0.7)
    elif kind == "tiny":
        x = x * 1e-40
    return x.to(dtype)


KINDS = ("normal", "scale 30", "offset 100", "outlier", "equal", "tiny")
