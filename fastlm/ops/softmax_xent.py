"""softmax_xent: the cross-entropy of a softmax over the vocabulary, with its gradient, in one pass over the logits.

The loss of training, which never has all logits, is linear_xent's, and forced by that name.
"""

import torch

from fastlm.dispatch import define
from fastlm.dispatch.table import homes
from fastlm.ops.checks import beneath, check, check_dtype, inner_contiguous
from fastlm.ops.once import Bare, Once, gradient, refuse_double_backward, transformed

__all__ = ["softmax_xent"]
KERNELS = homes("softmax_xent", "cuda", "triton", "cpu", "torch", "reference")
ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("cuda", "triton", "torch", "reference")}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def softmax_xent(x, y, *, ignore=-100, reduction="mean", overwrite=False):
    """The cross-entropy loss of logits against labels, as torch.nn.functional.cross_entropy defines it.

    x (N, V) logits in fp32, bf16 or fp16 (fp64 on `torch` and `reference`), rows any distance apart; y (N,) int64
    labels in [0, V), or `ignore`. Returns a scalar for reduction "mean" (over the rows that are not ignored; NaN
    where all are) and "sum", (N,) for "none": fp32 in nats (fp64 for fp64). Statistics are fp32; an ignored row has
    loss 0 and gradient 0. Raises ValueError or TypeError before anything is computed; labels that lie on a GPU are
    not read back: a wrong one gives a NaN loss. Differentiable once, in x.

    overwrite: where x needs a gradient, it is written over x at once, one read and one write in all; only for "mean"
    and "sum", and for logits that nobody else looks at: x is no longer the logits.
    """
    check("softmax_xent", x=(x, "N V"), y=(y, "N"))
    check_dtype("softmax_xent", (*KERNEL_DTYPES, torch.float64), x=x)
    check_dtype("softmax_xent", (torch.int64,), y=y)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"softmax_xent: reduction is {reduction!r}, wanted 'mean', 'sum' or 'none'")
    if overwrite and reduction == "none":
        raise ValueError("softmax_xent: overwrite=True needs reduction 'mean' or 'sum', got 'none'")
    count = check_labels("softmax_xent", y, x.shape[1], ignore)
    if overwrite and x.requires_grad and torch.is_grad_enabled() and not transformed():
        if x.is_leaf:
            raise ValueError("softmax_xent: overwrite=True, but x is a leaf, whose values would be lost")
        if inner_contiguous(x) is not x:
            raise ValueError(f"softmax_xent: overwrite=True needs stride 1 along V, got strides {x.stride()}")
        return _Overwriting.apply(x, y.contiguous(), ignore, reduction == "mean", count)
    loss = _SoftmaxXent.run(x, y, ignore)[0]
    if reduction == "none":
        return loss
    if reduction == "mean" and count is not None:
        return loss.mean()
    total = loss.sum()
    return total if reduction == "sum" else total / (y != ignore).sum()


def check_labels(op, y, vocab, ignore):
    """Raises ValueError for a label outside [0, vocab) that is not `ignore`, where labels lie on the host.

    Returns how many rows count, those that are not ignored, where that is seen at once: all of them; else None.
    """
    if y.device.type != "cpu" or torch.compiler.is_compiling() or not y.numel():
        return None
    rows, y = y.shape[0], beneath(y)
    low, high = torch.aminmax(y)  # one reading of y, where nothing is wrong
    if int(low) >= 0 and int(high) < vocab:
        return None if 0 <= ignore < vocab else rows
    wrong = ((y < 0) | (y >= vocab)) & (y != ignore)
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: label {int(y[tuple(at)])} at {at}, wanted 0 ≤ label < {vocab} or ignore={ignore}; "
            "were the labels made with another vocabulary?"
        )
    return None


class _SoftmaxXent(Once):
    op, returned = "softmax_xent", 1

    @staticmethod
    def forward(x, y, ignore):
        return _fwd(inner_contiguous(x), y.contiguous(), ignore)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.ignore = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, y, output[1])

    @staticmethod
    def backward(ctx, dloss, *_):
        return gradient("softmax_xent", _gradient, dloss, *ctx.saved_tensors, ctx.ignore), None, None


def _gradient(dloss, x, y, *rest):
    return _bwd(dloss.contiguous(), inner_contiguous(x), y.contiguous(), *rest)


class _Overwriting(Bare):
    """The summed or mean loss; x holds its gradient from then on."""

    op = "softmax_xent"

    @staticmethod
    def forward(ctx, x, y, ignore, mean, count):
        count = (y != ignore).sum() if count is None else torch.tensor(count, device=x.device)
        share = (1 / count if mean else torch.ones((), device=x.device)).to(torch.promote_types(x.dtype, torch.float32))
        late = mean and x.dtype == torch.float16  # N times smaller, most would be below fp16's smallest numbers
        dloss = torch.ones_like(share) if late else share
        loss, _ = _both(x.detach(), dloss.expand(len(y)).contiguous(), y, ignore)
        torch.autograd.graph.increment_version(x)  # whoever kept the logits for a backward of his own is told
        ctx.save_for_backward(x, torch.where(count > 0, share, 0.0) if late else None)
        return loss.sum() / count if mean else loss.sum()

    @staticmethod
    def backward(ctx, dloss):
        refuse_double_backward("softmax_xent")
        x, factor = ctx.saved_tensors
        dx, dloss = x.detach(), dloss if factor is None else dloss * factor
        if not (dloss.device.type == "cpu" and float(dloss) == 1.0):
            dx.mul_(dloss)
            torch.autograd.graph.increment_version(x)
        return dx, None, None, None, None


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
_both = define(
    "softmax_xent_(Tensor(a!) x, Tensor dloss, Tensor y, int ignore) -> (Tensor loss, Tensor lse)",
    **_ROW, key=_key, limits=_limits, fake=lambda x, dloss, y, ignore: _fwd_fake(x, y, ignore),
)


def example(random, to):
    """The results of a call of its own, by name; random(*shape) gives operands, `to` moves them to device and dtype."""
    x, y = to(random(24, 1031)).requires_grad_(), torch.arange(24) * 43 % 1031
    y[3] = -100
    loss = softmax_xent(x, y.to(x.device), reduction="none")
    loss.sum().backward()
    return {"loss": loss.detach(), "dx": x.grad}
