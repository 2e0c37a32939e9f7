"""Causal softmax attention, forward and backward, without a (T, S) matrix in memory.

    x[t, s]  = scale q[t]·k[s]                       -inf where t does not see s
    p[t, s]  = exp(x[t, s] - lse[t]),                lse[t] = log sum_s exp(x[t, s])
    o[t]     = sum_s drop(p)[t, s] v[s]
    delta[t] = do[t]·o[t],  ds = p (drop(do·v) - delta),  dq = scale ds k,  dk = scale ds^T q,  dv = drop(p)^T do

Forward: one program owns BLOCK_T queries of one head and walks over the keys, keeping a running maximum m, sum l and
the unnormalised o; tiles that every query sees whole are not masked. Backward recomputes p from lse: one kernel owns
BLOCK_S keys and walks over the queries (dk, dv), another owns BLOCK_T queries and walks over the keys (dq), so that
no sum needs atomics and its order is always the same. Rows come through pointers, or, on some GPUs, through tensor
descriptors (DESCRIBED), which the copy engine reads without spending registers on addresses. Exponentials are taken
in base 2, in bf16 and fp16 of one fused multiply-add that takes in the scale (FOLDED).
Source: Dao, arXiv 2307.08691, algorithms 1 and 2.
"""

import torch
import triton
import triton.language as tl

from .dropout import keep_mask

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
PADDING: tl.constexpr = tl.constexpr(128)  # the backward's lse and delta have rows of multiples of it, BLOCK_T or more


@triton.jit
def _power(x, origin, rate, FOLDED: tl.constexpr):
    """2^(rate (x - origin)); FOLDED as one fused multiply-add, whose product is rounded: large scores make it large."""
    if FOLDED:
        return tl.exp2(x * rate - origin * rate)
    else:
        return tl.exp2((x - origin) * rate)


@triton.jit
def _weights(x, lse, scale, FOLDED: tl.constexpr):
    """p of raw scores x and of lse, which comes in base 2 if FOLDED."""
    if FOLDED:
        return tl.exp2(x * (scale * LOG2E) - lse)
    else:
        return tl.exp2((x * scale - lse) * LOG2E)


@triton.jit
def _source(ptr, rows, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIBED: tl.constexpr):
    """What `_rows` reads tiles (BLOCK, BLOCK_D) of a head (rows, D) from: its pointer or a descriptor of it."""
    if DESCRIBED:
        return tl.make_tensor_descriptor(ptr, [rows, D], [stride, 1], [BLOCK, BLOCK_D])
    else:
        return ptr


@triton.jit
def _rows(
    source, start, rows, stride,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIBED: tl.constexpr, INSIDE: tl.constexpr,
):
    """Rows start … start + BLOCK of a head, (BLOCK, BLOCK_D); zeros beyond D and, unless all are INSIDE, beyond rows.

    Within a tile the offsets are the same for every start, so that a loop adds only where the tile begins.
    """
    if DESCRIBED:
        return source.load([start, 0])
    else:
        row, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
        ptr = source + tl.cast(start, tl.int64) * stride + (row.to(tl.int64)[:, None] * stride + d[None, :])
        if INSIDE:
            if D < BLOCK_D:
                return tl.load(ptr, mask=d[None, :] < D, other=0.0)
            else:
                return tl.load(ptr)
        else:
            inside = start + row[:, None] < rows
            if D < BLOCK_D:
                inside = inside & (d[None, :] < D)
            return tl.load(ptr, mask=inside, other=0.0)


