"""grad_norm: the Euclidean norm of a flat buffer of gradients, the same bits for any number of threads."""

import torch

from fastlm.dispatch import define
from fastlm.dispatch.table import homes
from fastlm.ops.checks import check, check_dtype

__all__ = ["grad_norm"]
KERNELS = homes("grad_norm", "triton", "cpu", "torch", "reference")
ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("triton", "torch", "reference")}


def grad_norm(g):
    """√Σ g² of g (n,) fp32 (fp64 on `torch` and `reference`), contiguous, as a scalar tensor on g's device.

    NaN or infinite where a gradient is. Raises ValueError or TypeError for what it does not take.
    """
    check("grad_norm", g=(g, "n"))
    check_dtype("grad_norm", (torch.float32, torch.float64), g=g)
    return _norm(g.detach().contiguous())


def _limits(backend, g):
    if backend in ("triton", "cpu") and g.dtype != torch.float32:
        return f"the {backend} kernel takes float32, got {g.dtype}"
    return None


_norm = define(
    "grad_norm(Tensor g) -> Tensor norm",
    family="grad_norm", kernels=KERNELS, order=ORDER, key=lambda g: (g.device, g.dtype), limits=_limits,
    fake=lambda g: g.new_empty(()),
)


def example(random, to):
    """The results of a call of its own, by name; random(*shape) gives operands, `to` moves them to device and dtype."""
    g = to(random(1000))
    return {"norm": grad_norm(g.to(torch.promote_types(g.dtype, torch.float32)))[None]}
