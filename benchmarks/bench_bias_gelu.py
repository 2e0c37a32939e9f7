"""bias_gelu, forward and backward, beside PyTorch's addition and GELU.

Least traffic: forward reads x and writes y, backward reads dy and x and writes dx, 5 · N · C elements.
"""

import torch
import torch.nn.functional as F

import fastlm
from fastlm.measure.numerics import DTYPES

from .harness import Case

SHAPES = {
    "cpu": [{"N": 1024, "C": 3072}],
    "cuda": [{"N": N, "C": C} for N, C in ((8192, 3072), (65536, 3072), (16384, 6400))],
}
DECISIVE = [({"N": 32768, "C": 3072}, ("torch.compile",))]  # on a GPU: sizes, and the peers that count
SMALL = {"N": 70, "C": 40}


def of_model(config, B, T):
    """Shapes of a model's training step (B, T), or of its decoding."""
    return [{"N": min(B * T, 8192), "C": config.n_inner or 4 * config.n_embd}]


def cases(shape, dtype, device):
    N, C = shape["N"], shape["C"]
    matrix = N * C * DTYPES[dtype].itemsize

    def operands(rows=N):
        x, dy = (torch.randn(rows, C, device=device, dtype=DTYPES[dtype]) for _ in range(2))
        return x.requires_grad_(), torch.randn(C, device=device, dtype=DTYPES[dtype], requires_grad=True), dy

    def composition(x, bias):
        return F.gelu(x + bias, approximate="tanh")

    yield Case(
        op="bias_gelu", part="forward + backward", shape=shape, dtype=dtype, bytes=5 * matrix, flops=0,
        memory=12 * matrix + 8 * 8 * min(N, 2048) * C, operands=operands, check=lambda: operands(min(N, 2048)),
        ours=_results(fastlm.bias_gelu),
        peers={"eager": _results(composition), "torch.compile": _results(torch.compile(composition))},
    )


def _results(function):
    def run(x, bias, dy):
        y = function(x, bias)
        dx, dbias = torch.autograd.grad(y, (x, bias), dy)
        return {"y": y, "dx": dx, "dbias": dbias}

    return run


def bench_bias_gelu(contest):
    contest()
