"""Writes new keys and values into the pages of each sequence's cache.

    k_pages[block_table[b, p / page], p % page] = k[b, t],   p = positions[b, t];   likewise v;   p = -1 writes nothing

One program copies the keys and values of one token, all heads.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _cache_append_kernel(
    k_pages_ptr, stride_kpp, stride_kps, stride_kph,          # inout (pages, page, H, D)
    v_pages_ptr, stride_vpp, stride_vps, stride_vph,          # inout (pages, page, H, D)
    k_ptr, stride_kb, stride_kt, stride_kh,                   # in    (B, T, H, D)
    v_ptr, stride_vb, stride_vt, stride_vh,                   # in    (B, T, H, D)
    table_ptr, stride_tb, positions_ptr, stride_pb,           # in    (B, max_pages), (B, T)
    T, H, page,
    D: tl.constexpr, BLOCK: tl.constexpr,
):
    b, t = tl.program_id(0).to(tl.int64) // T, tl.program_id(0).to(tl.int64) % T
    position = tl.load(positions_ptr + b * stride_pb + t)
    if position >= 0:
        page_of = tl.load(table_ptr + b * stride_tb + position // page).to(tl.int64)
        row = (position % page).to(tl.int64)
        k_pages_ptr += page_of * stride_kpp + row * stride_kps
        v_pages_ptr += page_of * stride_vpp + row * stride_vps
        k_ptr += b * stride_kb + t * stride_kt
        v_ptr += b * stride_vb + t * stride_vt
        for start in range(0, H * D, BLOCK):
            i = start + tl.arange(0, BLOCK)                                # (BLOCK,) elements of (H, D)
            h, d, inside = (i // D).to(tl.int64), i % D, i < H * D
            k = tl.load(k_ptr + h * stride_kh + d, mask=inside)
            v = tl.load(v_ptr + h * stride_vh + d, mask=inside)
            tl.store(k_pages_ptr + h * stride_kph + d, k, mask=inside)
            tl.store(v_pages_ptr + h * stride_vph + d, v, mask=inside)


def cache_append_(k_pages, v_pages, k, v, block_table, positions):
    B, T, H, D = k.shape
    if not k.numel():
        return
    with torch.cuda.device_of(k):
        _cache_append_kernel[(B * T,)](
            k_pages, *k_pages.stride()[:3], v_pages, *v_pages.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3],
            block_table, block_table.stride(0), positions, positions.stride(0), T, H, k_pages.shape[1],
            D=D, BLOCK=1024, num_warps=4,
        )
