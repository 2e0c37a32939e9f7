"""The fast paths through a GPT-2, which do the work of its modules without calling them, and whether they may.

    whole blocks    gpt2_blocks takes several at once, on a CPU in fp32 without dropout
    sums in norms   a block leaves its sums, of biases too, to the norms, which make them in their own passes

Two more lie in fastlm/generation: the engine of a CPU, and a step's padded head. All ask here first, `why_not` whether
the modules are what they are taken for, `sizes` whether they fit each other: else a hook, or a forward of somebody's
own, would be passed over without a word. Where none serves, the model calls block after block, and `tell` warns once.
"""

import functools
import threading
import warnings
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlm.backends.machine import machine_why_not
from fastlm.dispatch.forcing import forced
from fastlm.ops import BLOCK_WEIGHTS, gpt2_blocks

AT_ONCE = 2**22  # weights of the blocks that one call of gpt2_blocks takes: their gradients exist together
PARTS = "layer_norm", "attention", "bias_gelu"  # the ops that whole blocks stand for
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"  # of a module
# What a fast path stands for, of a class that has it.
CALLS = "__call__", "_call_impl", "forward", "unadded", "unbiased", "hidden"


class _Plain(NamedTuple):
    calls: dict  # CALLS of the class, when it was declared
    parts: dict  # name → class of the module in that place; a dict is a ModuleDict of such, a list a ModuleList of one


_PLAIN = {}  # the classes whose forward, as it is written, the fast paths reproduce


def plain(**parts):
    """A decorator for such a class; parts name the modules that it is made of, and their classes."""
    def declare(kind):
        _PLAIN[kind] = _Plain({name: getattr(kind, name) for name in CALLS if hasattr(kind, name)}, parts)
        return kind

    return declare


for _kind in nn.ModuleDict, nn.ModuleList, nn.Embedding, nn.Linear:
    plain()(_kind)


def plain_kind(module):
    """The class that a module is of, or is made from, among those that the fast paths reproduce; else its own."""
    return next((kind for kind in type(module).__mro__ if kind in _PLAIN), type(module))


def why_not(model, path=""):
    """None where a model, or the part of it at `path`, may be stepped over, else the sentence which may not, and why.

    It may where it and all below it are of exactly the classes that gpt2.py puts there, with the forward that these had
    when they were declared, and without a hook.
    """
    if (odd := _odd_of(model, path)) is None:
        return None
    name, told, _ = odd
    return f"{name or 'the model'} {told}, which a fast path would not call"


def _odd_of(model, path=""):
    if _hooked_all():
        return "torch.nn.modules.module", "has hooks for all modules", False
    module, place = model, plain_kind(model)
    for name in path.split(".") if path else ():
        module, place = getattr(module, name), (place if isinstance(place, dict) else _PLAIN[place].parts)[name]
    return _odd(path, module, place, [kind for kind in _PLAIN if _patched(kind)])


def _odd(name, module, place, patched):
    """(name, what it is, whether by our own doing) of the first of a module, and all below it, that is not plain."""
    kind = nn.ModuleDict if isinstance(place, dict) else nn.ModuleList if isinstance(place, list) else place
    if type(module) is not kind:
        known = type(module) in _PLAIN or type(module).__module__.startswith("torch.nn.")
        return name, f"is {'a ' if known else 'of a class of its own, '}{type(module).__name__}", False
    if kind in patched:
        return name, f"is a {kind.__name__} whose forward was replaced", False
    for call in CALLS:
        if call in module.__dict__:
            return name, f"has a {call} of its own", False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return name, "has hooks", all(_ours(hook) for hooks in HOOKS for hook in getattr(module, hooks).values())
    if isinstance(place, list):
        parts = [(part, place[0]) for part in module._modules]
    else:
        parts = (place if isinstance(place, dict) else _PLAIN[place].parts).items()
    for part, of in parts:
        if (odd := _odd(f"{name}.{part}" if name else part, module._modules.get(part), of, patched)) is not None:
            return odd
    return None


def is_plain(module, kind):
    """Whether a module is of exactly the plain class `kind`, and nobody else has a part in its forward."""
    return not _hooked_all() and _odd("", module, kind, [kind] if _patched(kind) else []) is None


_calling = threading.local()  # `models`: the ids of those that `called` is calling in this thread


