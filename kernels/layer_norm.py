"""Layer normalisation of rows, with the addition of a residual before it, and its gradients.

    s[n, c]  = x[n, c] + x_bias[c] + residual[n, c]         x[n, c] where there is no residual
    h[n, c]  = (s[n, c] - mean[n]) * rstd[n]                rstd[n] = 1 / sqrt(variance[n] + epsilon)
    y[n, c]  = h[n, c] * weight[c] + bias[c]
    g[n, c]  = dy[n, c] * weight[c]
    dx[n, c] = (g[n, c] - mean_c g - h[n, c] * mean_c (g h)) * rstd[n] + ds[n, c]
    dweight[c] = sum_n dy[n, c] h[n, c],   dbias[c] = sum_n dy[n, c],   dx_bias[c] = sum_n dx[n, c]

Forward: one program owns one row, which stays in registers: memory is read once, though the variance is that of the
differences from the mean. Backward: as many programs as the GPU holds at once walk over the rows in strides, each
keeping its share of these sums in registers, for `column_sums` to add: no atomics, always the same order.
"""

import torch
import triton
import triton.language as tl

from .column_sums import column_sums


@triton.jit
def _layer_norm_fwd_kernel(
    y_ptr, s_ptr, mean_ptr, rstd_ptr,                       # out  (N, C), (N, C) or None, (N,), (N,)
    x_ptr, residual_ptr, stride_xn, stride_rn,              # in   (N, C), (N, C) or None
    x_bias_ptr, weight_ptr, bias_ptr,                       # in   (C,) or None, (C,), (C,)
    epsilon,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)                                                              # (BLOCK_C,)
    inside = c < C
    s = tl.load(x_ptr + n * stride_xn + c, mask=inside, other=0.0).to(tl.float32)          # (BLOCK_C,)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)                # (BLOCK_C,)
    bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)                    # (BLOCK_C,)
    if residual_ptr is not None:
        if x_bias_ptr is not None:
            s += tl.load(x_bias_ptr + c, mask=inside, other=0.0).to(tl.float32)            # (BLOCK_C,)
        residual = tl.load(residual_ptr + n * stride_rn + c, mask=inside, other=0.0)       # (BLOCK_C,)
        rounded = (s + residual.to(tl.float32)).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + n * C + c, rounded, mask=inside)
        s = rounded.to(tl.float32)
    mean = tl.sum(s, axis=0) / C
    difference = tl.where(inside, s - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(difference * difference, axis=0) / C + epsilon)
    y = difference * rstd * weight + bias
    tl.store(y_ptr + n * C + c, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + n, mean)
    tl.store(rstd_ptr + n, rstd)


@triton.jit
def _bwd_row(dy_ptr, ds_ptr, s_ptr, mean_ptr, rstd_ptr, stride_dyn, stride_dsn, stride_sn, n, N, c, C):
    """dy, ds, s (BLOCK_C,), mean and rstd of row n, as they are stored; zeros beyond N, and s where ds is None."""
    inside = (c < C) & (n < N)
    dy = tl.load(dy_ptr + n * stride_dyn + c, mask=inside, other=0.0)
    s = tl.load(s_ptr + n * stride_sn + c, mask=inside, other=0.0)
    ds = s if ds_ptr is None else tl.load(ds_ptr + n * stride_dsn + c, mask=inside, other=0.0)
    return dy, ds, s, tl.load(mean_ptr + n, mask=n < N, other=0.0), tl.load(rstd_ptr + n, mask=n < N, other=0.0)


