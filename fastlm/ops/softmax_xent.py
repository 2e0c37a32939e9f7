"""softmax_xent: the cross-entropy of a softmax over the vocabulary, with its gradient, in one pass over the logits."""

import torch

from fastlm.checks import check, check_dtype, inner_contiguous, refuse_double_backward
from fastlm.dispatch import define

KERNELS = {
    "cuda": "fastlm.native:cuda",
    "triton": "fastlm.kernels.softmax_xent",
    "cpu": "fastlm.native:cpu",
    "torch": "fastlm.vendor",
    "reference": "fastlm.reference",
}
ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("torch", "triton", "cuda", "reference")}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def softmax_xent(x, y, *, ignore=-100, reduction="mean"):
    """The cross-entropy loss of logits against labels, as torch.nn.functional.cross_entropy defines it.

    x (N, V) logits in fp32, bf16 or fp16 (fp64 on `torch` and `reference`), rows any distance apart; y (N,) int64
    labels in [0, V), or `ignore`. Returns a scalar for reduction "mean" (over the rows that are not ignored; NaN
    where all are) and "sum", (N,) for "none": fp32 in nats (fp64 for fp64). Statistics are fp32; an ignored row has
    loss 0 and gradient 0. Raises ValueError or TypeError before anything is computed; labels that lie on a GPU are
    not read back: a wrong one gives a NaN loss. Differentiable once, in x.
    """
    check("softmax_xent", x=(x, "N V"), y=(y, "N"))
    check_dtype("softmax_xent", (*KERNEL_DTYPES, torch.float64), x=x)
    check_dtype("softmax_xent", (torch.int64,), y=y)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"softmax_xent: reduction is {reduction!r}, wanted 'mean', 'sum' or 'none'")
    if y.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_labels(y, x.shape[1], ignore)
    loss, _ = _SoftmaxXent.apply(x, y, ignore)
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / (y != ignore).sum()


def _check_labels(y, vocab, ignore):
    wrong = ((y < 0) | (y >= vocab)) & (y != ignore)
    if wrong.any():
        n = int(wrong.nonzero()[0])
        raise ValueError(
            f"softmax_xent: label {int(y[n])} at [{n}], wanted 0 ≤ label < {vocab} or ignore={ignore}; "
            "were the labels made with another vocabulary?"
        )


class _SoftmaxXent(torch.autograd.Function):
    @staticmethod
    def forward(x, y, ignore):
        return _fwd(inner_contiguous(x), y.contiguous(), ignore)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.ignore = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, y, output[1])

    @staticmethod
    def backward(ctx, dloss, _):
        refuse_double_backward("softmax_xent")
        x, y, lse = ctx.saved_tensors
        return _bwd(dloss.contiguous(), inner_contiguous(x), y.contiguous(), lse, ctx.ignore), None, None


def _key(x, *_):
    return x.device, x.dtype


def _bwd_key(dloss, x, *_):
    return x.device, x.dtype


def _limits(backend, x, *_):
    if backend in ("cuda", "triton", "cpu") and x.dtype not in KERNEL_DTYPES:
        return f"the {backend} kernel takes float32, bfloat16 or float16, got {x.dtype}"
    return None


def _bwd_limits(backend, dloss, x, *_):
    return _limits(backend, x)


def _fwd_fake(x, y, ignore):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[:1], dtype=dtype), x.new_empty(x.shape[:1], dtype=dtype)


def _bwd_fake(dloss, x, y, lse, ignore):
    return x.new_empty(x.shape)


_ROW = {"family": "softmax_xent", "kernels": KERNELS, "order": ORDER}
_fwd = define(
    "softmax_xent_fwd(Tensor x, Tensor y, int ignore) -> (Tensor loss, Tensor lse)",
    **_ROW, key=_key, limits=_limits, fake=_fwd_fake,
)
_bwd = define(
    "softmax_xent_bwd(Tensor dloss, Tensor x, Tensor y, Tensor lse, int ignore) -> Tensor dx",
    **_ROW, key=_bwd_key, limits=_bwd_limits, fake=_bwd_fake,
)
