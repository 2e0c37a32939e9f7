"""The matrix products of a GPT-2 layer and of its head by PyTorch's own library (cuBLAS, oneDNN).

    x (N, C) W (C, M)    M = 3C (qkv), C (attention's output), 4C (MLP); 4C → C; the head C → V
"""

import torch

from fastlm.measure.clock import race, sets_beyond_cache
from fastlm.measure.numerics import DTYPES

from .harness import figures, row_of
from .programs import Program

SHAPES = {"cpu": [{"N": 1024, "C": 768, "V": 50257}], "cuda": [{"N": 16384, "C": C, "V": 50257} for C in
                                                             (768, 1024, 1280, 1600)]}


def cases(shape, dtype, device):
    yield Products(shape, dtype)


class Products(Program):
    """A row for every product; no contender is ours."""

    op = "products"

    @property
    def memory(self):
        N, C, V = self.shape.values()
        return DTYPES[self.dtype].itemsize * (4 * N * C * 5 + (N + C) * V * 2)

    def run(self, device, roofs, *, seconds=1.0, cold=True):
        N, C, V = self.shape.values()
        dtype, size = DTYPES[self.dtype], DTYPES[self.dtype].itemsize
        rows = []
        for part, K, M in (("qkv", C, 3 * C), ("attention output", C, C), ("MLP up", C, 4 * C), ("MLP down", 4 * C, C),
                           ("head", C, V)):
            one = (N * K + K * M) * size
            sets = [(torch.randn(N, K, device=device, dtype=dtype), torch.randn(M, K, device=device, dtype=dtype).T)
                    for _ in range(min(sets_beyond_cache(one, device), 16) if cold else 1)]
            calls = {"torch": [lambda x=x, w=w: torch.mm(x, w) for x, w in sets]}
            (taken,) = race(calls, device=device, seconds=seconds).values()
            floor = roofs.floor(bytes=one + N * M * size, flops=2 * N * K * M, dtype=self.dtype)
            rows.append(row_of(self, part, "torch", ours=False, cold=cold) | figures(taken, floor) | {
                "gb_per_s": (one + N * M * size) / taken.median * 1e-9,
                "tflop_per_s": 2 * N * K * M / taken.median * 1e-12, "chosen": False,
            })
        return rows