@triton.jit
def _layer_norm_bwd_kernel(
    dx_ptr, dresidual_ptr, partial_ptr,                     # out  (N, C), (N, C) or None, (programs, 2 C or 3 C)
    dy_ptr, ds_ptr, s_ptr,                                  # in   (N, C), (N, C) or None, (N, C)
    stride_dyn, stride_dsn, stride_sn,
    weight_ptr, mean_ptr, rstd_ptr,                         # in   (C,), (N,), (N,)
    N,
    C: tl.constexpr, BLOCK_C: tl.constexpr, AHEAD: tl.constexpr, X_BIAS: tl.constexpr,
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    c = tl.arange(0, BLOCK_C)                                                              # (BLOCK_C,)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)                 # (BLOCK_C,)
    dweight, dbias = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    dx_bias = tl.zeros((BLOCK_C,), tl.float32)
    if AHEAD:
        next_dy, next_ds, next_s, next_mean, next_rstd = _bwd_row(
            dy_ptr, ds_ptr, s_ptr, mean_ptr, rstd_ptr, stride_dyn, stride_dsn, stride_sn, program, N, c, C)
    for past in range(0, N - program, programs):
        n = program + past
        if AHEAD:  # the next row is on its way while this one is computed: a barrier lets no load pass
            dy, ds, s, mean, rstd = next_dy, next_ds, next_s, next_mean, next_rstd
            next_dy, next_ds, next_s, next_mean, next_rstd = _bwd_row(
                dy_ptr, ds_ptr, s_ptr, mean_ptr, rstd_ptr, stride_dyn, stride_dsn, stride_sn, n + programs, N, c, C)
        else:
            dy, ds, s, mean, rstd = _bwd_row(
                dy_ptr, ds_ptr, s_ptr, mean_ptr, rstd_ptr, stride_dyn, stride_dsn, stride_sn, n, N, c, C)
        slope = dy.to(tl.float32)
        h, g = (s.to(tl.float32) - mean) * rstd, slope * weight  # beyond C, g is 0 and h is not
        mean_g, mean_gh = tl.sum(g, axis=0) / C, tl.sum(g * h, axis=0) / C
        dx = (g - mean_g - h * mean_gh) * rstd
        if ds_ptr is not None:
            dx += ds.to(tl.float32)
        tl.store(dx_ptr + n * C + c, dx.to(dx_ptr.dtype.element_ty), mask=c < C)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + n * C + c, dx.to(dresidual_ptr.dtype.element_ty), mask=c < C)
        dweight += slope * h
        dbias += slope
        if X_BIAS:
            dx_bias += dx
    partial_ptr += program * ((3 if X_BIAS else 2) * C)
    tl.store(partial_ptr + c, dweight, mask=c < C)
    tl.store(partial_ptr + C + c, dbias, mask=c < C)
    if X_BIAS:
        tl.store(partial_ptr + 2 * C + c, dx_bias, mask=c < C)


def _config(C, size, capability):
    """BLOCK_C, num_warps and, of the backward, AHEAD and programs a multiprocessor; s has `size` bytes an element.

    A thread holds 16 bytes of s: with 8 elements of fp32, tensors of fp32 and bf16 would lie differently over the
    threads. Where these are 4 elements, registers are left for a row ahead.
    """
    block = triton.next_power_of_2(C)
    if capability is None:  # interpreted
        return block, 4, size == 4, 2
    warps = max(block * size // 512, 1)
    return block, warps, size == 4, max(32 // warps, 1)


def _registers(C, ahead):
    """With more, which ptxas may take for a row ahead, a multiprocessor would hold half as many programs.

    Rows that are read 2 bytes at a time need more of them.
    """
    return {"maxnreg": 64} if ahead and C % 8 == 0 else {}


def _capability(x):
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else None


def _multiprocessors(x):
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def layer_norm_fwd(x, residual, x_bias, weight, bias, epsilon, dtype):
    N, C = x.shape
    y = torch.empty(N, C, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(N, dtype=torch.float32, device=x.device) for _ in range(2))
    s = torch.empty(0, dtype=x.dtype, device=x.device)
    if residual is not None:
        s = torch.empty(N, C, dtype=residual.dtype, device=x.device)
    if y.numel():
        block, warps, *_ = _config(C, (x if residual is None else residual).element_size(), _capability(x))
        with torch.cuda.device_of(x):
            _layer_norm_fwd_kernel[(N,)](
                y, None if residual is None else s, mean, rstd, x, residual, x.stride(0),
                0 if residual is None else residual.stride(0), None if x_bias is None else x_bias.contiguous(),
                weight.contiguous(), bias.contiguous(), epsilon,
                C=C, BLOCK_C=block, num_warps=warps,
            )
    return y, s, mean, rstd


def layer_norm_bwd(dy, ds, s, weight, mean, rstd, dtype, x_bias):
    N, C = s.shape
    dx = torch.empty(N, C, dtype=dtype, device=s.device)
    dresidual = torch.empty(N if dtype != s.dtype else 0, C, dtype=s.dtype, device=s.device)
    dweight, dbias = (torch.empty(C, dtype=weight.dtype, device=s.device) for _ in range(2))
    dx_bias = torch.empty(C if x_bias else 0, dtype=torch.float32, device=s.device)
    capability = _capability(s)
    block, warps, ahead, share = _config(max(C, 1), s.element_size(), capability)
    programs = min(N, share * _multiprocessors(s))
    partial = torch.empty(programs, (3 if x_bias else 2) * C, dtype=torch.float32, device=s.device)
    if dx.numel():
        with torch.cuda.device_of(s):
            _layer_norm_bwd_kernel[(programs,)](
                dx, dresidual if dtype != s.dtype else None, partial, dy, ds, s, dy.stride(0),
                0 if ds is None else ds.stride(0), s.stride(0), weight.contiguous(), mean, rstd, N,
                C=C, BLOCK_C=block, AHEAD=ahead, X_BIAS=x_bias, num_warps=warps, **_registers(C, ahead),
            )
    column_sums((dweight, dbias, dx_bias) if x_bias else (dweight, dbias), partial, capability)
    return dx, dresidual, dweight, dbias, dx_bias