def own_call(model):
    """Whether somebody has a part in `model(tokens)` beside the modules: a forward, or hooks, of the model itself.

    Not within such a call: a forward may be made of the model's own `loss`.
    """
    if id(model) in getattr(_calling, "models", ()):
        return False
    kind = plain_kind(model)
    for call in "__call__", "_call_impl", "forward":
        if call in model.__dict__ or getattr(type(model), call) is not _PLAIN[kind].calls[call]:
            return True
    return any(not _ours(hook) for hooks in HOOKS for hook in getattr(model, hooks).values())


def called(model, *given, **options):
    """(logits, loss) that a model of somebody's own says, None for what it does not: model(*given, **options).

    It returns the pair, logits (B, T, V) alone, a loss () alone, or an object with these names; TypeError otherwise.
    """
    before = getattr(_calling, "models", ())
    _calling.models = (*before, id(model))
    try:
        result = model(*given, **options)
    finally:
        _calling.models = before
    if isinstance(result, torch.Tensor):
        logits, loss = (result, None) if result.dim() == 3 else (None, result)
    elif isinstance(result, (tuple, list)):
        logits, loss = (*result, None, None)[:2]
    else:
        logits, loss = getattr(result, "logits", None), getattr(result, "loss", None)
    forms = [value.dim() if isinstance(value, torch.Tensor) else value for value in (logits, loss)]
    if forms in ([3, 0], [3, None], [None, 0]):
        return logits, loss
    raise TypeError(f"{type(model).__name__}'s forward returned {_form(result)}, wanted (logits (B, T, V), loss ())")


def logits_of(model, tokens):
    """The logits (B, T, V) that a model of somebody's own says of tokens (B, T); TypeError where it says none."""
    logits, _ = called(model, tokens)
    if logits is None:
        raise TypeError(f"{type(model).__name__}'s forward gives a loss alone, from which nothing can be generated")
    return logits


def _form(result):
    if isinstance(result, torch.Tensor):
        return f"a tensor {tuple(result.shape)}"
    if isinstance(result, (tuple, list)):
        return f"({', '.join(map(_form, result))})"
    return type(result).__name__


def _hooked_all():
    return any(getattr(nn.modules.module, f"_global{kind}", None) for kind in HOOKS)


def _patched(kind):
    for name, call in _PLAIN[kind].calls.items():
        if getattr(kind, name) is not call:
            return True
    return False


def _ours(hook):
    return (getattr(hook, "__module__", None) or "").startswith(("fastlm.", "benchmarks."))


_told = set()


def tell(model, path="", unfit=lambda model: sizes(model)[1]):
    """Warns, once for every sentence, why the modules of a model that is not plain, or is unfit, are called."""
    if torch.compiler.is_compiling() or ((odd := _odd_of(model, path)) is not None and odd[2]):
        return
    sentence = why_not(model, path) or unfit(model)
    if sentence is not None and sentence not in _told:
        _told.add(sentence)
        warnings.warn(f"fastlm: {sentence}; the model's own modules run, which takes longer", stacklevel=4)


class Sizes(NamedTuple):
    """What blocks are, by their parameters."""

    C: int
    heads: int
    inner: int
    epsilon: float
    dtype: torch.dtype
    weights: list  # of all blocks, in gpt2_blocks' order


