"""linear_xent: the cross-entropy of logits h wᵀ that never exist as a whole, with the gradients of h and w."""

from numbers import Real

import torch

from fastlm.dispatch import define
from fastlm.ops.checks import check, check_dtype
from fastlm.ops.once import Bare, Once, gradient, refuse_double_backward
from fastlm.ops.softmax_xent import check_labels

__all__ = ["linear_xent"]
KERNELS = {
    "cuda": "fastlm.backends.chunked:cuda",
    "triton": "fastlm.backends.chunked:triton",
    "cpu": "fastlm.backends.chunked:cpu",
    "torch": "fastlm.backends.chunked:torch_",
    "reference": "fastlm.backends.reference",
}
ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("cuda", "triton", "torch", "reference")}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear_xent(h, w, y, *, ignore=-100, reduction="mean", scale=None):
    """softmax_xent(h wᵀ, y): the loss of hidden states under a head, logits made a chunk of rows at a time.

    h (N, C) in fp32, bf16 or fp16 (fp64 on `torch` and `reference`); w (V, C) in h's dtype or fp32, taken in h's dtype
    by the products; y (N,) int64 labels in [0, V), or `ignore`. Reductions and results are those of softmax_xent, and
    so are the errors. Under autocast h is taken in its dtype. Differentiable once, in h and w, each gradient in its
    tensor's dtype, w's added up in fp32. For "mean" and "sum" the gradients are computed with the loss (three
    products); for "none" the backward makes the logits again (four).

    scale, a number or a tensor () on h's device, multiplies the result: a loss's weight in a sum, 1 / a count of
    tokens. It goes in with the loss, so that no gradient is multiplied by it afterwards. But in fp16 gradients are
    multiplied last, by it, by 1/N and by what comes in, such as a gradient scaler's: before they are too small for it.
    """
    check("linear_xent", h=(h, "N C"), w=(w, "V C"), y=(y, "N"))
    check_dtype("linear_xent", (*KERNEL_DTYPES, torch.float64), h=h)
    if torch.is_autocast_enabled(h.device.type) and h.dtype in KERNEL_DTYPES:
        h = h.to(torch.get_autocast_dtype(h.device.type))
    check_dtype("linear_xent", (h.dtype, torch.float32), w=w)
    check_dtype("linear_xent", (torch.int64,), y=y)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_xent: reduction is {reduction!r}, wanted 'mean', 'sum' or 'none'")
    count = check_labels("linear_xent", y, w.shape[0], ignore)
    _check_scale(scale, h)
    h, w, y = h.contiguous(), w.contiguous(), y.contiguous()
    mean = reduction == "mean"
    if reduction != "none" and torch.is_grad_enabled() and (h.requires_grad or w.requires_grad):
        return _LinearXentGrad.run(h, w, y, ignore, mean, scale, count)[0]
    loss = _LinearXent.run(h, w, y, ignore)[0]
    if reduction == "none":
        return loss if scale is None else (loss * scale).to(loss.dtype)
    return _reduced(loss.sum(), _count(y, ignore, count) if mean else None, scale)


def _count(y, ignore, count):
    """The rows that count, a number where that is known, else a tensor ()."""
    return (y != ignore).sum() if count is None else count


def _reduced(total, count, scale):
    loss = total if count is None else total / count
    return loss if scale is None else (loss * scale).to(loss.dtype)


def _check_scale(scale, h):
    if isinstance(scale, torch.Tensor):
        if scale.dim() or scale.device != h.device:
            told = f"{str(scale.dtype).removeprefix('torch.')} {tuple(scale.shape)} on {scale.device}"
            raise ValueError(f"linear_xent: scale is {told}, wanted a number, or a tensor () on {h.device}")
        if scale.requires_grad:
            raise ValueError("linear_xent: scale requires a gradient, but there is none for it")
    elif scale is not None and not isinstance(scale, Real):
        raise TypeError(f"linear_xent: scale is {scale!r}, wanted a number, or a tensor () on {h.device}")


class _LinearXent(Once):
    op, returned = "linear_xent", 1

    @staticmethod
    def forward(h, w, y, ignore):
        return _fwd(h, w, y, ignore)

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, w, y, ctx.ignore = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(h, w, y, output[1])

    @staticmethod
    def backward(ctx, dloss, *_):
        return *gradient("linear_xent", _gradients, dloss, *ctx.saved_tensors, ctx.ignore), None, None


def _gradients(dloss, h, *rest):
    return _bwd(dloss.contiguous(), h.contiguous(), *rest)


