"""cache_append_: a prompt's keys and values into the pages of the cache, beside a plain copy of as many bytes.

Least traffic: 2 · B · T · H · D elements, read once and written once.
"""

import torch

import fastlm
from fastlm.measure.numerics import DTYPES

from .harness import Case

PAGE = 64
SHAPES = {
    "cpu": [{"B": 8, "T": 1024, "H": 12, "D": 64}],
    "cuda": [{"B": B, "T": T, "H": 12, "D": 64} for B, T in ((8, 1024), (64, 512), (256, 1))],
}
DECISIVE = [({"B": 64, "T": 1, "H": 12, "D": 64}, ())]  # on a GPU: sizes, and the peers that count
SMALL = {"B": 2, "T": 70, "H": 2, "D": 16}


def of_model(config, B, T):
    """Shapes of a model's training step (B, T), or of its decoding."""
    return [{"B": B, "T": T, "H": config.n_head, "D": config.n_embd // config.n_head}]


def cases(shape, dtype, device):
    B, T, H, D = shape.values()
    new = 2 * B * T * H * D * DTYPES[dtype].itemsize
    per_row = -(-T // PAGE)

    def operands():
        pages = [torch.zeros(B * per_row, PAGE, H, D, device=device, dtype=DTYPES[dtype]) for _ in range(2)]
        k, v = (torch.randn(B, T, H, D, device=device, dtype=DTYPES[dtype]) for _ in range(2))
        table = torch.arange(B * per_row, dtype=torch.int32, device=device).view(B, per_row)
        return *pages, k, v, table, torch.arange(T, dtype=torch.int32, device=device).expand(B, T)

    def append(k_pages, v_pages, k, v, table, positions):
        fastlm.cache_append_(k_pages, v_pages, k, v, table, positions)
        return {"k_pages": k_pages, "v_pages": v_pages}

    def copy(k_pages, v_pages, k, v, table, positions):
        for pages, new in ((k_pages, k), (v_pages, v)):
            pages.view(B, -1, H, D)[:, :T].copy_(new)
        return {"k_pages": k_pages, "v_pages": v_pages}

    yield Case(
        op="cache_append", part="forward", shape=shape, dtype=dtype, bytes=2 * new, flops=0,
        memory=10 * new, operands=operands, ours=append, peers={"plain copy": copy},
    )


def bench_cache_append(contest):
    contest()
