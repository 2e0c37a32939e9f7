"""layer_norm: normalisation over the last dimension, with the addition of a residual before it in the same pass."""

import torch
import torch.nn.functional as F

from fastlm.dispatch import define, left_to_inductor
from fastlm.dispatch.table import homes
from fastlm.ops.checks import check, check_dtype, inner_contiguous
from fastlm.ops.once import Once, gradient

__all__ = ["layer_norm"]
KERNELS = homes("layer_norm", "triton", "cpu", "torch", "reference")
ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("triton", "torch", "reference")}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INPUT_DTYPES = (*KERNEL_DTYPES, torch.float64)
LARGEST_C = 4096  # of the triton kernel, which holds a row in registers


def layer_norm(x, weight, bias, *, residual=None, x_bias=None, epsilon=1e-5, dtype=None):
    """(s - mean) / √(variance + epsilon) · weight + bias of every row of s = x, or of s = x + x_bias + residual.

    x (N, C) in fp32, bf16 or fp16 (fp64 on `torch` and `reference`), rows any distance apart; residual (N, C) in x's
    dtype or fp32; x_bias (C,), which goes with a residual, weight and bias (C,) in the dtype of x or of residual, or
    fp32. Returns y (N, C) in `dtype` (that of s unless given); with a residual (y, s), s in the residual's dtype, to be
    added to next. Mean and variance are fp32. Raises ValueError or TypeError before anything is computed.
    Differentiable once, in all tensors.
    """
    extra = {} if residual is None else {"residual": (residual, "N C")}
    if x_bias is not None:
        if residual is None:
            raise ValueError("layer_norm: x_bias goes with a residual, and there is none")
        extra["x_bias"] = (x_bias, "C")
    check("layer_norm", x=(x, "N C"), **extra, weight=(weight, "C"), bias=(bias, "C"))
    check_dtype("layer_norm", INPUT_DTYPES, x=x)
    if residual is not None:
        check_dtype("layer_norm", (x.dtype, torch.float32), residual=residual)
    s_dtype = x.dtype if residual is None else residual.dtype
    if x_bias is not None:
        check_dtype("layer_norm", (x.dtype, s_dtype, torch.float32), x_bias=x_bias)
    check_dtype("layer_norm", (x.dtype, s_dtype, torch.float32), weight=weight, bias=bias)
    dtype = s_dtype if dtype is None else dtype
    if dtype not in (x.dtype, s_dtype, *KERNEL_DTYPES):
        raise TypeError(f"layer_norm: dtype is {dtype}, wanted float32, bfloat16 or float16")
    if left_to_inductor("layer_norm", x):
        return _composition(x, weight, bias, residual, x_bias, epsilon, dtype)
    if residual is None:
        return _LayerNorm.run(x, weight, bias, epsilon, dtype)[0]
    return _AddLayerNorm.run(x, residual, x_bias, weight, bias, epsilon, dtype)[:2]


def _composition(x, weight, bias, residual, x_bias, epsilon, dtype):
    s, wide = x, torch.promote_types(x.dtype, torch.float32)
    if residual is not None:
        s = x.to(wide) + residual if x_bias is None else x.to(wide) + x_bias + residual
        s = s.to(residual.dtype)
    y = F.layer_norm(s.to(wide), weight.shape, weight.to(wide), bias.to(wide), epsilon).to(dtype)
    return y if residual is None else (y, s)


class _LayerNorm(Once):
    op, returned = "layer_norm", 1

    @staticmethod
    def forward(x, weight, bias, epsilon, dtype):
        y, _, mean, rstd = _fwd(inner_contiguous(x), None, None, weight, bias, epsilon, dtype)
        return y, mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight = inputs[:2]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, *output[1:])

    @staticmethod
    def backward(ctx, dy, *_):
        x, *saved = ctx.saved_tensors
        dx, _, dweight, dbias, _ = gradient("layer_norm", _gradients, dy, None, x, *saved, x.dtype, False)
        return dx, dweight, dbias, None, None


