"""Holds results to the numerics policy (fastlm.measure.numerics), remembers the worst, and makes the numbers to try."""

import torch

from fastlm.measure.numerics import compare

WORST: dict = {}  # (what, backend, dtype) → worst error / allowed


def close(what, backend, got, composed, truth, *, backward=False):
    """Raises AssertionError where `got` is further from `truth` (fp64) than the policy allows by `composed`."""
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(truth.shape)}"
    if not truth.numel():
        return
    found = compare(got, composed, truth, backward=backward)
    key = what, backend, str(got.dtype).removeprefix("torch.")
    WORST[key] = max(WORST.get(key, 0.0), found.ratio)
    assert found.ratio <= 1, f"{what} on {backend}: {found}"


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
