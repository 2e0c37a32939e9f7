"""Causal attention forward and backward at GPT-2's head size beside PyTorch's own fused kernel.

    pytest benchmarks/bench_attention.py --benchmark-enable --benchmark-group-by=param:shape

FLOPs: 2 · B · H · T² · D forward (half of the square is masked), 5 · B · H · T² · D backward.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import close, native_backends

import fastlm

SHAPES = {"124M T=1024": (1, 1024, 12, 64), "baby T=64": (12, 64, 4, 32)}


def sdpa(qkv):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("what", ["forward", "both"])
@pytest.mark.parametrize("backend", [*native_backends("attention"), "sdpa"])
def bench_attention(benchmark, device, backend, what, shape):
    B, T, H, D = SHAPES[shape]
    torch.manual_seed(0)
    qkv = torch.randn(B, T, 3, H, D, device=device, requires_grad=what == "both")
    do = torch.randn(B, T, H, D, device=device)
    run = sdpa if backend == "sdpa" else fastlm.attention_qkv
    with fastlm.use(attention=None if backend == "sdpa" else backend):
        close(run(qkv.detach()), sdpa(qkv.detach()))

        def step():
            qkv.grad = None
            o = run(qkv)
            if what == "both":
                o.backward(do)

        benchmark.pedantic(step, rounds=20, warmup_rounds=3)