def sizes(model):
    """(Sizes, None) of a model's plain blocks, or (None, the sentence which of them does not fit the others)."""
    blocks = list(model.transformer.h)
    if not blocks:
        return None, "transformer.h has no blocks"
    weights = [block.weights() for block in blocks]
    norm, inner = weights[0][0], weights[0][8]
    if norm is None or inner is None or norm.dim() != 1 or inner.dim() != 2:
        return None, "transformer.h.0 lacks weights that blocks have, or has them in other dimensions"
    by_letter = {"C": len(norm), "3C": 3 * len(norm), "F": inner.shape[1]}
    wanted = [tuple(by_letter[letter] for letter in shape.split()) for shape in BLOCK_WEIGHTS.values()]
    heads, epsilon = blocks[0].attn.n_head, blocks[0].ln_1.eps
    dtype, device = norm.dtype, norm.device
    alike = [(shape, dtype, device) for shape in wanted]
    for layer, (block, own) in enumerate(zip(blocks, weights)):
        found = [None if weight is None else (weight.shape, weight.dtype, weight.device) for weight in own]
        if found != alike:
            name, held, shape = next(entry for entry in zip(BLOCK_WEIGHTS, found, wanted) if entry[1] != (
                entry[2], dtype, device))
            told = "missing" if held is None else f"{tuple(held[0])} {held[1]} on {held[2]}"
            return None, f"transformer.h.{layer}.{name} is {told}, wanted {shape} {dtype} on {device}"
        if block.attn.n_head != heads or (block.ln_1.eps, block.ln_2.eps) != (epsilon, epsilon):
            return None, f"transformer.h.{layer} has another number of heads, or epsilon, than transformer.h.0"
        if block.attn.scale is not None:
            return None, f"transformer.h.{layer}.attn.scale is {block.attn.scale}, wanted None: 1/√D"
    if not isinstance(heads, int) or heads < 1 or len(norm) % heads:
        return None, f"transformer.h.0.attn.n_head is {heads}, which does not divide {len(norm)}"
    return Sizes(len(norm), heads, inner.shape[1], epsilon, dtype, weights), None


def hidden(model, x, attends, seeds):
    """The normalised hidden states (B, T, C) behind a model's blocks, of their input x, or None: no fast path serves.

    attends and seeds, one a layer, are those of the blocks' forward.
    """
    blocks, ln_f = model.transformer.h, model.transformer.ln_f
    if why_not(model, "transformer.h") is not None:
        tell(model, "transformer.h")
        return None
    if not any(attends) and whole_why_not(model, x) is None:
        fit, told = sizes(model)
        if told is None and (fit.C, fit.dtype) == (x.shape[-1], x.dtype):
            return ln_f(_whole(fit, x, calls(model, attends)))
        tell(model, "transformer.h")
    if not len(blocks) or why_not(model, "transformer.ln_f") is not None:
        return None
    added = bias = None
    given = x.dtype
    try:
        call = calls(model, attends)
        for block, attend, seed in zip(blocks, attends, seeds, strict=True):
            x, added, bias = call(block.unadded, x, added, bias, attend, seed)
        return ln_f(added, x, bias)[0]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        fit, told = sizes(model)
        if told is None and given in (fit.dtype, model.residual):
            raise
        told = told or f"the blocks are {fit.dtype}, what comes from the embeddings is {given}"
        raise ValueError(f"GPT2: {told}") from error  # torch's words name no module


def whole_why_not(model, x):
    """None where gpt2_blocks does, and faster, what a model's plain blocks would do with x (B, T, C), else a sentence.

    Where a backend is forced for a part of the blocks, the parts run.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or model.dtype != x.dtype or torch.is_autocast_enabled("cpu"):
        return f"whole blocks run on a CPU in float32, without autocast; x is {x.dtype} on {x.device}"
    parts = [part for block in model.transformer.h for part in (block.attn, block.mlp)]
    if any(part.training and (part.residual_dropout or getattr(part, "dropout", 0)) for part in parts):
        return "whole blocks have no dropout"
    if (backend := forced("gpt2_blocks")) is not None:
        return None if backend == "cpu" else f"the backend {backend} is forced: the parts run"
    if (reason := machine_why_not("cpu")) is not None:
        return reason
    return next((f"a backend is forced for {part}: the parts run" for part in PARTS if forced(part)), None)


def calls(model, attends):
    """call(function, *args) as a model calls a block: with `recomputes` nothing of it is kept for a backward.

    But where attends, a cache's, change it, and under torch.func, which takes no checkpoint.
    """
    plain = any(attends) or torch._C._are_functorch_transforms_active()
    if model.recomputes and torch.is_grad_enabled() and not plain:
        return functools.partial(checkpoint, use_reentrant=False)
    return _call


def _call(function, *args):
    return function(*args)


def _whole(fit, x, call):
    many = max(1, AT_ONCE // (12 * fit.C**2)) if call is _call else 1
    run = functools.partial(gpt2_blocks, heads=fit.heads, epsilon=fit.epsilon)
    for first in range(0, len(fit.weights), many):
        weights = [weight for own in fit.weights[first : first + many] for weight in own]
        x = call(run, x, weights)
    return x
