"""decode_attention: one new token a sequence over a paged cache, beside PyTorch's attention over a contiguous one.

Least traffic: every key and value once, 2 · B · S · H · D elements read.
"""

import torch
import torch.nn.functional as F

import fastlm
from fastlm.measure.numerics import DTYPES

from .harness import Case

PAGE = 64
SHAPES = {
    "cpu": [{"B": B, "S": 1024, "H": 12, "D": 64} for B in (1, 8)],
    "cuda": [{"B": B, "S": S, "H": 12, "D": 64} for B, S in ((1, 1024), (8, 1024), (64, 512), (256, 512), (1024, 512))],
}
DECISIVE = [  # on a GPU: sizes, and the peers that count
    ({"B": 1, "S": 1024, "H": 12, "D": 64}, ("SDPA",)),
    ({"B": 64, "S": 512, "H": 12, "D": 64}, ("SDPA",)),
    ({"B": 256, "S": 512, "H": 12, "D": 64}, ("SDPA",)),
]
SMALL = {"B": 2, "S": 70, "H": 2, "D": 16}


def of_model(config, B, T):
    """Shapes of a model's training step (B, T), or of its decoding."""
    return [{"B": many, "S": T, "H": config.n_head, "D": config.n_embd // config.n_head} for many in (1, 8)]


def cases(shape, dtype, device):
    B, S, H, D = shape.values()
    cache = 2 * B * S * H * D * DTYPES[dtype].itemsize
    per_row = -(-S // PAGE)

    def operands(B=B):
        k, v = (torch.randn(B * per_row, PAGE, H, D, device=device, dtype=DTYPES[dtype]) for _ in range(2))
        q = torch.randn(B, 1, H, D, device=device, dtype=DTYPES[dtype])
        table = torch.arange(B * per_row, dtype=torch.int32, device=device).view(B, per_row)
        return q, k, v, table, torch.full((B,), S, dtype=torch.int32, device=device)

    def sdpa(q, k, v, table, lengths):
        k, v = (pages.view(q.shape[0], -1, H, D)[:, :S].transpose(1, 2) for pages in (k, v))  # (B, H, S, D)
        return {"o": F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)}

    yield Case(
        op="decode_attention", part="forward", shape=shape, dtype=dtype, bytes=cache, flops=4 * B * H * S * D,
        memory=8 * cache + 2**26, operands=operands, check=lambda: operands(min(B, 8)),
        ours=lambda *operands: {"o": fastlm.decode_attention(*operands)}, peers={"SDPA": sdpa}, traffic="read",
    )


def bench_decode_attention(contest):
    contest()
