"""softmax_xent, loss and gradient, beside what PyTorch users have.

Least traffic: one read and one write of the logits, 2 · N · V elements.
"""

import importlib.util

import torch
import torch.nn.functional as F

import fastlm
from fastlm.measure.numerics import DTYPES

from .harness import Case

SHAPES = {
    "cpu": [{"N": 1024, "V": 50257}],
    "cuda": [{"N": N, "V": 50257} for N in (8192, 16384, 32768, 65536)],
}
DECISIVE = [  # on a GPU: sizes, and the peers that count
    ({"N": 16384, "V": 50257}, ("torch.compile", "Liger")),
    ({"N": 16384, "V": 50304}, ()),
]
SMALL = {"N": 8, "V": 100}


def of_model(config, B, T):
    """Shapes of a model's training step (B, T), or of its decoding."""
    return [{"N": min(B * T, 8192), "V": config.vocab_size}]


def cases(shape, dtype, device):
    N, V = shape["N"], shape["V"]
    matrix = N * V * DTYPES[dtype].itemsize

    def operands(rows=N):
        x = torch.randn(rows, V, device=device, dtype=DTYPES[dtype]).requires_grad_()
        return x, torch.randint(V, (rows,), device=device)

    reason = _liger_reason(device)
    peers = {"eager": _results(F.cross_entropy), "torch.compile": _results(torch.compile(F.cross_entropy))}
    peers |= {} if reason else {"Liger": _results(_liger)}
    for part, ours in (("forward + backward", _results(fastlm.softmax_xent)),
                       ("forward + backward over the logits", _overwriting)):
        yield Case(
            op="softmax_xent", part=part, shape=shape, dtype=dtype, bytes=2 * matrix, flops=0,
            memory=6 * matrix + 5 * min(N, 2048) * V * 8, operands=operands, check=lambda: operands(min(N, 2048)),
            ours=ours, peers=peers, absent={"Liger": reason} if reason else {}, peak=True,
        )


def _results(loss_of):
    def run(x, y):
        loss = loss_of(x, y)
        return {"loss": loss[None], "dx": torch.autograd.grad(loss, x)[0]}

    return run


def _overwriting(x, y):
    leaf = x.detach().requires_grad_()
    loss = fastlm.softmax_xent(leaf.view_as(leaf), y, overwrite=True)  # as a head gives them: no leaf
    return {"loss": loss[None], "dx": torch.autograd.grad(loss, leaf)[0]}


def _liger(x, y):
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(x * 1, y)  # it writes the gradient over its input


def _liger_reason(device):
    if device == "cpu":
        return "runs on a GPU only"
    return None if importlib.util.find_spec("liger_kernel") else "not installed: pip install liger-kernel"


def bench_softmax_xent(contest):
    contest()
