"""gpt2_blocks: transformer blocks of GPT-2 in one call forward and one backward, as training on a CPU wants them."""

import torch

from fastlm.dispatch import define
from fastlm.ops.checks import check, check_dtype
from fastlm.ops.once import Bare, Once, gradient, refuse_double_backward

__all__ = ["BLOCK_WEIGHTS", "gpt2_blocks"]
KERNELS = {
    "cpu": "fastlm.backends.native:cpu",
    "torch": "fastlm.backends.composed:torch_",
    "reference": "fastlm.backends.composed:reference_",
}
ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("torch", "reference")}
BLOCK_WEIGHTS = {  # of a block, in their order: transformers' names, and their shapes
    "ln_1.weight": "C", "ln_1.bias": "C", "attn.c_attn.weight": "C 3C", "attn.c_attn.bias": "3C",
    "attn.c_proj.weight": "C C", "attn.c_proj.bias": "C", "ln_2.weight": "C", "ln_2.bias": "C",
    "mlp.c_fc.weight": "C F", "mlp.c_fc.bias": "F", "mlp.c_proj.weight": "F C", "mlp.c_proj.bias": "C",
}


def gpt2_blocks(x, weights, *, heads, epsilon=1e-5):
    """Blocks of GPT-2 one after the other: x = s + MLP(norm(s)) with s = x + attention(norm(x)), causal, no dropout.

    x (B, T, C) in fp32 (fp64 too on `torch` and `reference`); weights: twelve tensors a block in x's dtype, in the
    order and with the shapes of BLOCK_WEIGHTS, which are those of transformers' GPT2Block; F, the width of the MLP, is
    the same for all. Returns (B, T, C). Raises ValueError or TypeError before anything is computed. Differentiable
    once, in all tensors.
    """
    weights, names = list(weights), list(BLOCK_WEIGHTS)
    if not weights or len(weights) % len(names):
        raise ValueError(f"gpt2_blocks: got {len(weights)} weights, wanted {len(names)} a block: {', '.join(names)}")
    first = weights[: len(names)]
    shapes = [tensor.shape for tensor in first]
    for block in range(len(weights) // len(names)):
        own = weights[block * len(names) : (block + 1) * len(names)]
        if block == 0 or [tensor.shape for tensor in own] != shapes:
            _check_block(x, block, own, first)
    check_dtype("gpt2_blocks", (torch.float32, torch.float64), x=x)
    for name, tensor in zip(names * (len(weights) // len(names)), weights):
        if tensor.dtype != x.dtype:
            raise TypeError(f"gpt2_blocks: {name} is {tensor.dtype}, but x is {x.dtype}")
    if heads < 1 or x.shape[-1] % heads:
        raise ValueError(f"gpt2_blocks: heads is {heads}, which does not divide C={x.shape[-1]}")
    return _Gpt2Blocks.run(x, heads, epsilon, *weights)[0]


def _check_block(x, block, weights, first):
    """Raises ValueError where a block's weights do not fit x, or the first block's."""
    sizes = check("gpt2_blocks", x=(x, "B T C"), **{
        f"block {block} {name}": (tensor, shape) for tensor, (name, shape) in zip(weights, BLOCK_WEIGHTS.items())})
    if sizes["3C"] != 3 * sizes["C"]:
        raise ValueError(f"gpt2_blocks: attn.c_attn.weight has {sizes['3C']} outputs, wanted 3C={3 * sizes['C']}")
    if sizes["F"] != first[8].shape[1]:
        raise ValueError(f"gpt2_blocks: block {block} has F={sizes['F']}, but block 0 has F={first[8].shape[1]}")


class _Bare(Bare):
    op = "gpt2_blocks"

    @staticmethod
    def forward(ctx, x, heads, epsilon, *weights):
        x, weights = x.contiguous(), [weight.contiguous() for weight in weights]
        y, *saved = _fwd(x, weights, heads, epsilon)
        ctx.heads = heads
        ctx.save_for_backward(x, *saved, *weights)
        return (y,)

    @staticmethod
    def backward(ctx, dy):
        refuse_double_backward("gpt2_blocks")
        dx, *others = _gradients(ctx.heads, dy, *ctx.saved_tensors)
        return dx, None, None, *others


class _Gpt2Blocks(Once):
    op, bare = "gpt2_blocks", _Bare

    @staticmethod
    def forward(x, heads, epsilon, *weights):
        return _fwd(x.contiguous(), [weight.contiguous() for weight in weights], heads, epsilon)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.heads, _, *weights = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, *output[1:], *weights)

    @staticmethod
    def backward(ctx, dy, *_):
        dx, *others = gradient("gpt2_blocks", _gradients, ctx.heads, dy, *ctx.saved_tensors)
        return dx, None, None, *others


def _gradients(heads, dy, x, *rest):
    saved, weights = rest[:10], [weight.contiguous() for weight in rest[10:]]
    dx, flat = _bwd(dy.contiguous(), x.contiguous(), saved, weights, heads)
    pieces = flat.split([weight.numel() for weight in weights])
    return dx, *(piece.view(weight.shape) for piece, weight in zip(pieces, weights))


def _limits(backend, x, *_):
    if backend == "cpu" and x.dtype != torch.float32:
        return f"the {backend} kernel takes float32, got {x.dtype}"
    return None


def _fwd_fake(x, weights, heads, epsilon):
    (B, T, C), L, F = x.shape, len(weights) // len(BLOCK_WEIGHTS), weights[8].shape[1]
    rows = [x.new_empty(L, B * T, width) for width in (C, 3 * C, C, C, C, F, F)]
    return (x.new_empty(x.shape), x.new_empty(L - 1, B * T, C), *rows[:3], x.new_empty(L, B, heads, T), *rows[3:],
            x.new_empty(L, 4, B * T))


def _bwd_fake(dy, x, saved, weights, heads):
    return x.new_empty(x.shape), x.new_empty(sum(weight.numel() for weight in weights))


_ROW = {"family": "gpt2_blocks", "kernels": KERNELS, "order": ORDER, "key": lambda x, *_: (x.device, x.dtype),
        "limits": _limits}
_fwd = define(
    "gpt2_blocks_fwd(Tensor x, Tensor[] weights, int heads, float epsilon) -> (Tensor y, Tensor between, Tensor h1,"
    " Tensor qkv, Tensor o, Tensor lse, Tensor s, Tensor h2, Tensor slope, Tensor g, Tensor statistics)",
    **_ROW, fake=_fwd_fake,
)
_bwd = define(
    "gpt2_blocks_bwd(Tensor dy, Tensor x, Tensor[] saved, Tensor[] weights, int heads)"
    " -> (Tensor dx, Tensor gradients)",
    **_ROW, fake=_bwd_fake,
)


def example(random, to):
    """The results of a call of its own, by name; random(*shape) gives operands, `to` moves them to device and dtype."""
    wide = torch.promote_types(to(random(1)).dtype, torch.float32)
    C, sizes = 24, {"C": 24, "3C": 72, "F": 40}
    x = to(random(2, 19, C)).to(wide).requires_grad_()
    weights = [to(random(*(sizes[size] for size in shape.split()))).to(wide).div(C**0.5).requires_grad_()
               for _ in range(2) for shape in BLOCK_WEIGHTS.values()]
    y = gpt2_blocks(x, weights, heads=3)
    y.backward(to(random(2, 19, C)).to(wide))
    return {"y": y.detach(), "dx": x.grad, "dqkv": weights[2].grad, "ddown": weights[10].grad}
