"""cache_append_: writes new keys and values into the pages of each sequence's cache, in place."""

import torch

from fastlm.dispatch import define
from fastlm.dispatch.table import homes
from fastlm.ops.checks import check, check_dtype, check_inner_contiguous, inner_contiguous

__all__ = ["cache_append_"]
KERNELS = homes("cache_append", "cuda", "triton", "cpu", "torch", "reference")
ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("cuda", "triton", "torch", "reference")}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cache_append_(k_pages, v_pages, k, v, block_table, positions):
    """Writes k[b, t] and v[b, t] at position positions[b, t] of sequence b's cache; -1 writes nothing.

    k_pages, v_pages (P, page, H, D), any strides with D contiguous, written in place; k, v (B, T, H, D) of the same
    dtype; block_table (B, max_pages) int32; positions (B, T) int32, no two alike in a row. What lies on the CPU is
    checked before anything is written; on a GPU it is trusted. Returns None. Raises ValueError or TypeError.
    """
    sizes = check(
        "cache_append_",
        k_pages=(k_pages, "P page H D"), v_pages=(v_pages, "P page H D"), k=(k, "B T H D"), v=(v, "B T H D"),
        block_table=(block_table, "B max_pages"), positions=(positions, "B T"),
    )
    check_dtype("cache_append_", (*KERNEL_DTYPES, torch.float64), k_pages=k_pages, v_pages=v_pages, k=k, v=v)
    check_dtype("cache_append_", (torch.int32,), block_table=block_table, positions=positions)
    check_inner_contiguous("cache_append_", k_pages=k_pages, v_pages=v_pages)
    if positions.device.type == "cpu" and positions.numel() and not torch.compiler.is_compiling():
        if int(positions.min()) < -1:
            raise ValueError(f"cache_append_: positions reach down to {int(positions.min())}, wanted ≥ -1")
        _check_written(block_table, positions, sizes)
    _append(
        k_pages, v_pages, inner_contiguous(k), inner_contiguous(v), inner_contiguous(block_table),
        inner_contiguous(positions),
    )


def _check_written(block_table, positions, sizes):
    page, table = sizes["page"], block_table
    top = int(positions.max())
    if top >= table.shape[1] * page:
        raise ValueError(
            f"cache_append_: position {top}, wanted < {table.shape[1] * page} ({table.shape[1]} pages of {page})"
        )
    if not page:
        return
    pages = torch.where(positions < 0, 0, table.gather(1, (positions.clamp(min=0) // page).long()))
    wrong = (pages < 0) | (pages >= sizes["P"])
    if wrong.any():
        b, t = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"cache_append_: position {int(positions[b, t])} of sequence {b} lies in page {int(pages[b, t])}, "
            f"wanted 0 ≤ page < {sizes['P']}"
        )


def _key(k_pages, *_):
    return k_pages.device, k_pages.dtype


def _limits(backend, k_pages, *_):
    if backend in ("cuda", "triton", "cpu") and k_pages.dtype not in KERNEL_DTYPES:
        return f"the {backend} kernel takes float32, bfloat16 or float16, got {k_pages.dtype}"
    return None


def _fake(k_pages, v_pages, k, v, block_table, positions):
    return None


_append = define(
    "cache_append_(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor k, Tensor v, Tensor block_table, Tensor positions)"
    " -> ()",
    family="cache_append", kernels=KERNELS, order=ORDER, key=_key, limits=_limits, fake=_fake,
)


def paged(random, to):
    """k_pages, v_pages, block_table (2, 10) and new keys and values, of two sequences of 150 and 7 positions."""
    k_pages, v_pages, k, v = (to(random(*shape)) for shape in [(20, 16, 2, 64)] * 2 + [(2, 3, 2, 64)] * 2)
    table = torch.arange(20, dtype=torch.int32, device=k.device).flip(0).view(2, 10)
    return k_pages, v_pages, table, k, v


def example(random, to):
    """The results of a call of its own, by name; random(*shape) gives operands, `to` moves them to device and dtype."""
    k_pages, v_pages, table, k, v = paged(random, to)
    positions = torch.tensor([[147, 148, 149], [6, -1, -1]], dtype=torch.int32, device=k.device)
    cache_append_(k_pages, v_pages, k, v, table, positions)
    return {"k_pages": k_pages, "v_pages": v_pages}
