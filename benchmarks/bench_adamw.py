"""adamw_, a step over one flat buffer with clipped gradients, as the trainer takes it, beside the same written in
PyTorch, plain and compiled; `fastlm torch` is its fused optimizer.

Least traffic: p, g and both moments are read, p and the moments written, 28 · n bytes.
"""

import torch

import fastlm

from .harness import Case

WIDTHS = {"fp32": torch.float32}
SHAPES = {"cpu": [{"N": 2**23}], "cuda": [{"N": 124_439_808}]}
DECISIVE = [({"N": 124_439_808}, ("torch.compile",))]  # on a GPU: sizes, and the peers that count
SMALL = {"N": 1000}

OPTIONS = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}


def of_model(config, B, T):
    """Shapes of a model's training step (B, T), or of its decoding."""
    return [{"N": 12 * config.n_embd**2}]


def cases(shape, dtype, device):
    n = shape["N"]

    def operands(count=n):
        p, g, m = (torch.randn(count, device=device) for _ in range(3))
        return p, g, 0.1 * m, (0.1 * m).square(), torch.tensor(0.7, device=device)

    def step(p, g, exp_avg, exp_avg_sq, scale):
        g = g * scale
        lr, beta1, beta2, epsilon, decay = OPTIONS.values()
        p.mul_(1 - lr * decay)
        exp_avg.lerp_(g, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(exp_avg, (exp_avg_sq.sqrt() / (1 - beta2**3) ** 0.5).add_(epsilon), value=-lr / (1 - beta1**3))

    yield Case(
        op="adamw", part="step", shape=shape, dtype=dtype, bytes=28 * n, flops=0, memory=40 * n + 64 * min(n, 2**20),
        operands=operands, check=lambda: operands(min(n, 2**20)),
        ours=_results(lambda *tensors: fastlm.adamw_(*tensors[:4], scale=tensors[4], step=3, **OPTIONS)),
        peers={"eager": _results(step), "torch.compile": _results(torch.compile(step))},
    )


def _results(function):
    def run(p, g, exp_avg, exp_avg_sq, scale):
        with torch.no_grad():
            function(p, g, exp_avg, exp_avg_sq, scale)
        return {"p": p, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    return run


def bench_adamw(contest):
    contest()