class _AddLayerNorm(Once):
    op, returned = "layer_norm", 2

    @staticmethod
    def forward(x, residual, x_bias, weight, bias, epsilon, dtype):
        return _fwd(inner_contiguous(x), inner_contiguous(residual), x_bias, weight, bias, epsilon, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, x_bias, weight = inputs[:4]
        ctx.dtype, ctx.bias_dtype = x.dtype, None if x_bias is None else x_bias.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(weight, *output[1:])

    @staticmethod
    def backward(ctx, dy, ds, *_):
        weight, s, mean, rstd = ctx.saved_tensors
        rides = ctx.bias_dtype is not None
        if dy is None:  # what was normalised was not used
            if ds is None:
                return (None,) * 7
            dx_bias = ds.sum(0, dtype=mean.dtype).to(ctx.bias_dtype) if rides else None
            return ds.to(ctx.dtype), ds, dx_bias, *[None] * 4
        dx, dresidual, *others, dx_bias = gradient(
            "layer_norm", _gradients, dy, ds, s, weight, mean, rstd, ctx.dtype, rides)
        dx_bias = dx_bias.to(ctx.bias_dtype) if rides else None
        return dx, dx if ctx.dtype == s.dtype else dresidual, dx_bias, *others, None, None


def _gradients(dy, ds, s, *rest):
    ds = None if ds is None else inner_contiguous(ds)
    return _bwd(inner_contiguous(dy), ds, inner_contiguous(s), *rest)


def _limits(backend, *args):
    C = args[0].shape[1]
    if backend == "triton" and C > LARGEST_C:
        return f"the triton kernel takes C up to {LARGEST_C}, got {C}"
    wrong = [arg.dtype for arg in args if isinstance(arg, torch.Tensor) and arg.dtype not in KERNEL_DTYPES]
    if backend in ("triton", "cpu") and wrong:
        return f"the {backend} kernel takes float32, bfloat16 or float16, got {wrong[0]}"
    return None


def _fwd_fake(x, residual, x_bias, weight, bias, epsilon, dtype):
    statistics = torch.promote_types(x.dtype if residual is None else residual.dtype, torch.float32)
    s = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    return (x.new_empty(x.shape, dtype=dtype), s, *(x.new_empty(x.shape[:1], dtype=statistics) for _ in range(2)))


def _bwd_fake(dy, ds, s, weight, mean, rstd, dtype, x_bias):
    dresidual = s.new_empty(s.shape) if dtype != s.dtype else s.new_empty(0, s.shape[1])
    others = [weight.new_empty(weight.shape) for _ in range(2)]
    return s.new_empty(s.shape, dtype=dtype), dresidual, *others, mean.new_empty(s.shape[1] if x_bias else 0)


_ROW = {"family": "layer_norm", "kernels": KERNELS, "order": ORDER, "limits": _limits}
_fwd = define(
    "layer_norm_fwd(Tensor x, Tensor? residual, Tensor? x_bias, Tensor weight, Tensor bias, float epsilon,"
    " ScalarType dtype) -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)",
    **_ROW, fake=_fwd_fake,
    key=lambda x, residual, *_: (x.device, x.dtype, None if residual is None else residual.dtype,
                                 x.shape[1] > LARGEST_C),
)
_bwd = define(
    "layer_norm_bwd(Tensor dy, Tensor? ds, Tensor s, Tensor weight, Tensor mean, Tensor rstd, ScalarType dtype,"
    " bool x_bias) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dx_bias)",
    **_ROW, key=lambda dy, ds, s, *_: (s.device, dy.dtype, s.dtype, s.shape[1] > LARGEST_C), fake=_bwd_fake,
)


def example(random, to):
    """The results of a call of its own, by name; random(*shape) gives operands, `to` moves them to device and dtype."""
    x, residual, weight, bias = (to(random(*shape)).requires_grad_() for shape in ((40, 70), (40, 70), (70,), (70,)))
    y, s = layer_norm(x, weight, bias, residual=residual)
    torch.autograd.backward((y, s), (to(random(40, 70)), to(random(40, 70))))
    return {"y": y.detach(), "s": s.detach(), "dx": x.grad, "dweight": weight.grad, "dbias": bias.grad}
