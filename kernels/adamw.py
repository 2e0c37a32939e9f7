"""AdamW in place, in one sweep over values, their gradient and its two moments: 28 bytes an element.

    g = scale g;  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g²
    p = p (1 - rate · weight_decay) - rate / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + epsilon)

One program owns BLOCK elements. What depends on the step alone is computed on the host, as floats, which Triton does
not compile anew for, or comes as `rates`. Where scale is not finite nothing is read or written.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _update(
    p_ptr, g_ptr, m_ptr, v_ptr, i, inside, scale,
    keep, rate, root, one_minus_beta1, beta2, one_minus_beta2, epsilon,
):
    """The step of the elements i (BLOCK,) that are inside; all of them where inside is None."""
    p, g = tl.load(p_ptr + i, mask=inside), tl.load(g_ptr + i, mask=inside) * scale            # (BLOCK,)
    m, v = tl.load(m_ptr + i, mask=inside), tl.load(v_ptr + i, mask=inside)                    # (BLOCK,)
    m += one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * g * g
    p = p * keep - rate * m / (tl.sqrt(v) * root + epsilon)
    tl.store(p_ptr + i, p, mask=inside)
    tl.store(m_ptr + i, m, mask=inside)
    tl.store(v_ptr + i, v, mask=inside)


@triton.jit
def _adamw_kernel(
    p_ptr, m_ptr, v_ptr,                # inout (n,), (n,), (n,)
    g_ptr, scale_ptr, rates_ptr,        # in    (n,), () or None, (3,) or None
    keep, rate, root, one_minus_beta1, beta2, one_minus_beta2, epsilon, weight_decay,
    n,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    p_ptr, g_ptr, m_ptr, v_ptr = p_ptr + start, g_ptr + start, m_ptr + start, v_ptr + start
    scale = 1.0 if scale_ptr is None else tl.load(scale_ptr)
    if scale_ptr is not None:
        if not (tl.abs(scale) < float("inf")):
            return
    if rates_ptr is not None:
        learning_rate = tl.load(rates_ptr)
        keep, rate = 1.0 - learning_rate * weight_decay, learning_rate / tl.load(rates_ptr + 1)
        root = tl.rsqrt(tl.load(rates_ptr + 2))
    i = tl.arange(0, BLOCK)                                                                    # (BLOCK,)
    if start + BLOCK <= n:  # a block without a mask is loaded 16 bytes at a time
        _update(p_ptr, g_ptr, m_ptr, v_ptr, i, None, scale,
                keep, rate, root, one_minus_beta1, beta2, one_minus_beta2, epsilon)
    else:
        _update(p_ptr, g_ptr, m_ptr, v_ptr, i, start + i < n, scale,
                keep, rate, root, one_minus_beta1, beta2, one_minus_beta2, epsilon)


def _config(n, capability):
    """BLOCK and num_warps: 16 bytes a thread from each buffer."""
    if capability is None:  # interpreted: the cost is per operation, not per element
        return min(triton.next_power_of_2(n), 16384), 4
    return 1024, 8


def _capability(x):
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else None


def adamw_(p, g, exp_avg, exp_avg_sq, scale, rates, step, learning_rate, beta1, beta2, epsilon, weight_decay):
    n = p.numel()
    if not n:
        return
    block, warps = _config(n, _capability(p))
    keep = rate = root = 1.0
    if rates is None:
        keep, rate = 1.0 - learning_rate * weight_decay, learning_rate / (1.0 - beta1**step)
        root = (1.0 - beta2**step) ** -0.5
    with torch.cuda.device_of(p):
        _adamw_kernel[(triton.cdiv(n, block),)](
            p, exp_avg, exp_avg_sq, g, scale, rates, float(keep), float(rate), float(root), 1.0 - beta1, float(beta2),
            1.0 - beta2, float(epsilon), float(weight_decay), n, BLOCK=block, num_warps=warps,
        )
