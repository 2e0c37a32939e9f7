"""A bias and GELU in its tanh form, and their gradients.

    u = x[n, c] + bias[c],   z = sqrt(2 / pi) (u + 0.044715 u³)
    p = (1 + tanh z) / 2 = 1 / (1 + e),   e = exp(-2 z)
    y[n, c]  = u p
    dx[n, c] = dy[n, c] (p + u p (e p) dz),   dz = 2 sqrt(2 / pi) (1 + 3 · 0.044715 u²)
    dbias[c] = sum_n dx[n, c]

Forward: one program owns a tile of BLOCK_N rows and BLOCK_C columns. Backward: as many programs as the GPU holds at
once each own BLOCK_C columns and walk over their share of the rows, keeping the sums of their columns in registers,
for `column_sums` to add: no atomics, always the same order.
"""

import torch
import triton
import triton.language as tl

from .column_sums import column_sums

RATE: tl.constexpr = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
RATE_LOG2E: tl.constexpr = tl.constexpr(1.5957691216057308 * 1.4426950408889634)
CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def _sigmoid(u):
    """e = exp(-2 z) and p = 1 / (1 + e) of a block of u; where u is large, p is 0 or 1."""
    e = tl.exp2(u * (u * u * (-CUBIC * RATE_LOG2E) - RATE_LOG2E))
    root = tl.rsqrt(1.0 + e)  # one instruction, where a division is five
    return e, root * root


@triton.jit
def _bias_gelu_fwd_kernel(
    y_ptr,                              # out  (N, C)
    x_ptr, bias_ptr, stride_xn,         # in   (N, C), (C,)
    N,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    n = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)        # (BLOCK_N,)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)                        # (BLOCK_C,)
    inside = (n[:, None] < N) & (c[None, :] < C)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)                     # (BLOCK_C,)
    x = tl.load(x_ptr + n[:, None] * stride_xn + c[None, :], mask=inside, other=0.0)       # (BLOCK_N, BLOCK_C)
    u = x.to(tl.float32) + bias[None, :]
    y = u * _sigmoid(u)[1]
    tl.store(y_ptr + n[:, None] * C + c[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_gelu_bwd_kernel(
    dx_ptr, partial_ptr,                                    # out  (N, C), (programs, C)
    dy_ptr, x_ptr, bias_ptr, stride_dyn, stride_xn,         # in   (N, C), (N, C), (C,)
    N,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program, programs = (tl.program_id(0) // blocks).to(tl.int64), tl.num_programs(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)                        # (BLOCK_C,)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)                     # (BLOCK_C,)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(program * BLOCK_N, N, programs * BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)                                     # (BLOCK_N,)
        inside = (n[:, None] < N) & (c[None, :] < C)
        dy = tl.load(dy_ptr + n[:, None] * stride_dyn + c[None, :], mask=inside, other=0.0)
        x = tl.load(x_ptr + n[:, None] * stride_xn + c[None, :], mask=inside, other=0.0)   # (BLOCK_N, BLOCK_C)
        u = x.to(tl.float32) + bias[None, :]
        e, p = _sigmoid(u)
        bend = u * (e * p) * p * (u * u * (3.0 * CUBIC * RATE) + RATE)
        bend = tl.where(tl.abs(u) > 10.0, 0.0, bend)  # below 1e-35 there; further out e or u² is infinite
        dx = dy.to(tl.float32) * (p + bend)
        tl.store(dx_ptr + n[:, None] * C + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dbias += tl.sum(dx, axis=0)
    tl.store(partial_ptr + program * C + c, dbias, mask=c < C)


def _config(C, size, capability):
    """BLOCK_N, BLOCK_C, num_warps and, of the backward, programs a multiprocessor; x has `size` bytes an element.

    A thread has the same 8 columns of every row, so that no warp adds to another's sums, and 32 bytes of x: with more
    of them, the backward runs out of registers.
    """
    if capability is None:  # interpreted: the cost is per operation, not per element
        return 16, min(triton.next_power_of_2(C), 512), 4, 1
    block = 512 if C <= 512 else 1024
    return 4 // size, block, block // 256, 8192 // block


def _capability(x):
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else None


def _multiprocessors(x):
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def bias_gelu_fwd(x, bias):
    N, C = x.shape
    y = torch.empty(N, C, dtype=x.dtype, device=x.device)
    if y.numel():
        block_n, block_c, warps, _ = _config(C, x.element_size(), _capability(x))
        with torch.cuda.device_of(x):
            _bias_gelu_fwd_kernel[(triton.cdiv(N, block_n) * triton.cdiv(C, block_c),)](
                y, x, bias.contiguous(), x.stride(0), N, C=C, BLOCK_N=block_n, BLOCK_C=block_c, num_warps=warps
            )
    return y


def bias_gelu_bwd(dy, x, bias):
    N, C = x.shape
    dx = torch.empty(N, C, dtype=x.dtype, device=x.device)
    dbias = torch.empty(C, dtype=bias.dtype, device=x.device)
    capability = _capability(x)
    block_n, block_c, warps, share = _config(max(C, 1), x.element_size(), capability)
    blocks = triton.cdiv(C, block_c)
    programs = min(triton.cdiv(N, block_n), triton.cdiv(share * _multiprocessors(x), max(blocks, 1)))
    partial = torch.empty(programs, C, dtype=torch.float32, device=x.device)
    if dx.numel():
        with torch.cuda.device_of(x):
            _bias_gelu_bwd_kernel[(programs * blocks,)](
                dx, partial, dy, x, bias.contiguous(), dy.stride(0), x.stride(0), N,
                C=C, BLOCK_N=block_n, BLOCK_C=block_c, num_warps=warps,
            )
    column_sums((dbias,), partial, capability)
    return dx, dbias
