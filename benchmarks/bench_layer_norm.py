"""layer_norm with the addition of a residual, forward and backward, beside PyTorch's addition and norm.

Least traffic: forward reads x and the residual and writes s and y, backward reads dy, ds and s and writes the gradient
of x and the residual, which is one: 8 · N · C elements.
"""

import torch
import torch.nn.functional as F

import fastlm
from fastlm.measure.numerics import DTYPES

from .harness import Case

SHAPES = {
    "cpu": [{"N": 1024, "C": 768}],
    "cuda": [{"N": N, "C": C} for N, C in ((8192, 768), (65536, 768), (16384, 1600))],
}
DECISIVE = [({"N": 32768, "C": 768}, ("torch.compile",))]  # on a GPU: sizes, and the peers that count
SMALL = {"N": 70, "C": 40}


def of_model(config, B, T):
    """Shapes of a model's training step (B, T), or of its decoding."""
    return [{"N": min(B * T, 8192), "C": config.n_embd}]


def cases(shape, dtype, device):
    N, C = shape["N"], shape["C"]
    matrix = N * C * DTYPES[dtype].itemsize

    def operands(rows=N):
        x, residual, dy, ds = (torch.randn(rows, C, device=device, dtype=DTYPES[dtype]) for _ in range(4))
        weight, bias = (torch.randn(C, device=device, dtype=DTYPES[dtype], requires_grad=True) for _ in range(2))
        return x.requires_grad_(), residual.requires_grad_(), weight, bias, dy, ds

    def composition(x, weight, bias, *, residual):
        s = x + residual
        return F.layer_norm(s, (C,), weight, bias), s

    yield Case(
        op="layer_norm", part="forward + backward", shape=shape, dtype=dtype, bytes=8 * matrix, flops=0,
        memory=16 * matrix + 12 * 8 * min(N, 2048) * C, operands=operands, check=lambda: operands(min(N, 2048)),
        ours=_results(fastlm.layer_norm),
        peers={"eager": _results(composition), "torch.compile": _results(torch.compile(composition))},
    )


def _results(function):
    def run(x, residual, weight, bias, dy, ds):
        y, s = function(x, weight, bias, residual=residual)
        dx, dweight, dbias = torch.autograd.grad((y, s), (x, weight, bias), (dy, ds))
        return {"y": y, "s": s, "dx": dx, "dweight": dweight, "dbias": dbias}

    return run


def bench_layer_norm(contest):
    contest()
