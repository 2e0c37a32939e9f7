"""Attention of the newest tokens of each sequence over its paged cache.

    x[t, s] = scale q[t]·k[s],   s ≤ lengths[b] - T + t;   o[t] = sum_s softmax_s(x)[t, s] v[s]

Position s of sequence b lies in page block_table[b, s / page], row s % page. The positions are cut into splits of
SPLIT, one program each, whatever the batch: a program writes its maximum m, sum l and unnormalised o, and a second
kernel merges a sequence's splits in ascending order. So a sequence's bits depend on nothing but itself, few long
sequences fill a GPU as many short ones do, and lengths are read on the device: a split beyond its sequence ends at
once. A program takes BLOCK_T queries, up to 16, of one head. Source: Dao et al., "Flash-Decoding", 2023.
"""

import torch
import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
SPLIT: tl.constexpr = tl.constexpr(128)


@triton.jit
def _page_rows(pages_ptr, page_of, s, stride_p, stride_s, d, inside):
    """Rows s (BLOCK_S,) of a sequence's pages, (BLOCK_S, BLOCK_D); zeros where not inside: there it may be NaN."""
    at = page_of.to(tl.int64) * stride_p + s.to(tl.int64) * stride_s
    return tl.load(pages_ptr + at[:, None] + d[None, :], mask=inside, other=0.0)


@triton.jit
def _decode_attention_split_kernel(
    o_ptr, m_ptr, l_ptr,                                      # out  (B, H, T, splits, D), (B, H, T, splits) ×2
    q_ptr, stride_qb, stride_qt, stride_qh,                   # in   (B, T, H, D)
    k_ptr, stride_kp, stride_ks, stride_kh,                   # in   (pages, page, H, D)
    v_ptr, stride_vp, stride_vs, stride_vh,                   # in   (pages, page, H, D)
    table_ptr, stride_tb, lengths_ptr,                        # in   (B, max_pages), (B,)
    T, H, page, splits, scale,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):
    split = tl.program_id(0) % splits
    bh = (tl.program_id(0) // splits).to(tl.int64)
    b, h = bh // H, bh % H
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    length = tl.load(lengths_ptr + b)
    start = split * SPLIT
    if start < length:
        here = (t[:, None] < T) & (d[None, :] < D)
        q_at = b * stride_qb + h * stride_qh + t.to(tl.int64)[:, None] * stride_qt + d[None, :]
        q = tl.load(q_ptr + q_at, mask=here, other=0.0)                    # (BLOCK_T, BLOCK_D)
        k_ptr += h * stride_kh
        v_ptr += h * stride_vh
        table_ptr += b * stride_tb
        o = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        m = tl.full((BLOCK_T,), float("-inf"), tl.float32)
        l = tl.zeros((BLOCK_T,), tl.float32)
        for s0 in range(start, tl.minimum(start + SPLIT, length), BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            page_of = tl.load(table_ptr + s // page, mask=s < length, other=0)
            inside = (s[:, None] < length) & (d[None, :] < D)
            k = _page_rows(k_ptr, page_of, s % page, stride_kp, stride_ks, d, inside)
            v = _page_rows(v_ptr, page_of, s % page, stride_vp, stride_vs, d, inside)
            x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale     # (BLOCK_T, BLOCK_S)
            seen = (s[None, :] < length) & (s[None, :] <= length - T + t[:, None])
            x = tl.where(seen, x, float("-inf"))
            top = tl.maximum(m, tl.max(x, axis=1))
            origin = tl.where(top == float("-inf"), 0.0, top)
            p = tl.exp2((x - origin[:, None]) * LOG2E)
            shrink = tl.exp2((m - origin) * LOG2E)
            m, l = top, l * shrink + tl.sum(p, axis=1)
            o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
        at = (bh * T + t) * splits + split
        tl.store(m_ptr + at, m, mask=t < T)
        tl.store(l_ptr + at, l, mask=t < T)
        tl.store(o_ptr + at[:, None] * D + d[None, :], o, mask=here)


@triton.jit
def _decode_attention_merge_kernel(
    out_ptr,                                                  # out  (B, T, H, D)
    o_ptr, m_ptr, l_ptr, lengths_ptr,                         # in   (B, H, T, splits, D), (B, H, T, splits) ×2, (B,)
    T, H, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):
    bht = tl.program_id(0).to(tl.int64)
    b, h, t = bht // T // H, bht // T % H, bht % T
    d = tl.arange(0, BLOCK_D)
    used = tl.cdiv(tl.load(lengths_ptr + b), SPLIT)
    m, l, o = float("-inf"), 0.0, tl.zeros((BLOCK_D,), tl.float32)
    for split in range(used):
        at = bht * splits + split
        m_split, l_split = tl.load(m_ptr + at), tl.load(l_ptr + at)
        o_split = tl.load(o_ptr + at * D + d, mask=d < D, other=0.0)
        top = tl.maximum(m, m_split)
        origin = tl.where(top == float("-inf"), 0.0, top)
        shrink, shrink_split = tl.exp2((m - origin) * LOG2E), tl.exp2((m_split - origin) * LOG2E)
        m, l, o = top, l * shrink + l_split * shrink_split, o * shrink + o_split * shrink_split
    o = o / tl.where(l == 0.0, 1.0, l)
    tl.store(out_ptr + ((b * T + t) * H + h) * D + d, o.to(out_ptr.dtype.element_ty), mask=d < D)


def _config(D, size, capability):
    """BLOCK_S, num_warps: a split in one piece where registers allow it."""
    if capability is None:
        return 128, 4
    if size == 4:
        return 32, 4
    return (128, 4) if D <= 64 else (64, 4)


def _capability(q):
    return torch.cuda.get_device_capability(q.device) if q.is_cuda else None


def decode_attention(q, k_pages, v_pages, block_table, lengths, scale):
    B, T, H, D = q.shape
    out = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    page, splits = k_pages.shape[1], max(triton.cdiv(block_table.shape[1] * k_pages.shape[1], SPLIT.value), 1)
    o = torch.empty(B, H, T, splits, D, dtype=torch.float32, device=q.device)
    m, l = (torch.empty(B, H, T, splits, dtype=torch.float32, device=q.device) for _ in range(2))
    block_d = max(triton.next_power_of_2(D), 16)
    block_s, warps = _config(D, q.element_size(), _capability(q))
    with torch.cuda.device_of(q):
        _decode_attention_split_kernel[(B * H * splits, triton.cdiv(T, 16))](
            o, m, l, q, *q.stride()[:3], k_pages, *k_pages.stride()[:3], v_pages, *v_pages.stride()[:3],
            block_table, block_table.stride(0), lengths, T, H, page, splits, scale,
            D=D, BLOCK_T=16, BLOCK_S=block_s, BLOCK_D=block_d, num_warps=warps,
        )
        _decode_attention_merge_kernel[(B * H * T,)](
            out, o, m, l, lengths, T, H, splits, D=D, BLOCK_D=block_d, num_warps=1
        )
    return out
