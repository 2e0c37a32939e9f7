"""The sums of the columns of partial results, which the gradients of biases and weights end with.

    first[c] = sum_p partial[p, c],   second[c] = sum_p partial[p, C + c],   third[c] = sum_p partial[p, 2 C + c]

One program owns BLOCK_C columns and reads all rows of them, BLOCK_P at a time: no atomics, always the same order.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _column_sums_kernel(
    first_ptr, second_ptr, third_ptr,   # out  (C,), (C,) or None, (C,) or None
    partial_ptr,                        # in   (P, WIDTH), WIDTH = C, 2 C or 3 C
    P,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)    # (BLOCK_C,)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)                                  # (BLOCK_P,)
        rows = partial_ptr + p[:, None].to(tl.int64) * WIDTH
        total += tl.load(rows + c[None, :], mask=(p[:, None] < P) & (c[None, :] < WIDTH), other=0.0)
    sums = tl.sum(total, axis=0)                                           # (BLOCK_C,)
    tl.store(first_ptr + c, sums.to(first_ptr.dtype.element_ty), mask=c < C)
    if second_ptr is not None:
        tl.store(second_ptr + (c - C), sums.to(second_ptr.dtype.element_ty), mask=(c >= C) & (c < 2 * C))
    if third_ptr is not None:
        tl.store(third_ptr + (c - 2 * C), sums.to(third_ptr.dtype.element_ty), mask=(c >= 2 * C) & (c < WIDTH))


def _config(P, capability):
    """BLOCK_P, BLOCK_C and num_warps: narrow columns, that every multiprocessor has some; many rows in flight."""
    if capability is None:  # interpreted: the cost is per operation, not per element
        return triton.next_power_of_2(max(P, 1)), 1024, 4
    return 256, 16, 8


def column_sums(outputs, partial, capability):
    """Writes the sums over p of partial (P, S C) fp32 into the outputs, S ≤ 3 of (C,)."""
    (P, width), C = partial.shape, outputs[0].shape[0]
    if not C:
        return
    block_p, block_c, warps = _config(P, capability)
    first, second, third = (*outputs, None, None)[:3]
    with torch.cuda.device_of(partial):
        _column_sums_kernel[(triton.cdiv(width, block_c),)](
            first, second, third, partial, P, C=C, WIDTH=width, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=warps
        )
