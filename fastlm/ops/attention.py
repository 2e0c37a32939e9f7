"""attention and attention_qkv: causal softmax attention that never stores its (T, S) weights."""

import torch

from fastlm.dispatch import define
from fastlm.dispatch.table import homes
from fastlm.ops.checks import check, check_dtype, inner_contiguous
from fastlm.ops.once import Once, gradient

__all__ = ["attention", "attention_qkv"]
KERNELS = homes("attention", "cuda", "triton", "cpu", "torch", "reference")
BACKWARD = homes("attention", "triton", "cpu", "torch", "reference")  # `cuda` has the forward alone
ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("torch", "triton", "cuda", "reference")}
SHORT = 2048  # tokens up to which Triton's backward was measured to be faster than cuDNN's
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_D = {"cuda": 128, "triton": 128, "cpu": 256}
CAUSAL = {False: 0, True: 1, "top-left": 2}


def attention(q, k, v, *, causal=True, scale=None, dropout=0.0, seed=None, return_lse=False):
    """softmax(scale · q kᵀ) v for every head, (B, T, H, D) like q.

    q (B, T, H, D), k and v (B, S, H, D) in fp32, bf16 or fp16 (fp64 on `torch` and `reference`), any strides with D
    contiguous. causal: True lets query t see the keys s ≤ t + S - T, "top-left" s ≤ t, False all. A query that sees
    no key gives 0 (lse -inf). scale is 1/√D unless given. dropout in [0, 1) drops weights, in steps of 1/256, with
    seed an int64 tensor (4,) on q's device: seed, step, layer, index of the first sequence (the same weights are
    dropped on every backend, see csrc/fastlm.h). With return_lse also the natural log-sum-exp, fp32 (B, H, T), not
    differentiable. Raises ValueError or TypeError before anything is computed. Differentiable once.
    """
    sizes = check("attention", q=(q, "B T H D"), k=(k, "B S H D"), v=(v, "B S H D"))
    check_dtype("attention", (*KERNEL_DTYPES, torch.float64), q=q, k=k, v=v)
    options = _options("attention", q, sizes["D"], causal, scale, dropout, seed)
    o, lse = _Attention.run(q, k, v, *options)
    return (o, lse) if return_lse else o


def attention_qkv(qkv, *, causal=True, scale=None, dropout=0.0, seed=None, return_lse=False):
    """As `attention`, of q, k, v packed in one tensor (B, T, 3, H, D); its gradient comes back packed the same way."""
    sizes = check("attention_qkv", qkv=(qkv, "B T 3 H D"))
    check_dtype("attention_qkv", (*KERNEL_DTYPES, torch.float64), qkv=qkv)
    options = _options("attention_qkv", qkv, sizes["D"], causal, scale, dropout, seed)
    o, lse = _AttentionQKV.run(qkv, *options)
    return (o, lse) if return_lse else o


def _options(op, q, D, causal, scale, dropout, seed):
    if causal not in CAUSAL:
        raise ValueError(f"{op}: causal is {causal!r}, wanted True, False or 'top-left'")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{op}: dropout is {dropout}, wanted 0 ≤ dropout < 1")
    if dropout and seed is None:
        raise ValueError(f"{op}: dropout={dropout} needs seed, an int64 tensor (4,): seed, step, layer, first sequence")
    if seed is not None:
        if seed.dtype != torch.int64 or seed.shape != (4,) or seed.device != q.device:
            raise ValueError(
                f"{op}: seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}, wanted int64 (4,) on {q.device}"
            )
    return CAUSAL[causal], D**-0.5 if scale is None else float(scale), float(dropout), seed if dropout else None


class _Attention(Once):
    op = "attention"

    @staticmethod
    def forward(q, k, v, causal, scale, dropout, seed):
        return _fwd(inner_contiguous(q), inner_contiguous(k), inner_contiguous(v), causal, scale, dropout, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, ctx.causal, ctx.scale, ctx.dropout, seed = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, v, *output, seed)

    @staticmethod
    def backward(ctx, do, _):
        *saved, seed = ctx.saved_tensors
        found = gradient("attention", _gradients, do, *saved, ctx.causal, ctx.scale, ctx.dropout, seed)
        return *found, None, None, None, None


