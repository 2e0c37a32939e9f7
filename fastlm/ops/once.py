"""Once: the autograd Function of an op that is differentiable once, for plain autograd and for torch.func.

torch.func takes a Function with a setup_context alone, whose signature torch inspects at every call: up to half of
what a small op takes. So there are more of each, with one forward and one backward:

    Once        with a setup_context: what torch.compile traces, which takes no jvp
    functional  the same with a jvp that says that there is none, and with vmap: where grad, vjp or vmap are on
    bare        without a setup_context: everywhere else
"""

import torch
from torch._C._functorch import unwrap_if_dead


class Bare(torch.autograd.Function):
    """`op` is its name; its backward begins with `refuse_double_backward`."""

    op = None

    @classmethod
    def jvp(cls, ctx, *_):
        raise RuntimeError(_forward_mode(cls.op))


class Once(torch.autograd.Function):
    """`op` is its name, and its backward calls `gradient`; it is called by `run`. `bare` and `functional` are made of
    it, but for a bare one that can spare something and is given. `returned`: how many of forward's results, if not
    all, a call wants; autograd is then spared the others, which are for the backward.
    """

    op = bare = functional = returned = None

    def __init_subclass__(cls):
        if cls.functional is None:
            cls.bare = cls.bare or _bare(cls)
            cls.applied = super(torch.autograd.Function, cls.bare).apply  # without its questions: `run` has asked them
            cls.functional = type(cls)(cls.__name__, (cls,), {
                "functional": True, "jvp": classmethod(Bare.jvp.__func__),
                "generate_vmap_rule": True})  # of ops of ours alone, which dispatch.samples batches

    @classmethod
    def run(cls, *args):
        if torch.compiler.is_compiling():
            return cls.apply(*args)
        if torch._C._are_functorch_transforms_active():
            return cls.functional.apply(*args)
        return cls.applied(*_alive(args))


def _bare(once):
    def forward(ctx, *args):
        output = once.forward(*args)
        once.setup_context(ctx, args, output)
        return output if once.returned is None else output[: once.returned]

    def backward(ctx, *gradients):
        refuse_double_backward(once.op)
        return once.backward(ctx, *gradients)

    parts = {"op": once.op, "forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(once)(once.__name__, (Bare,), parts)


def transformed():
    """Whether a transform of torch.func is on, or torch.compile traces."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def gradient(op, run, *operands):
    """run(*operands), the gradients of an op; operands are tensors, and what else needs no gradient.

    torch.func asks for a graph of them always, in case that they are differentiated in turn: then this one refuses.
    """
    if torch.compiler.is_compiling():
        return run(*operands)
    operands = _alive(operands)
    if torch.is_grad_enabled():
        told = f"{op} is differentiable once: the gradient of its gradient was asked for"
        return _Refusing.apply(told, run, *operands)
    return run(*operands)


def _alive(args):
    """args as their numbers lie in memory: tensors that a transform which is over has wrapped unwrapped, as
    Function.apply does, and what is negative by a mark alone negated."""
    return [unwrap_if_dead(x).resolve_neg() if isinstance(x, torch.Tensor) else x for x in args]


def without_gradient(told, run, *operands):
    """run(*operands), which says `told` where its gradient is asked for: torch would make it zero."""
    if torch.compiler.is_compiling():
        return run(*operands)
    if not torch.is_grad_enabled():
        return run(*_alive(operands))
    if torch._C._are_functorch_transforms_active() or any(
            isinstance(x, torch.Tensor) and x.requires_grad for x in operands):
        return _Refusing.apply(told, run, *operands)
    return run(*operands)


class _Refusing(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(told, run, *operands):
        return run(*operands)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.told = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.told)

    jvp = backward


def _forward_mode(op):
    return f"{op} has no forward-mode derivative (jvp, jacfwd, hessian); grad, vjp and jacrev have its gradient"


def refuse_double_backward(op):
    """Raises where a gradient of the gradient is asked for: the kernels would leave it out without a word."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{op} is differentiable once: its backward was called with create_graph=True")
