"""bias_gelu: a bias and GELU in one pass, as GPT-2's MLP has them between its two products."""

import torch
import torch.nn.functional as F

from fastlm.dispatch import define, left_to_inductor
from fastlm.dispatch.table import homes
from fastlm.ops.checks import check, check_dtype, inner_contiguous
from fastlm.ops.once import Once, gradient

__all__ = ["bias_gelu"]
KERNELS = homes("bias_gelu", "triton", "cpu", "torch", "reference")
ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("triton", "torch", "reference")}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bias_gelu(x, bias):
    """gelu(x + bias) in the tanh form of GPT-2: u/2 (1 + tanh(√(2/π) (u + 0.044715 u³))).

    x (N, C) in fp32, bf16 or fp16 (fp64 on `torch` and `reference`), rows any distance apart; bias (C,) in x's dtype
    or fp32. Returns (N, C) in x's dtype. Raises ValueError or TypeError before anything is computed. Differentiable
    once, in both; the bias's gradient adds up in fp32.
    """
    check("bias_gelu", x=(x, "N C"), bias=(bias, "C"))
    check_dtype("bias_gelu", (*KERNEL_DTYPES, torch.float64), x=x)
    check_dtype("bias_gelu", (x.dtype, torch.float32), bias=bias)
    return _composition(x, bias) if left_to_inductor("bias_gelu", x) else _BiasGelu.run(x, bias)


def _composition(x, bias):
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.gelu(x.to(wide) + bias.to(wide), approximate="tanh").to(x.dtype)


class _BiasGelu(Once):
    op = "bias_gelu"

    @staticmethod
    def forward(x, bias):
        return _fwd(inner_contiguous(x), bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        return gradient("bias_gelu", _gradients, dy, *ctx.saved_tensors)


def _gradients(dy, x, bias):
    return _bwd(inner_contiguous(dy), inner_contiguous(x), bias)


def _limits(backend, x, *_):
    if backend in ("triton", "cpu") and x.dtype not in KERNEL_DTYPES:
        return f"the {backend} kernel takes float32, bfloat16 or float16, got {x.dtype}"
    return None


_ROW = {"family": "bias_gelu", "kernels": KERNELS, "order": ORDER, "key": lambda x, *_: (x.device, x.dtype),
        "limits": _limits}
_fwd = define("bias_gelu_fwd(Tensor x, Tensor bias) -> Tensor y", **_ROW, fake=lambda x, bias: x.new_empty(x.shape))
_bwd = define(
    "bias_gelu_bwd(Tensor dy, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)",
    **_ROW, fake=lambda dy, x, bias: (x.new_empty(x.shape), bias.new_empty(bias.shape)),
)


def example(random, to):
    """The results of a call of its own, by name; random(*shape) gives operands, `to` moves them to device and dtype."""
    x, bias, dy = to(random(40, 70)).requires_grad_(), to(random(70)).requires_grad_(), to(random(40, 70))
    y = bias_gelu(x, bias)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "dbias": bias.grad}
