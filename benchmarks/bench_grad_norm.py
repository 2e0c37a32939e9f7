"""grad_norm over one flat buffer, beside a plain composition. Least traffic: one read, 4 · n bytes."""

import torch

import fastlm

from .harness import Case

WIDTHS = {"fp32": torch.float32}
SHAPES = {"cpu": [{"N": 2**24}], "cuda": [{"N": 124_439_808}]}
DECISIVE = [({"N": 124_439_808}, ())]  # on a GPU: sizes, and the peers that count
SMALL = {"N": 1000}


def of_model(config, B, T):
    """Shapes of a model's training step (B, T), or of its decoding."""
    return [{"N": 12 * config.n_embd**2}]


def cases(shape, dtype, device):
    n = shape["N"]

    def eager(g):
        return {"norm": g.square().sum().sqrt()[None]}

    yield Case(
        op="grad_norm", part="norm", shape=shape, dtype=dtype, bytes=4 * n, flops=0, memory=24 * n, traffic="read",
        operands=lambda: (torch.randn(n, device=device),), ours=lambda g: {"norm": fastlm.grad_norm(g)[None]},
        peers={"eager": eager},
    )


def bench_grad_norm(contest):
    contest()
