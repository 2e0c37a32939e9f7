"""gpt2_blocks, forward and backward, beside the same blocks in PyTorch, plain and compiled; `fastlm torch` is made of
our other ops over PyTorch's kernels.

FLOPs: 72 · C² a token and block for the products with weights (12 · C² of them, three products each), and 7 · C · T for
causal attention (half of the square is masked). Least traffic: the weights and x, dy, and their gradients.
"""

import torch

import fastlm
from fastlm.measure.numerics import DTYPES
from fastlm.ops import BLOCK_WEIGHTS

from .harness import Case
from .programs import plain_block

WIDTHS = {"fp32": torch.float32}
SHAPES = {
    "cpu": [{"L": 4, "B": 12, "T": 64, "H": 4, "D": 32}, {"L": 1, "B": 4, "T": 256, "H": 12, "D": 64}],
    "cuda": [{"L": 12, "B": 8, "T": 1024, "H": 12, "D": 64}],
}
DECISIVE = []  # on a GPU
SMALL = {"L": 2, "B": 2, "T": 10, "H": 2, "D": 8}


def of_model(config, B, T):
    """Shapes of a model's training step (B, T), or of its decoding."""
    return [{"L": 1, "B": B, "T": T, "H": config.n_head, "D": config.n_embd // config.n_head}]


def cases(shape, dtype, device):
    L, B, T, H, D = (shape[letter] for letter in "LBTHD")
    C, N = H * D, B * T
    sizes, weights = {"C": C, "3C": 3 * C, "F": 4 * C}, 12 * C * C + 13 * C
    unit = DTYPES[dtype].itemsize

    def operands(sequences=B):
        def random(*shape):
            return torch.randn(shape, device=device, dtype=DTYPES[dtype])

        made = [random(*(sizes[size] for size in shape.split())) / C**0.5 for shape in list(BLOCK_WEIGHTS.values()) * L]
        return random(sequences, T, C).requires_grad_(), random(sequences, T, C), *(w.requires_grad_() for w in made)

    def composition(x, weights):
        for first in range(0, len(weights), len(BLOCK_WEIGHTS)):
            x = plain_block(x, weights[first : first + len(BLOCK_WEIGHTS)], H)
        return x

    yield Case(
        op="gpt2_blocks", part="forward + backward", shape=shape, dtype=dtype,
        bytes=unit * (2 * L * weights + 4 * N * C), flops=L * N * (72 * C * C + 7 * C * T),
        memory=4 * unit * (3 * L * weights + 40 * L * N * C) + 16 * L * B * H * T * T,
        operands=operands, check=lambda: operands(min(B, 2)),
        ours=_results(lambda x, weights: fastlm.gpt2_blocks(x, weights, heads=H)),
        peers={"eager": _results(composition), "torch.compile": _results(torch.compile(composition))},
    )


def _results(function):
    def run(x, dy, *weights):
        y = function(x, list(weights))
        dx, *gradients = torch.autograd.grad(y, (x, *weights), dy)
        return {"y": y, "dx": dx, "dqkv": gradients[2], "ddown": gradients[10]}

    return run


def bench_gpt2_blocks(contest):
    contest()
