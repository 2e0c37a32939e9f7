"""adamw_: a step of AdamW over flat buffers, in place and in one sweep."""

import torch

from fastlm.dispatch import define
from fastlm.dispatch.table import homes
from fastlm.ops.checks import check, check_dtype

__all__ = ["adamw_"]
KERNELS = homes("adamw", "triton", "cpu", "torch", "reference")
ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("triton", "torch", "reference")}


def adamw_(p, g, exp_avg, exp_avg_sq, *, step=None, learning_rate=None, beta1=0.9, beta2=0.999, epsilon=1e-8,
           weight_decay=0.01, scale=None, rates=None):
    """A step of AdamW (Loshchilov and Hutter 2019) on values p, as torch.optim.AdamW takes it.

    p, g, exp_avg and exp_avg_sq (n,) fp32 (or all fp64 on `torch` and `reference`), contiguous; p and the moments
    change in place. step, from 1 on, is this step's number, for the correction of the moments' bias; scale () of p's
    dtype multiplies the gradients first, as clipping does, and where it is not finite nothing changes. rates (3,) of
    p's dtype says on the device what step and learning_rate say on the host, for a step that is captured:
    learning_rate, 1 - beta1^step, 1 - beta2^step. Raises ValueError or TypeError before anything is changed.
    """
    extra = {name: (given, letters) for name, given, letters in (("scale", scale, ""), ("rates", rates, "3"))
             if given is not None}
    check("adamw_", p=(p, "n"), g=(g, "n"), exp_avg=(exp_avg, "n"), exp_avg_sq=(exp_avg_sq, "n"), **extra)
    check_dtype("adamw_", (torch.float32, torch.float64), p=p, g=g, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq,
                **{name: given for name, (given, _) in extra.items()})
    for name, tensor in (("p", p), ("g", g), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if not tensor.is_contiguous():
            raise ValueError(f"adamw_: {name} has strides {tensor.stride()}, wanted (1,)")
    numbers = step is not None or learning_rate is not None
    if numbers == (rates is not None) or numbers and None in (step, learning_rate):
        raise ValueError(f"adamw_: step is {step}, learning_rate {learning_rate} and rates {rates}, wanted the first "
                         "two, or rates")
    if numbers and step < 1:
        raise ValueError(f"adamw_: step is {step}, wanted 1 or more")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"adamw_: {name} is {beta}, wanted 0 ≤ {name} < 1")
    with torch.no_grad():
        _step(p, g, exp_avg, exp_avg_sq, scale, rates, step or 0, learning_rate or 0.0, beta1, beta2, epsilon,
              weight_decay)


def _key(p, g, exp_avg, exp_avg_sq, scale, rates, *_):
    return p.device, p.dtype, rates is None


def _limits(backend, p, g, exp_avg, exp_avg_sq, scale, rates, *_):
    if backend in ("triton", "cpu") and p.dtype != torch.float32:
        return f"the {backend} kernel takes float32, got {p.dtype}"
    if backend == "torch" and rates is not None:
        return "torch's fused AdamW takes the step's number, not rates"
    return None


_step = define(
    "adamw_(Tensor(a!) p, Tensor g, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor? scale, Tensor? rates, "
    "int step, float learning_rate, float beta1, float beta2, float epsilon, float weight_decay) -> ()",
    family="adamw", kernels=KERNELS, order=ORDER, key=_key, limits=_limits,
    fake=lambda *_: None,
)


def example(random, to):
    """The results of a call of its own, by name; random(*shape) gives operands, `to` moves them to device and dtype."""
    wide = torch.promote_types(to(random(1)).dtype, torch.float32)
    p, g, m = (to(random(1000)).to(wide) for _ in range(3))
    v = m.square()
    adamw_(p, g, m, v, step=3, learning_rate=1e-2)
    return {"p": p, "exp_avg": m, "exp_avg_sq": v}