@triton.jit
def _write_rows(ptr, tile, start, rows, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    row, d = start + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    inside = row[:, None] < rows
    if D < BLOCK_D:
        inside = inside & (d[None, :] < D)
    tl.store(ptr + row.to(tl.int64)[:, None] * stride + d[None, :], tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _last_key(t, offset, S, CAUSAL: tl.constexpr):
    """The last key that the queries t see; offset: query t sees keys s ≤ t + offset."""
    last = tl.zeros_like(t) + (S - 1)
    if CAUSAL:
        last = tl.minimum(last, t + offset)
    return last


@triton.jit
def _key_ranges(t0, offset, S, CAUSAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """(whole, end): keys below `whole` every query of a tile sees, keys from `end` on none does."""
    if not CAUSAL:  # the same bounds: with plainer ones ptxas makes every product wait for the one before
        offset = S
    whole = tl.maximum(tl.minimum(S, t0 + 1 + offset), 0) // BLOCK_S * BLOCK_S
    return whole, tl.maximum(tl.minimum(S, t0 + BLOCK_T + offset), 0)


@triton.jit
def _take_keys(
    o, m, l, q,                              # (BLOCK_T, BLOCK_D), (BLOCK_T,), (BLOCK_T,), (BLOCK_T, BLOCK_D)
    k_source, stride_ks, v_source, stride_vs, seed_ptr, b, h,
    t, begin, end, offset, S, scale,         # t (BLOCK_T,)
    D: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr, MASKED: tl.constexpr,
    DESCRIBED: tl.constexpr, FOLDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """o, m, l after the keys begin … end. If FOLDED, m is of the scores before the scale."""
    rate = scale * LOG2E if FOLDED else LOG2E
    last = _last_key(t, offset, S, CAUSAL)
    for s0 in range(begin, end, BLOCK_S):
        k = _rows(k_source, s0, S, stride_ks, D, BLOCK_S, BLOCK_D, DESCRIBED, not MASKED)
        x = tl.dot(q, tl.trans(k), input_precision="ieee")                 # (BLOCK_T, BLOCK_S)
        if not FOLDED:
            x *= scale
        if MASKED:
            x = tl.where(tl.arange(0, BLOCK_S)[None, :] <= (last - s0)[:, None], x, float("-inf"))
        top = tl.maximum(m, tl.max(x, axis=1))
        origin = tl.where(top == float("-inf"), 0.0, top)                  # -inf minus itself would be NaN
        p = _power(x, origin[:, None], rate, FOLDED)
        shrink = _power(m, origin, rate, FOLDED)
        m, l, o = top, l * shrink + tl.sum(p, axis=1), o * shrink[:, None]
        if DROP:
            p = tl.where(keep_mask(seed_ptr, b, h, t, s0, DROP, BLOCK_T, BLOCK_S), p, 0.0)
        v = _rows(v_source, s0, S, stride_vs, D, BLOCK_S, BLOCK_D, DESCRIBED, not MASKED)
        o = tl.dot(p.to(v.dtype), v, o, input_precision="ieee")
    return o, m, l


@triton.jit(do_not_specialize=["T", "S", "H", "offset"])
def _attention_fwd_kernel(
    o_ptr, stride_ob, stride_ot, stride_oh, lse_ptr,          # out  (B, T, H, D), (B, H, T)
    q_ptr, stride_qb, stride_qt, stride_qh,                   # in   (B, T, H, D)
    k_ptr, stride_kb, stride_ks, stride_kh,                   # in   (B, S, H, D)
    v_ptr, stride_vb, stride_vs, stride_vh,                   # in   (B, S, H, D)
    seed_ptr,                                                 # in   (4,)
    T, S, H, offset, scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr, DESCRIBED: tl.constexpr, FOLDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(T, BLOCK_T)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    t0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_T     # the longest rows first
    t = t0 + tl.arange(0, BLOCK_T)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    q_source = _source(q_ptr, T, stride_qt, D, BLOCK_T, BLOCK_D, DESCRIBED)
    k_source = _source(k_ptr, S, stride_ks, D, BLOCK_S, BLOCK_D, DESCRIBED)
    v_source = _source(v_ptr, S, stride_vs, D, BLOCK_S, BLOCK_D, DESCRIBED)

    q = _rows(q_source, t0, T, stride_qt, D, BLOCK_T, BLOCK_D, DESCRIBED, False)
    o = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    m = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_T,), tl.float32)
    whole, end = _key_ranges(t0, offset, S, CAUSAL, BLOCK_T, BLOCK_S)
    o, m, l = _take_keys(
        o, m, l, q, k_source, stride_ks, v_source, stride_vs, seed_ptr, b, h, t, 0, whole, offset, S, scale,
        D, CAUSAL, DROP, False, DESCRIBED, FOLDED, BLOCK_T, BLOCK_S, BLOCK_D,
    )
    o, m, l = _take_keys(
        o, m, l, q, k_source, stride_ks, v_source, stride_vs, seed_ptr, b, h, t, whole, end, offset, S, scale,
        D, CAUSAL, DROP, True, DESCRIBED, FOLDED, BLOCK_T, BLOCK_S, BLOCK_D,
    )
    nothing = l == 0.0
    o = o * (256.0 / (256.0 - DROP) / tl.where(nothing, 1.0, l))[:, None]
    if FOLDED:
        m *= scale
    lse = tl.where(nothing, float("-inf"), m + tl.log2(tl.where(nothing, 1.0, l)) * LN2)
    _write_rows(o_ptr + b * stride_ob + h * stride_oh, o, t0, T, stride_ot, D, BLOCK_T, BLOCK_D)
    tl.store(lse_ptr + bh * T + t, lse, mask=t < T)


@triton.jit(do_not_specialize=["T", "H"])
def _attention_delta_kernel(
    lse_padded_ptr, delta_ptr,                                # out  (B, H, Tp), (B, H, Tp)
    lse_ptr,                                                  # in   (B, H, T)
    do_ptr, stride_dob, stride_dot, stride_doh,               # in   (B, T, H, D)
    o_ptr, stride_ob, stride_ot, stride_oh,                   # in   (B, T, H, D)
    T, H,
    D: tl.constexpr, FOLDED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """delta, and lse (in base 2 if FOLDED, +inf, so that p is 0, where a query sees nothing), both with Tp a row."""
    Tp = tl.cdiv(T, PADDING) * PADDING
    tiles = Tp // BLOCK_T
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    t0 = tl.program_id(0) % tiles * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    do = _rows(do_ptr + b * stride_dob + h * stride_doh, t0, T, stride_dot, D, BLOCK_T, BLOCK_D, False, False)
    o = _rows(o_ptr + b * stride_ob + h * stride_oh, t0, T, stride_ot, D, BLOCK_T, BLOCK_D, False, False)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)           # (BLOCK_T,)
    tl.store(delta_ptr + bh * Tp + t, delta)
    lse = tl.load(lse_ptr + bh * T + t, mask=t < T, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E if FOLDED else lse)
    tl.store(lse_padded_ptr + bh * Tp + t, lse)


@triton.jit
def _take_queries(
    dk, dv, k, v,                            # (BLOCK_S, BLOCK_D) ×4
    q_source, stride_qt, do_source, stride_dot, lse_ptr, delta_ptr, seed_ptr, b, h,
    s0, begin, end, offset, T, scale,
    D: tl.constexpr, DROP: tl.constexpr, MASKED: tl.constexpr, INSIDE: tl.constexpr,
    DESCRIBED: tl.constexpr, FOLDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """dk (unscaled), dv after the queries begin … end. Tiles are transposed: (BLOCK_S, BLOCK_T).

    What keys beyond S would take from the queries is never written, so that they need no mask.
    """
    s = s0 + tl.arange(0, BLOCK_S)
    for t0 in range(begin, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        q = _rows(q_source, t0, T, stride_qt, D, BLOCK_T, BLOCK_D, DESCRIBED, INSIDE)
        lse, delta = tl.load(lse_ptr + t), tl.load(delta_ptr + t)          # (BLOCK_T,)
        x = tl.dot(k, tl.trans(q), input_precision="ieee")                 # (BLOCK_S, BLOCK_T)
        p = _weights(x, lse[None, :], scale, FOLDED)
        if MASKED:
            p = tl.where((s - offset - t0)[:, None] <= tl.arange(0, BLOCK_T)[None, :], p, 0.0)
        do = _rows(do_source, t0, T, stride_dot, D, BLOCK_T, BLOCK_D, DESCRIBED, INSIDE)
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")               # (BLOCK_S, BLOCK_T)
        kept = p
        if DROP:
            keep = tl.trans(keep_mask(seed_ptr, b, h, t, s0, DROP, BLOCK_T, BLOCK_S))
            kept = tl.where(keep, p * (256.0 / (256.0 - DROP)), 0.0)
            dp = tl.where(keep, dp * (256.0 / (256.0 - DROP)), 0.0)
        dv = tl.dot(kept.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["T", "S", "H", "offset"])
def _attention_bwd_keys_kernel(
    dk_ptr, stride_dkb, stride_dks, stride_dkh,               # out  (B, S, H, D)
    dv_ptr, stride_dvb, stride_dvs, stride_dvh,               # out  (B, S, H, D)
    do_ptr, stride_dob, stride_dot, stride_doh,               # in   (B, T, H, D)
    q_ptr, stride_qb, stride_qt, stride_qh,                   # in   (B, T, H, D)
    k_ptr, stride_kb, stride_ks, stride_kh,                   # in   (B, S, H, D)
    v_ptr, stride_vb, stride_vs, stride_vh,                   # in   (B, S, H, D)
    lse_ptr, delta_ptr, seed_ptr,                             # in   (B, H, Tp), (B, H, Tp), (4,)
    T, S, H, offset, scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr, DESCRIBED: tl.constexpr, FOLDED: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(S, BLOCK_S)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    s0 = tl.program_id(0) % tiles * BLOCK_S                   # the first keys are seen by the most queries
    q_ptr += b * stride_qb + h * stride_qh
    do_ptr += b * stride_dob + h * stride_doh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    lse_ptr += bh * (tl.cdiv(T, PADDING) * PADDING)
    delta_ptr += bh * (tl.cdiv(T, PADDING) * PADDING)
    k_source = _source(k_ptr, S, stride_ks, D, BLOCK_S, BLOCK_D, DESCRIBED)
    v_source = _source(v_ptr, S, stride_vs, D, BLOCK_S, BLOCK_D, DESCRIBED)
    q_source = _source(q_ptr, T, stride_qt, D, BLOCK_T, BLOCK_D, DESCRIBED)
    do_source = _source(do_ptr, T, stride_dot, D, BLOCK_T, BLOCK_D, DESCRIBED)

    k = _rows(k_source, s0, S, stride_ks, D, BLOCK_S, BLOCK_D, DESCRIBED, False)
    v = _rows(v_source, s0, S, stride_vs, D, BLOCK_S, BLOCK_D, DESCRIBED, False)
    dk = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    begin, whole = 0, 0                                       # queries from `whole` on see every key of the tile
    if CAUSAL:
        # One tile at least is masked, though none of its queries may see a key: where a loop may be left out, ptxas
        # can make every product wait for the one before.
        last = tl.cdiv(T, BLOCK_T) - 1
        begin = tl.minimum(tl.maximum(s0 - offset, 0) // BLOCK_T, last)
        whole = tl.minimum(tl.cdiv(tl.maximum(s0 + BLOCK_S - 1 - offset, 0), BLOCK_T), last + 1)
        begin, whole = begin * BLOCK_T, tl.maximum(whole, begin + 1) * BLOCK_T
        tl.assume(whole > begin)
        dk, dv = _take_queries(
            dk, dv, k, v, q_source, stride_qt, do_source, stride_dot, lse_ptr, delta_ptr, seed_ptr, b, h,
            s0, begin, whole, offset, T, scale, D, DROP, True, EVEN, DESCRIBED, FOLDED, BLOCK_T, BLOCK_S, BLOCK_D,
        )
    dk, dv = _take_queries(
        dk, dv, k, v, q_source, stride_qt, do_source, stride_dot, lse_ptr, delta_ptr, seed_ptr, b, h,
        s0, whole, T, offset, T, scale, D, DROP, False, EVEN, DESCRIBED, FOLDED, BLOCK_T, BLOCK_S, BLOCK_D,
    )
    _write_rows(dk_ptr + b * stride_dkb + h * stride_dkh, dk * scale, s0, S, stride_dks, D, BLOCK_S, BLOCK_D)
    _write_rows(dv_ptr + b * stride_dvb + h * stride_dvh, dv, s0, S, stride_dvs, D, BLOCK_S, BLOCK_D)


@triton.jit
def _take_keys_backward(
    dq, q, do, lse, delta,                   # (BLOCK_T, BLOCK_D) ×3, (BLOCK_T,) ×2
    k_source, stride_ks, v_source, stride_vs, seed_ptr, b, h,
    t, begin, end, offset, S, scale,         # t (BLOCK_T,)
    D: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr, MASKED: tl.constexpr,
    DESCRIBED: tl.constexpr, FOLDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """dq (unscaled) after the keys begin … end."""
    last = _last_key(t, offset, S, CAUSAL)
    for s0 in range(begin, end, BLOCK_S):
        k = _rows(k_source, s0, S, stride_ks, D, BLOCK_S, BLOCK_D, DESCRIBED, not MASKED)
        x = tl.dot(q, tl.trans(k), input_precision="ieee")                 # (BLOCK_T, BLOCK_S)
        p = _weights(x, lse[:, None], scale, FOLDED)
        if MASKED:
            p = tl.where(tl.arange(0, BLOCK_S)[None, :] <= (last - s0)[:, None], p, 0.0)
        v = _rows(v_source, s0, S, stride_vs, D, BLOCK_S, BLOCK_D, DESCRIBED, not MASKED)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")               # (BLOCK_T, BLOCK_S)
        if DROP:
            keep = keep_mask(seed_ptr, b, h, t, s0, DROP, BLOCK_T, BLOCK_S)
            dp = tl.where(keep, dp * (256.0 / (256.0 - DROP)), 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["T", "S", "H", "offset"])
def _attention_bwd_queries_kernel(
    dq_ptr, stride_dqb, stride_dqt, stride_dqh,               # out  (B, T, H, D)
    do_ptr, stride_dob, stride_dot, stride_doh,               # in   (B, T, H, D)
    q_ptr, stride_qb, stride_qt, stride_qh,                   # in   (B, T, H, D)
    k_ptr, stride_kb, stride_ks, stride_kh,                   # in   (B, S, H, D)
    v_ptr, stride_vb, stride_vs, stride_vh,                   # in   (B, S, H, D)
    lse_ptr, delta_ptr, seed_ptr,                             # in   (B, H, Tp), (B, H, Tp), (4,)
    T, S, H, offset, scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr, DESCRIBED: tl.constexpr, FOLDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(T, BLOCK_T)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    t0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    q_ptr += b * stride_qb + h * stride_qh
    do_ptr += b * stride_dob + h * stride_doh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    q_source = _source(q_ptr, T, stride_qt, D, BLOCK_T, BLOCK_D, DESCRIBED)
    do_source = _source(do_ptr, T, stride_dot, D, BLOCK_T, BLOCK_D, DESCRIBED)
    k_source = _source(k_ptr, S, stride_ks, D, BLOCK_S, BLOCK_D, DESCRIBED)
    v_source = _source(v_ptr, S, stride_vs, D, BLOCK_S, BLOCK_D, DESCRIBED)

    q = _rows(q_source, t0, T, stride_qt, D, BLOCK_T, BLOCK_D, DESCRIBED, False)
    do = _rows(do_source, t0, T, stride_dot, D, BLOCK_T, BLOCK_D, DESCRIBED, False)
    row = bh * (tl.cdiv(T, PADDING) * PADDING) + t
    lse, delta = tl.load(lse_ptr + row), tl.load(delta_ptr + row)          # (BLOCK_T,)
    dq = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    whole, end = _key_ranges(t0, offset, S, CAUSAL, BLOCK_T, BLOCK_S)
    dq = _take_keys_backward(
        dq, q, do, lse, delta, k_source, stride_ks, v_source, stride_vs, seed_ptr, b, h,
        t, 0, whole, offset, S, scale, D, CAUSAL, DROP, False, DESCRIBED, FOLDED, BLOCK_T, BLOCK_S, BLOCK_D,
    )
    dq = _take_keys_backward(
        dq, q, do, lse, delta, k_source, stride_ks, v_source, stride_vs, seed_ptr, b, h,
        t, whole, end, offset, S, scale, D, CAUSAL, DROP, True, DESCRIBED, FOLDED, BLOCK_T, BLOCK_S, BLOCK_D,
    )
    _write_rows(dq_ptr + b * stride_dqb + h * stride_dqh, dq * scale, t0, T, stride_dqt, D, BLOCK_T, BLOCK_D)


def _config(kernel, D, size, drop, described, capability):
    """BLOCK_T, BLOCK_S, num_warps, num_stages (or also maxnreg) of "fwd", "keys" or "queries"; size: of an element.

    With compute capability 9 by the clock of an H200 (causal, bf16, Triton 3.6; µs; * by descriptors):
        D = 64      B = 32, T = 1024, H = 12                                           B = 8, T = 4096
        fwd         64×64 4 3 180 | 128×64 8 3 181 | 64×32 4 3 202 | 64×64 4 2 217     557 | 552; 64×64 4 3* 575
        keys        32×64 4 3 283 | 64×64 4 3 285 | 16×64 4 3 332 | 64×128 8 3 371     970 | 901; 32×64 4 3* 1022
        queries     64×64 4 3 193 | 64×32 4 3 195 | 64×64 4 4 226 | 128×64 8 3 284     640 | 689; 64×32 4 3* 738
        D = 128     B = 16, T = 1024, H = 16
        fwd         64×64 4 3 213 | 64×32 4 3 213 | 128×64 4 2* 225 | 128×64 8 3 233 | 128×128 8 2* 290
        keys        32×64 4 2 373 (spills) | 32×64 4 3* 389 | 32×128 8 3 404 | 32×128 8 2* 529
        queries     64×32 4 3 259 | 64×32 4 2* 303 | 128×32 8 3 307 | 128×64 8 2 316
    Elsewhere, and with dropout, by what the compiler reports for each architecture: the largest tiles without spills.
    """
    if capability is None:  # interpreted: the cost is per operation, not per element
        return 64, 64, 4, 1
    if size == 4:  # without tensor cores
        return 32, 32, 4, 1
    if capability[0] == 9:  # 227 KiB of shared memory, wgmma
        small, large = {
            "fwd": ((64, 64, 4, 3), (64, 32 if drop else 64, 4, 3)),
            "keys": ((64, 64, 4, 3), (32, 128, 8, 2 if drop else 3)),
            "queries": ((64, 64, 4, 3), (64, 32, 4, 3)),
        }[kernel]
    elif capability[0] == 10:  # 227 KiB of shared memory, tcgen05
        small, large = {
            "fwd": ((128, 64, 8 if drop and not described else 4, 3),
                    (128, 128 if described and not drop else 64, 8, 2)),
            "keys": ((64, 128, 8, 2), (64, 128, 8, 2)),
            "queries": ((128, 64, 8, 2), (128, 64, 8, 2)),
        }[kernel]
    else:
        small, large = {
            "fwd": ((128, 64, 8, 2), (128, 32, 8, 2) if drop else (64, 64, 8, 2)),
            "keys": ((32, 64, 8 if drop else 4, 2), (16, 64, 8, 2) if drop else (64, 64, 8, 1)),
            "queries": ((64, 32, 4, 2 if drop else 3), (64 if drop else 128, 32, 8, 1)),
        }[kernel]
    return small if D <= 64 else large


def _capability(q):
    return torch.cuda.get_device_capability(q.device) if q.is_cuda else None


def _describable(capability, *operands):
    """Whether the copy engine shall read the operands' heads: where it pays, and everything is a multiple of 16 B.

    With compute capability 9 pointers were faster; 10 was not measured.
    """
    if capability is None or capability[0] != 10:
        return False
    for operand in operands:
        size = operand.element_size()
        steps = (operand.shape[3], *operand.stride()[:3])
        if operand.data_ptr() % 16 or any(step * size % 16 for step in steps):
            return False
        if min(operand.shape[1], operand.stride(1)) <= 0:
            return False
    return True


def _scratch(size, alignment, stream):
    """Where Triton lays the descriptors of one launch."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _folded(q, scale):
    """Whether the scale can be folded into the exponentials: in fp32 it would round large scores, and the largest score
    is the largest before the scale where that is positive.
    """
    return q.dtype != torch.float32 and 0 < scale < float("inf")


def _launch(kernel, name, q, S, causal, scale, dropout, seed, described, *tensors):
    """Launches "fwd", "keys" or "queries" with the arguments that all three share; "keys" cuts the keys into tiles."""
    B, T, H, D = q.shape
    drop = round(dropout * 256)
    block_t, block_s, *options = _config(name, D, q.element_size(), drop > 0, described, _capability(q))
    count, block = (S, block_s) if name == "keys" else (T, block_t)
    if not B * H * count:
        return
    if described:
        triton.set_allocator(_scratch)
    even = {"EVEN": T % block_t == 0} if name == "keys" else {}
    with torch.cuda.device_of(q):
        kernel[(triton.cdiv(count, block) * B * H,)](
            *tensors, seed, T, S, H, S - T if causal == 1 else 0, scale,
            D=D, CAUSAL=causal > 0, DROP=drop, DESCRIBED=described, FOLDED=_folded(q, scale), **even,
            BLOCK_T=block_t, BLOCK_S=block_s, BLOCK_D=max(triton.next_power_of_2(D), 16),
            **dict(zip(("num_warps", "num_stages", "maxnreg"), options)),
        )


def _strided(*tensors):
    """Each tensor (B, T, H, D) with its first three strides, as the kernels take them."""
    return [argument for tensor in tensors for argument in (tensor, *tensor.stride()[:3])]


def attention_fwd(q, k, v, causal, scale, dropout, seed):
    B, T, H, D = q.shape
    o = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    described = _describable(_capability(q), q, k, v)
    _launch(
        _attention_fwd_kernel, "fwd", q, k.shape[1], causal, scale, dropout, seed, described,
        *_strided(o), lse, *_strided(q, k, v),
    )
    return o, lse


def attention_bwd(do, q, k, v, o, lse, causal, scale, dropout, seed):
    dq, dk, dv = (torch.empty(like.shape, dtype=q.dtype, device=q.device) for like in (q, k, v))
    _attention_bwd(dq, dk, dv, do, q, k, v, o, lse, causal, scale, dropout, seed)
    return dq, dk, dv


def _attention_delta(do, o, lse, folded):
    """(lse, delta), padded, as the two kernels of the backward read them."""
    B, T, H, D = o.shape
    rows = triton.cdiv(T, PADDING.value) * PADDING.value
    padded = torch.empty(2, B, H, rows, dtype=torch.float32, device=o.device)
    if padded.numel():
        block_d = max(triton.next_power_of_2(D), 16)
        block_t = 4096 // o.element_size() // block_d
        with torch.cuda.device_of(o):
            _attention_delta_kernel[(rows // block_t * B * H,)](
                *padded, lse, *_strided(do, o), T, H, D=D, FOLDED=folded, BLOCK_T=block_t, BLOCK_D=block_d
            )
    return padded


def _attention_bwd(dq, dk, dv, do, q, k, v, o, lse, causal, scale, dropout, seed):
    padded = _attention_delta(do, o, lse, _folded(q, scale))
    options = k.shape[1], causal, scale, dropout, seed, _describable(_capability(q), do, q, k, v)
    operands = *_strided(do, q, k, v), *padded
    if q.shape[1]:
        _launch(_attention_bwd_keys_kernel, "keys", q, *options, *_strided(dk, dv), *operands)
    else:
        dk.zero_(), dv.zero_()
    _launch(_attention_bwd_queries_kernel, "queries", q, *options, *_strided(dq), *operands)


def attention_qkv_fwd(qkv, causal, scale, dropout, seed):
    return attention_fwd(*qkv.unbind(2), causal, scale, dropout, seed)


def attention_qkv_bwd(do, qkv, o, lse, causal, scale, dropout, seed):
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _attention_bwd(*dqkv.unbind(2), do, *qkv.unbind(2), o, lse, causal, scale, dropout, seed)
    return dqkv
