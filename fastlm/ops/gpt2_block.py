"""gpt2_block: a whole transformer block of GPT-2 in one call forward and one backward, as training on a CPU wants it."""

import torch

from fastlm.checks import check, check_dtype, refuse_double_backward
from fastlm.dispatch import define

KERNELS = {"cpu": "fastlm.native:cpu", "torch": "fastlm.composed:torch_", "reference": "fastlm.composed:reference_"}
ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("torch", "reference")}
SHAPES = ("C", "C", "C C3", "C3", "C C", "C", "C", "C", "C F", "F", "F C", "C")
NAMES = ("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
         "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
         "mlp.c_proj.bias")  # transformers' names for the weights, in their order


def gpt2_block(x, weights, *, heads, epsilon=1e-5):
    """s + MLP(norm(s)) with s = x + attention(norm(x)), causal, without dropout: a block of GPT-2.

    x (B, T, C) in fp32 (fp64 too on `torch` and `reference`); weights: twelve tensors in x's dtype, in the order and
    with the shapes of transformers' GPT2Block, see NAMES. Returns (B, T, C). Raises ValueError or TypeError before
    anything is computed. Differentiable once, in all tensors.
    """
    weights = list(weights)
    if len(weights) != len(NAMES):
        raise ValueError(f"gpt2_block: got {len(weights)} weights, wanted {len(NAMES)}: {', '.join(NAMES)}")
    named = {name: (weight, shape) for name, weight, shape in zip(NAMES, weights, SHAPES)}
    sizes = check("gpt2_block", x=(x, "B T C"), **named)
    check_dtype("gpt2_block", (torch.float32, torch.float64), x=x, **dict(zip(NAMES, weights)))
    if sizes["C3"] != 3 * sizes["C"]:
        raise ValueError(f"gpt2_block: attn.c_attn.weight has {sizes['C3']} outputs, wanted 3 · C = {3 * sizes['C']}")
    if heads < 1 or sizes["C"] % heads:
        raise ValueError(f"gpt2_block: heads is {heads}, which does not divide C={sizes['C']}")
    return _Gpt2Block.apply(x, heads, epsilon, *weights)[0]


class _Gpt2Block(torch.autograd.Function):
    @staticmethod
    def forward(x, heads, epsilon, *weights):
        return _fwd(x.contiguous(), [weight.contiguous() for weight in weights], heads, epsilon)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.heads, _, *weights = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *output[1:], *weights)

    @staticmethod
    def backward(ctx, dy, *_):
        refuse_double_backward("gpt2_block")
        if dy is None:
            return (None,) * 15
        x, *saved = ctx.saved_tensors
        saved, weights = saved[:9], [weight.contiguous() for weight in saved[9:]]
        dx, flat = _bwd(dy.contiguous(), x.contiguous(), saved, weights, ctx.heads)
        pieces = flat.split([weight.numel() for weight in weights])
        return dx, None, None, *(piece.view(weight.shape) for piece, weight in zip(pieces, weights))


def _limits(backend, x, *_):
    if backend == "cpu" and x.dtype != torch.float32:
        return f"the {backend} kernel takes float32, got {x.dtype}"
    return None


def _fwd_fake(x, weights, heads, epsilon):
    (B, T, C), F = x.shape, weights[8].shape[1]
    rows = {"h1": C, "qkv": 3 * C, "o": C, "lse": None, "s": C, "h2": C, "u": F, "g": F}
    kept = (x.new_empty(B, heads, T) if width is None else x.new_empty(B * T, width) for width in rows.values())
    return (x.new_empty(x.shape), *kept, x.new_empty(4, B * T))


def _bwd_fake(dy, x, saved, weights, heads):
    return x.new_empty(x.shape), x.new_empty(sum(weight.numel() for weight in weights))


_ROW = {"family": "gpt2_block", "kernels": KERNELS, "order": ORDER, "key": lambda x, *_: (x.device, x.dtype),
        "limits": _limits}
_fwd = define(
    "gpt2_block_fwd(Tensor x, Tensor[] weights, int heads, float epsilon) -> (Tensor y, Tensor h1, Tensor qkv,"
    " Tensor o, Tensor lse, Tensor s, Tensor h2, Tensor u, Tensor g, Tensor statistics)",
    **_ROW, fake=_fwd_fake,
)
_bwd = define(
    "gpt2_block_bwd(Tensor dy, Tensor x, Tensor[] saved, Tensor[] weights, int heads)"
    " -> (Tensor dx, Tensor gradients)",
    **_ROW, fake=_bwd_fake,
)
