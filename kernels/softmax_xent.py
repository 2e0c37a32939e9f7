"""Fused softmax cross-entropy.

    lse[n]   = log sum_v exp(x[n, v])
    loss[n]  = lse[n] - x[n, y[n]]                          0 where y[n] == ignore, NaN where it is no label
    dx[n, v] = (exp(x[n, v] - lse[n]) - [v == y[n]]) * dloss[n]

One program owns one row. Forward reads the row once, every LANE elements keeping a running maximum m and the running
sum s of exp(x - m), merged at the row's end; backward needs only lse, so no (N, V) probabilities are stored: it reads x
once and writes dx once, the label's element a second time.
In place both are one kernel, which reads a row a second time while it is still in the caches, and writes it once; few
programs of many warps, so that their rows fit there.
Source of the online softmax: Milakov and Gimelshein, arXiv 1805.02867.
"""

import torch
import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LANE: tl.constexpr = tl.constexpr(8)  # elements of a block, in one thread


@triton.jit
def _take(m, s, x, RUN: tl.constexpr):
    """The running maxima and sums (lanes,), each over its own elements, after a block of logits x (BLOCK_V,).

    A lane's elements lie in one thread, which loads RUN neighbours here and there.
    """
    lanes: tl.constexpr = m.shape[0]
    each: tl.constexpr = x.shape[0] // lanes
    run: tl.constexpr = min(RUN, each)
    x = tl.reshape(tl.permute(tl.reshape(x, (each // run, lanes, run)), (1, 0, 2)), (lanes, each))
    top = tl.maximum(m, tl.max(x, axis=1))
    origin = tl.where(top == float("-inf"), 0.0, top)  # -inf minus itself would be NaN
    return top, s * tl.exp2((m - origin) * LOG2E) + tl.sum(tl.exp2((x - origin[:, None]) * LOG2E), axis=1)


@triton.jit
def _statistics(x_ptr, V, BLOCK_V: tl.constexpr, RUN: tl.constexpr):
    """The maximum m of a row x (V,), m or 0 where that is -inf, and the sum of exp(x - that)."""
    lanes: tl.constexpr = max(BLOCK_V // LANE, 1)
    m, s = tl.full((lanes,), float("-inf"), tl.float32), tl.zeros((lanes,), tl.float32)
    whole = V - V % BLOCK_V  # blocks without a mask are loaded 16 bytes at a time
    for start in range(0, whole, BLOCK_V):
        x = tl.load(x_ptr + start + tl.arange(0, BLOCK_V)).to(tl.float32)  # (BLOCK_V,)
        m, s = _take(m, s, x, RUN)
    if whole < V:
        v = whole + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)  # (BLOCK_V,)
        m, s = _take(m, s, x, RUN)
    top = tl.max(m, axis=0)
    origin = tl.where(top == float("-inf"), 0.0, top)
    return top, origin, tl.sum(s * tl.exp2((m - origin) * LOG2E), axis=0)


@triton.jit
def _gradient(dx_ptr, x_ptr, origin, scale, ignored, V, BLOCK_V: tl.constexpr):
    """Writes dx of one row, without the label's -1; an ignored row gets 0 whatever x holds."""
    whole = V - V % BLOCK_V
    if ignored:
        zero = tl.zeros((BLOCK_V,), dx_ptr.dtype.element_ty)
        for start in range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            tl.store(dx_ptr + v, zero, mask=v < V)
    else:
        for start in range(0, whole, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            dx = tl.exp2((tl.load(x_ptr + v).to(tl.float32) - origin) * LOG2E) * scale  # (BLOCK_V,)
            tl.store(dx_ptr + v, dx.to(dx_ptr.dtype.element_ty))
        if whole < V:
            v = whole + tl.arange(0, BLOCK_V)
            x = tl.load(x_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)  # (BLOCK_V,)
            dx = tl.exp2((x - origin) * LOG2E) * scale
            tl.store(dx_ptr + v, dx.to(dx_ptr.dtype.element_ty), mask=v < V)
    tl.debug_barrier()  # the label's own gradient comes after what another thread wrote there


@triton.jit
def _softmax_xent_fwd_kernel(
    loss_ptr, lse_ptr,                  # out  (N,), (N,)
    x_ptr, y_ptr, stride_xn,            # in   (N, V), (N,)
    V, ignore,
    BLOCK_V: tl.constexpr, RUN: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    x_ptr += n * stride_xn
    top, _, total = _statistics(x_ptr, V, BLOCK_V, RUN)
    log_sum = tl.log2(total) * LN2

    y = tl.load(y_ptr + n)
    inside = (y >= 0) & (y < V)
    label = tl.load(x_ptr + y, mask=inside, other=0.0).to(tl.float32)
    # Not lse - label: where logits are large, lse has been rounded to their size.
    loss = tl.where(inside, log_sum - (label - top), float("nan"))
    tl.store(lse_ptr + n, top + log_sum)
    tl.store(loss_ptr + n, tl.where(y == ignore, 0.0, loss))


@triton.jit
def _softmax_xent_bwd_kernel(
    dx_ptr, stride_dxn,                 # out  (N, V)
    dloss_ptr, x_ptr, y_ptr, lse_ptr,   # in   (N,), (N, V), (N,), (N,)
    stride_xn,
    V, ignore,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    x_ptr += n * stride_xn
    dx_ptr += n * stride_dxn
    y, lse, dloss = tl.load(y_ptr + n), tl.load(lse_ptr + n), tl.load(dloss_ptr + n)
    ignored, inside = y == ignore, (y >= 0) & (y < V)
    label = tl.load(x_ptr + y, mask=inside, other=0.0).to(tl.float32)
    _gradient(dx_ptr, x_ptr, lse, tl.where(inside, dloss, float("nan")), ignored, V, BLOCK_V)
    at_label = (tl.exp2((label - lse) * LOG2E) - 1.0) * dloss
    tl.store(dx_ptr + y, at_label.to(dx_ptr.dtype.element_ty), mask=inside & (y != ignore))


@triton.jit
def _softmax_xent_both_kernel(
    loss_ptr, lse_ptr,                  # out    (N,), (N,)
    x_ptr, stride_xn,                   # inout  (N, V)
    dloss_ptr, y_ptr,                   # in     (N,), (N,)
    V, ignore,
    BLOCK_V: tl.constexpr, RUN: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    x_ptr += n * stride_xn
    top, origin, total = _statistics(x_ptr, V, BLOCK_V, RUN)
    log_sum = tl.log2(total) * LN2

    y, dloss = tl.load(y_ptr + n), tl.load(dloss_ptr + n)
    ignored, inside = y == ignore, (y >= 0) & (y < V)
    label = tl.load(x_ptr + y, mask=inside, other=0.0).to(tl.float32)
    tl.store(lse_ptr + n, top + log_sum)
    tl.store(loss_ptr + n, tl.where(ignored, 0.0, tl.where(inside, log_sum - (label - top), float("nan"))))
    tl.debug_barrier()  # every thread has read the label's logit before one overwrites it

    # p is exp(x - m) / s, not exp(x - lse): where logits are large, lse has been rounded to their size.
    _gradient(x_ptr, x_ptr, origin, tl.where(inside, dloss / total, float("nan")), ignored, V, BLOCK_V)
    at_label = (tl.exp2((label - origin) * LOG2E) / total - 1.0) * dloss
    tl.store(x_ptr + y, at_label.to(x_ptr.dtype.element_ty), mask=inside & (y != ignore))


def _config(V, capability):
    """BLOCK_V and num_warps: 16 bytes or more a thread, and a row in as few rounds as registers allow."""
    if capability is None:  # interpreted: the cost is per operation, not per element
        return triton.next_power_of_2(min(V, 65536)), 4
    for limit, block, warps in ((2048, 1024, 2), (16384, 2048, 4)):
        if V <= limit:
            return block, warps
    return 4096, 8


def _both_config(V, capability):
    """BLOCK_V and num_warps: a row in as few rounds as it takes, so few rows at once that they stay in the caches."""
    return _config(V, capability) if capability is None or V <= 16384 else (8192, 32)


def _run(x):
    """Neighbours that Triton loads at once: 16 bytes where it knows that every row begins at a multiple of these."""
    return 16 // x.element_size() if x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 else 1


def _capability(x):
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else None


def softmax_xent_fwd(x, y, ignore):
    N, V = x.shape
    loss = torch.empty(N, dtype=torch.float32, device=x.device)
    lse = torch.empty(N, dtype=torch.float32, device=x.device)
    if N:
        block, warps = _config(max(V, 1), _capability(x))
        with torch.cuda.device_of(x):
            _softmax_xent_fwd_kernel[(N,)](
                loss, lse, x, y, x.stride(0), V, ignore, BLOCK_V=block, RUN=_run(x), num_warps=warps
            )
    return loss, lse


def softmax_xent_bwd(dloss, x, y, lse, ignore):
    N, V = x.shape
    dx = torch.empty(N, V, dtype=x.dtype, device=x.device)
    if dx.numel():
        block, warps = _config(V, _capability(x))
        with torch.cuda.device_of(x):
            _softmax_xent_bwd_kernel[(N,)](
                dx, dx.stride(0), dloss, x, y, lse, x.stride(0), V, ignore, BLOCK_V=block, num_warps=warps
            )
    return dx


def softmax_xent_(x, dloss, y, ignore):
    N, V = x.shape
    loss = torch.empty(N, dtype=torch.float32, device=x.device)
    lse = torch.empty(N, dtype=torch.float32, device=x.device)
    if N:
        block, warps = _both_config(max(V, 1), _capability(x))
        with torch.cuda.device_of(x):
            _softmax_xent_both_kernel[(N,)](
                loss, lse, x, x.stride(0), dloss, y, V, ignore, BLOCK_V=block, RUN=_run(x), num_warps=warps
            )
    return loss, lse
