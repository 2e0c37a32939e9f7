"""decode_attention: one new token a sequence over a paged cache, beside PyTorch's attention over a contiguous one.

    pytest benchmarks/bench_decode_attention.py --benchmark-enable --benchmark-group-by=param:B

Least traffic: every key and value once, 2 · B · S · C · 4 bytes (50 MB at B = 8, S = 1024, C = 768, fp32).
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import close, native_backends

import fastlm

S, H, D, PAGE = 1024, 12, 64, 128


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("backend", [*native_backends("decode_attention"), "sdpa"])
def bench_decode_attention(benchmark, device, backend, B):
    torch.manual_seed(0)
    q = torch.randn(B, 1, H, D, device=device)
    k, v = torch.randn(2, B, S, H, D, device=device).unbind(0)
    if backend == "sdpa":
        benchmark.pedantic(sdpa, (q, k, v), rounds=50, warmup_rounds=5)
        return
    pages = [cache.reshape(-1, PAGE, H, D) for cache in (k, v)]
    table = torch.arange(B * S // PAGE, dtype=torch.int32, device=device).view(B, -1)
    lengths = torch.full((B,), S, dtype=torch.int32, device=device)
    with fastlm.use(decode_attention=backend):
        close(fastlm.decode_attention(q, *pages, table, lengths), sdpa(q, k, v))
        benchmark.pedantic(fastlm.decode_attention, (q, *pages, table, lengths), rounds=50, warmup_rounds=5)