def _gradients(do, q, k, v, *rest):
    return _bwd(*(inner_contiguous(tensor) for tensor in (do, q, k, v)), *rest)


class _AttentionQKV(Once):
    op = "attention_qkv"

    @staticmethod
    def forward(qkv, causal, scale, dropout, seed):
        return _qkv_fwd(inner_contiguous(qkv), causal, scale, dropout, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        qkv, ctx.causal, ctx.scale, ctx.dropout, seed = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(qkv, *output, seed)

    @staticmethod
    def backward(ctx, do, _):
        *saved, seed = ctx.saved_tensors
        dqkv = gradient("attention_qkv", _qkv_gradient, do, *saved, ctx.causal, ctx.scale, ctx.dropout, seed)
        return dqkv, None, None, None, None


def _qkv_gradient(do, qkv, *rest):
    return _qkv_bwd(inner_contiguous(do), inner_contiguous(qkv), *rest)


def _backward_order(do, *_):
    """On Hopper, with heads of GPT-2's size, cuDNN's backward and the packing of its three gradients take longer."""
    half, hopper = do.dtype != torch.float32, torch.cuda.get_device_capability(do.device)[0] == 9
    ours = half and hopper and do.shape[-1] <= 64 and do.shape[1] <= SHORT
    return ("triton", "torch", "reference") if ours else ("torch", "triton", "reference")


# Every variant's first argument, q, qkv or do, tells device, dtype, T and D; its last but one is dropout.
def _key(x, *rest):
    return x.device, x.dtype, x.shape[-1], rest[-2] > 0


def _backward_key(do, *rest):
    return *_key(do, *rest), do.shape[1] <= SHORT  # as _backward_order


def _limits(backend, x, *rest):
    dropout, D = rest[-2], x.shape[-1]
    if backend in LARGEST_D and x.dtype not in KERNEL_DTYPES:
        return f"the {backend} kernel takes float32, bfloat16 or float16, got {x.dtype}"
    if backend == "cuda" and x.dtype == torch.float32:
        return "the cuda kernel works on the tensor cores, in bfloat16 or float16, got torch.float32"
    if D > LARGEST_D.get(backend, D):
        return f"the {backend} kernel takes head dimensions up to {LARGEST_D[backend]}, got D={D}"
    if backend == "torch" and dropout:
        return "torch's attention draws its own dropout mask and cannot repeat fastlm's: use another backend"
    return None


def _fwd_fake(x, *_):
    B, T, *_, H, D = x.shape  # of q, or of qkv
    return x.new_empty((B, T, H, D)), x.new_empty((B, H, T), dtype=torch.promote_types(x.dtype, torch.float32))


def _bwd_fake(do, *rest):
    gradients = [x.new_empty(x.shape) for x in rest[:-6]]  # before o, lse and the options
    return gradients[0] if len(gradients) == 1 else tuple(gradients)


_OPTIONS = "int causal, float scale, float dropout, Tensor? seed"
_ROW = {"family": "attention", "limits": _limits}
_FORWARD = {**_ROW, "kernels": KERNELS, "order": ORDER, "key": _key, "fake": _fwd_fake}
_BACKWARD = {**_ROW, "kernels": BACKWARD, "order": {**ORDER, "cuda": _backward_order}, "key": _backward_key,
             "fake": _bwd_fake}
_fwd = define(f"attention_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor o, Tensor lse)", **_FORWARD)
_bwd = define(
    f"attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv)", **_BACKWARD)
_qkv_fwd = define(f"attention_qkv_fwd(Tensor qkv, {_OPTIONS}) -> (Tensor o, Tensor lse)", **_FORWARD)
_qkv_bwd = define(
    f"attention_qkv_bwd(Tensor do, Tensor qkv, Tensor o, Tensor lse, {_OPTIONS}) -> Tensor dqkv", **_BACKWARD)


def example(random, to):
    """The results of a call of its own, by name; random(*shape) gives operands, `to` moves them to device and dtype."""
    qkv, do = to(random(2, 65, 3, 2, 64)).requires_grad_(), to(random(2, 65, 2, 64))
    o = attention_qkv(qkv)
    o.backward(do)
    return {"o": o.detach(), "dqkv": qkv.grad}
