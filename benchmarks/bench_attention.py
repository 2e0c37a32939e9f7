"""Causal attention at GPT-2's head size, and at twice that, beside PyTorch's fused kernels, each pinned.

FLOPs: 2 · B · H · T² · D forward (half of the square is masked), 5 · B · H · T² · D backward. Least traffic: q, k, v
and o once forward; the same, do and three gradients backward.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm
from fastlm.measure.numerics import DTYPES

from .harness import Case

SHAPES = {
    "cpu": [{"B": 1, "T": 1024, "H": 12, "D": 64}, {"B": 12, "T": 64, "H": 4, "D": 32}],
    "cuda": [{"B": 16384 // T, "T": T, "H": H, "D": D} for H, D in ((12, 64), (16, 64), (20, 64), (25, 64), (16, 128))
             for T in (1024, 2048, 4096, 8192)],
}
DECISIVE = [  # on a GPU: sizes, and the peers that count
    ({"B": 32, "T": 1024, "H": 12, "D": 64}, ("cuDNN", "FlashAttention-2")),
    ({"B": 8, "T": 4096, "H": 12, "D": 64}, ("cuDNN", "FlashAttention-2")),
    ({"B": 16, "T": 1024, "H": 16, "D": 128}, ("cuDNN", "FlashAttention-2")),
]
SMALL = {"B": 1, "T": 16, "H": 2, "D": 16}

PINNED = {
    "SDPA, math": SDPBackend.MATH, "cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def of_model(config, B, T):
    """Shapes of a model's training step (B, T), or of its decoding."""
    return [{"B": B, "T": T, "H": config.n_head, "D": config.n_embd // config.n_head}]


def cases(shape, dtype, device):
    B, T, H, D = shape.values()
    one = B * T * H * D * DTYPES[dtype].itemsize
    kernels = PINNED if device == "cuda" else {"SDPA": None}
    for part, tensors, flops in (("forward", 4, 2), ("forward + backward", 12, 7)):
        backward = part != "forward"

        def operands(B=B, backward=backward):
            qkv = torch.randn(B, T, 3, H, D, device=device, dtype=DTYPES[dtype]).requires_grad_(backward)
            return qkv, torch.randn(B, T, H, D, device=device, dtype=DTYPES[dtype])

        yield Case(
            op="attention", part=part, shape=shape, dtype=dtype, bytes=tensors * one, flops=flops * B * H * T * T * D,
            memory=20 * one + 8 * (H * T * T * 8) + B * H * T * T * 8,  # the check's scores in fp64, math's scores
            operands=operands, check=lambda make=operands: make(1), ours=_results(fastlm.attention_qkv, backward),
            peers={name: _results(_sdpa(kernel), backward) for name, kernel in kernels.items()},
        )


def _results(attention, backward):
    def run(qkv, do):
        o = attention(qkv)
        return {"o": o, "dqkv": torch.autograd.grad(o, qkv, do)[0]} if backward else {"o": o}

    return run


def _sdpa(kernel):
    """PyTorch's attention of a packed qkv, pinned to a kernel, or its own choice where that is None."""
    def run(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return run


def bench_attention(contest):
    contest()
