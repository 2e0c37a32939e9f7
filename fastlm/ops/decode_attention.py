"""decode_attention: attention of the newest tokens of each sequence over its paged key/value cache."""

import torch

from fastlm.dispatch import define
from fastlm.dispatch.table import homes
from fastlm.ops.cache_append import paged
from fastlm.ops.checks import check, check_dtype, check_inner_contiguous, inner_contiguous
from fastlm.ops.once import without_gradient

__all__ = ["decode_attention"]
KERNELS = homes("decode_attention", "cuda", "triton", "cpu", "torch", "reference")
ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("triton", "cuda", "torch", "reference")}
LARGEST_D = {"cuda": 128, "triton": 128, "cpu": 256}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def decode_attention(q, k_pages, v_pages, block_table, lengths, *, scale=None):
    """softmax(scale · q kᵀ) v over each sequence's pages, (B, T, H, D) like q, not differentiable.

    q (B, T, H, D) the T newest tokens; k_pages, v_pages (P, page, H, D), any strides with D contiguous, of q's
    dtype; block_table (B, max_pages) int32: position s of sequence b lies in page block_table[b, s // page];
    lengths (B,) int32 count the new tokens too, and these are causal among themselves: query t sees the positions
    s ≤ lengths[b] - T + t, none where that is negative (then 0). scale is 1/√D unless given. Lengths and pages that
    lie on the CPU are checked; on a GPU they are trusted to lie within the cache. Raises ValueError or TypeError.
    """
    sizes = check(
        "decode_attention",
        q=(q, "B T H D"), k_pages=(k_pages, "P page H D"), v_pages=(v_pages, "P page H D"),
        block_table=(block_table, "B max_pages"), lengths=(lengths, "B"),
    )
    check_dtype("decode_attention", (*KERNEL_DTYPES, torch.float64), q=q, k_pages=k_pages, v_pages=v_pages)
    check_dtype("decode_attention", (torch.int32,), block_table=block_table, lengths=lengths)
    check_inner_contiguous("decode_attention", k_pages=k_pages, v_pages=v_pages)
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        check_pages("decode_attention", block_table, lengths, sizes["P"], sizes["page"])
    scale = sizes["D"] ** -0.5 if scale is None else float(scale)
    return without_gradient(
        "decode_attention is not differentiable: attention is", _decode,
        inner_contiguous(q), k_pages, v_pages, inner_contiguous(block_table), lengths.contiguous(), scale,
    )


def check_pages(op, block_table, lengths, pages, page):
    """Raises ValueError unless every sequence's first lengths[b] positions lie in pages that exist."""
    capacity = block_table.shape[1] * page
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(
            f"{op}: lengths reach from {int(lengths.min())} to {int(lengths.max())}, wanted 0 to {capacity} "
            f"({block_table.shape[1]} pages of {page})"
        )
    used = torch.arange(block_table.shape[1], device=lengths.device) * page < lengths[:, None]  # (B, max_pages)
    wrong = used & ((block_table < 0) | (block_table >= pages))
    if wrong.any():
        b, i = wrong.nonzero()[0].tolist()
        raise ValueError(f"{op}: block_table[{b}, {i}] is {int(block_table[b, i])}, wanted 0 ≤ page < {pages}")


def _key(q, *_):
    return q.device, q.dtype, q.shape[-1]


def _limits(backend, q, *_):
    D = q.shape[-1]
    if backend in LARGEST_D and q.dtype not in KERNEL_DTYPES:
        return f"the {backend} kernel takes float32, bfloat16 or float16, got {q.dtype}"
    if D > LARGEST_D.get(backend, D):
        return f"the {backend} kernel takes head dimensions up to {LARGEST_D[backend]}, got D={D}"
    return None


def _fake(q, k_pages, v_pages, block_table, lengths, scale):
    return q.new_empty(q.shape)


_decode = define(
    "decode_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor lengths, float scale)"
    " -> Tensor",
    family="decode_attention", kernels=KERNELS, order=ORDER, key=_key, limits=_limits, fake=_fake,
)


def example(random, to):
    """The results of a call of its own, by name; random(*shape) gives operands, `to` moves them to device and dtype."""
    k_pages, v_pages, table, q, _ = paged(random, to)
    lengths = torch.tensor([150, 7], dtype=torch.int32, device=q.device)
    return {"o": decode_attention(q, k_pages, v_pages, table, lengths)}
