"""The fast paths through a GPT-2, which do the work of its modules without calling them, and whether they may.

    whole blocks    gpt2_blocks takes several at once, on a CPU in fp32 without dropout
    sums in norms   a block leaves its last sum to the next norm, which makes it in its own pass

Two more lie in fastlm/generation: the engine of a CPU, and a step's padded head. All ask `why_not` first: a hook, or a
forward of somebody's own, would be passed over without a word. Where none serves, the model calls block after block.
"""

import torch
from torch import nn

from fastlm.backends.machine import machine_why_not
from fastlm.dispatch.forcing import forced
from fastlm.ops import gpt2_blocks

AT_ONCE = 2**22  # weights of the blocks that one call of gpt2_blocks takes: their gradients exist together
PARTS = "layer_norm", "attention", "bias_gelu"  # the ops that whole blocks stand for
_PLAIN = {nn.ModuleDict, nn.ModuleList, nn.Embedding, nn.Linear}  # the classes whose forward the fast paths know


def plain(kind):
    """The class `kind` itself: a decorator for those whose forward, as it is written, the fast paths reproduce."""
    _PLAIN.add(kind)
    return kind


def why_not(model, modules=None):
    """None where `modules` of a model, all unless given, may be stepped over, else the sentence which may not, and why.

    It may where it and all below it are of exactly the classes of gpt2.py and torch that are plain, without a hook.
    """
    for module in (model,) if modules is None else modules:
        if (odd := _odd(module)) is not None:
            name = next((name for name, other in model.named_modules() if other is odd), "") or "the model"
            told = "has hooks" if type(odd) in _PLAIN else f"is of a class of its own, {type(odd).__name__}"
            return f"{name} {told}, which a fast path would not call"
    return None


def _odd(module):
    """The first module, of one and all below it, that is not plain, or None."""
    if type(module) not in _PLAIN or (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                                      or module._backward_pre_hooks):
        return module
    for part in module._modules.values():
        if (odd := _odd(part)) is not None:
            return odd
    return None


def hidden(model, x, cache, seeds):
    """The normalised hidden states (B, T, C) behind a model's blocks, of their input x, or None: no fast path serves.

    cache and seeds, one a layer, are those of the blocks' forward.
    """
    blocks, ln_f = model.transformer.h, model.transformer.ln_f
    if why_not(model, blocks) is not None:
        return None
    if cache is None and whole_why_not(model, x) is None:
        return ln_f(_whole(model.config, blocks, x))
    if not len(blocks) or why_not(model, [ln_f]) is not None:
        return None
    added = None
    for block, seed in zip(blocks, seeds):
        x, added = block.unadded(x, added, cache, seed)
    return ln_f(added, x)[0]


def whole_why_not(model, x):
    """None where gpt2_blocks does, and faster, what a model's plain blocks would do with x (B, T, C), else a sentence.

    Where a backend is forced for a part of the blocks, the parts run.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or model.dtype != x.dtype or torch.is_autocast_enabled("cpu"):
        return f"whole blocks run on a CPU in float32, without autocast; x is {x.dtype} on {x.device}"
    if model.training and (model.config.attn_pdrop or model.config.resid_pdrop):
        return "whole blocks have no dropout"
    if (backend := forced("gpt2_blocks")) is not None:
        return None if backend == "cpu" else f"the backend {backend} is forced: the parts run"
    if (reason := machine_why_not("cpu")) is not None:
        return reason
    return next((f"a backend is forced for {part}: the parts run" for part in PARTS if forced(part)), None)


def _whole(config, blocks, x):
    many = max(1, AT_ONCE // (12 * config.n_embd**2))
    for first in range(0, len(blocks), many):
        weights = [weight for block in blocks[first : first + many] for weight in block.weights()]
        x = gpt2_blocks(x, weights, heads=config.n_head, epsilon=config.layer_norm_epsilon)
    return x
