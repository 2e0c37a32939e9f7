"""linear_xent, loss and both gradients, beside what PyTorch users have.

Least work: three products, 6 · N · V · C FLOPs. MiB: the most that a call takes beyond its operands, w's gradient and
all.
"""

import torch
import torch.nn.functional as F

import fastlm
from fastlm.measure.numerics import DTYPES

from .harness import Case

SHAPES = {
    "cpu": [{"N": 256, "C": 768, "V": 50257}],
    "cuda": [{"N": N, "C": 768, "V": 50257} for N in (8192, 32768, 65536)],
}
DECISIVE = [  # on a GPU: sizes, and the peers that count
    ({"N": 32768, "C": 768, "V": 50257}, ("torch.compile", "F.linear_cross_entropy")),
]
SMALL = {"N": 20, "C": 16, "V": 97}


def of_model(config, B, T):
    """Shapes of a model's training step (B, T), or of its decoding."""
    return [{"N": min(B * T, 512), "C": config.n_embd, "V": config.vocab_size}]


def cases(shape, dtype, device):
    N, C, V = shape.values()
    size = DTYPES[dtype].itemsize

    def operands(rows=N):
        h = torch.randn(rows, C, device=device, dtype=DTYPES[dtype], requires_grad=True)
        w = (torch.randn(V, C, device=device) * C**-0.5).to(DTYPES[dtype]).requires_grad_()
        return h, w, torch.randint(V, (rows,), device=device)

    def composition(h, w, y):
        return F.cross_entropy(h @ w.t(), y)

    peers = {"eager": _results(composition), "torch.compile": _results(torch.compile(composition))}
    absent = {}
    if hasattr(F, "linear_cross_entropy"):
        peers["F.linear_cross_entropy"] = _results(F.linear_cross_entropy)
    else:
        absent["F.linear_cross_entropy"] = "needs torch ≥ 2.13"
    yield Case(
        op="linear_xent", part="forward + backward", shape=shape, dtype=dtype, bytes=(N * C * 2 + V * C * 2) * size,
        flops=6 * N * V * C, memory=(4 * N * V + 6 * V * C) * size + 8 * (4 * min(N, 512) * V + 4 * V * C),
        operands=operands, check=lambda: operands(min(N, 512)), ours=_results(fastlm.linear_xent), peers=peers,
        absent=absent, peak=True,
    )


def _results(loss_of):
    def run(h, w, y):
        loss = loss_of(h, w, y)
        dh, dw = torch.autograd.grad(loss, (h, w))
        return {"loss": loss[None], "dh": dh, "dw": dw}

    return run


def bench_linear_xent(contest):
    contest()