def _computed(h, w, y, ignore, mean, scale, count):
    """(loss, dh, dw, factor): gradients of the loss, or, in fp16, what is to be multiplied by the factor ()."""
    wide, factor = torch.promote_types(h.dtype, torch.float32), 1.0
    count = _count(y, ignore, count) if mean else None
    if isinstance(count, torch.Tensor):
        factor = torch.where(count > 0, 1 / count.to(wide), 0.0)  # where all are ignored every gradient is 0
    elif mean:
        factor = 1 / count
    if scale is not None:
        factor = factor * scale
    numeric = not isinstance(factor, torch.Tensor)
    factor = torch.full((), factor, dtype=wide, device=h.device) if numeric else factor.to(wide)
    total, dh, dw = _grad(h, w, y, ignore, None if _late(h) else factor)
    return _reduced(total, count, scale), dh, dw, factor


def _late(h):
    """Whether gradients are multiplied last: N times smaller, most would be below fp16's smallest numbers."""
    return h.dtype == torch.float16


def _multiplied(dloss, h, w, dh, dw, factor):
    if not _late(h):
        return dh * dloss, dw * dloss
    dloss = dloss * factor
    return (dh.to(dloss.dtype) * dloss).to(h.dtype), (dw * dloss).to(w.dtype)


class _Bare(Bare):
    op = "linear_xent"

    @staticmethod
    def forward(ctx, h, w, y, ignore, mean, scale, count):
        loss, *saved = _computed(h, w, y, ignore, mean, scale, count)
        ctx.save_for_backward(*saved)
        ctx.like = h.new_empty(0), w.new_empty(0)  # their dtypes
        return (loss,)

    @staticmethod
    def backward(ctx, dloss):
        refuse_double_backward("linear_xent")
        (h, w), (dh, dw, factor) = ctx.like, ctx.saved_tensors
        if not (_late(h) or torch.compiler.is_compiling()) and dloss.device.type == "cpu" and float(dloss) == 1.0:
            return dh, dw, *[None] * 5  # as they are: a copy of w's gradient costs as much as AdamW's read of it
        return *_multiplied(dloss, h, w, dh, dw, factor), *[None] * 5


class _LinearXentGrad(Once):
    op, bare = "linear_xent", _Bare

    @staticmethod
    def forward(h, w, y, ignore, mean, scale, count):
        return _computed(h, w, y, ignore, mean, scale, count)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:2], *output[1:])

    @staticmethod
    def backward(ctx, dloss, *_):
        return *gradient("linear_xent", _multiplied, dloss, *ctx.saved_tensors), *[None] * 5


def _limits(backend, h, *_):
    if backend in ("cuda", "triton", "cpu") and h.dtype not in KERNEL_DTYPES:
        return f"the {backend} kernel takes float32, bfloat16 or float16, got {h.dtype}"
    return None


def _loss_fake(h):
    return h.new_empty(h.shape[:1], dtype=torch.promote_types(h.dtype, torch.float32))


_ROW = {"family": "linear_xent", "kernels": KERNELS, "order": ORDER}
_KEY = {"key": lambda h, *_: (h.device, h.dtype), "limits": _limits}
_fwd = define(
    "linear_xent_fwd(Tensor h, Tensor w, Tensor y, int ignore) -> (Tensor loss, Tensor lse)",
    **_ROW, **_KEY, fake=lambda h, w, y, ignore: (_loss_fake(h), _loss_fake(h)),
)
_bwd = define(
    "linear_xent_bwd(Tensor dloss, Tensor h, Tensor w, Tensor y, Tensor lse, int ignore) -> (Tensor dh, Tensor dw)",
    **_ROW, key=lambda dloss, h, *_: (h.device, h.dtype), limits=lambda backend, dloss, h, *_: _limits(backend, h),
    fake=lambda dloss, h, w, *_: (h.new_empty(h.shape), w.new_empty(w.shape)),
)
# The sum of the losses and its gradients times a factor (); without one w's is in fp32 at least.
_grad = define(
    "linear_xent_grad(Tensor h, Tensor w, Tensor y, int ignore, Tensor? factor) -> (Tensor loss, Tensor dh, Tensor dw)",
    **_ROW, **_KEY,
    fake=lambda h, w, y, ignore, factor: (
        _loss_fake(h).new_empty(()), h.new_empty(h.shape),
        w.new_empty(w.shape, dtype=w.dtype if factor is not None else torch.promote_types(w.dtype, torch.float32))),
)


def example(random, to):
    """The results of a call of its own, by name; random(*shape) gives operands, `to` moves them to device and dtype."""
    h, w, y = to(random(24, 32)).requires_grad_(), to(random(131, 32)).requires_grad_(), torch.arange(24) * 43 % 131
    y[3] = -100
    linear_xent(h, w, y.to(h.device), reduction="sum").backward()
    return {"dh": h.grad, "dw": w.grad}
