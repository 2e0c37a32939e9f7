"""The Euclidean norm of a flat buffer.

    norm = sqrt(sum_i g[i]²)

As many programs as n alone decides each walk over blocks of BLOCK elements in strides, keeping BLOCK running sums of
squares in registers, which they add at their end; one more program adds the programs' sums: no atomics, always the
same order, on every GPU.
"""

import torch
import triton
import triton.language as tl

MOST_PROGRAMS = 1024  # a power of two; an A100 holds as many at once, and so does what came after it


@triton.jit
def _grad_norm_partial_kernel(
    partial_ptr,                        # out  (programs,)
    g_ptr,                              # in   (n,)
    n,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i = tl.arange(0, BLOCK)                                                # (BLOCK,)
    squares = tl.zeros((BLOCK,), tl.float32)
    whole = n // BLOCK  # blocks without a mask are loaded 16 bytes at a time
    for block in range(program, whole, programs):
        g = tl.load(g_ptr + block * BLOCK + i)                             # (BLOCK,)
        squares += g * g
    if program == programs - 1:
        start = whole * BLOCK
        g = tl.load(g_ptr + start + i, mask=i < n - start, other=0.0)      # (BLOCK,)
        squares += g * g
    tl.store(partial_ptr + program, tl.sum(squares, axis=0))


@triton.jit
def _grad_norm_merge_kernel(
    norm_ptr,                           # out  ()
    partial_ptr,                        # in   (programs,)
    programs,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)                                                # (BLOCK,)
    squares = tl.load(partial_ptr + i, mask=i < programs, other=0.0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(squares, axis=0)))


def _config(n, capability):
    """BLOCK, num_warps and programs: four loads of 16 bytes a thread in flight."""
    if capability is None:  # interpreted: the cost is per operation, not per element
        return 16384, 4, min(triton.cdiv(n, 16384), 3)
    return 2048, 4, min(triton.cdiv(n, 2048), MOST_PROGRAMS)


def _capability(x):
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else None


def grad_norm(g):
    n = g.numel()
    block, warps, programs = _config(n, _capability(g))
    partial = torch.empty(programs, dtype=torch.float32, device=g.device)
    norm = torch.empty((), dtype=torch.float32, device=g.device)
    with torch.cuda.device_of(g):
        if n:
            _grad_norm_partial_kernel[(programs,)](partial, g, n, BLOCK=block, num_warps=warps)
        _grad_norm_merge_kernel[(1,)](norm, partial, programs, BLOCK=MOST_PROGRAMS, num_warps=4)
    return norm
