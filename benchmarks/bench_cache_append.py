"""cache_append_: a prompt's keys and values into the pages of the cache, beside one plain copy of as many bytes.

    pytest benchmarks/bench_cache_append.py --benchmark-enable

Least traffic: 4 · B · T · C · 4 bytes, read once and written once (100 MB at B = 8, T = 1024, C = 768, fp32).
"""

import pytest
import torch
from conftest import close, native_backends

import fastlm

B, T, H, D, PAGE = 8, 1024, 12, 64, 128


@pytest.mark.parametrize("backend", [*native_backends("cache_append"), "copy"])
def bench_cache_append(benchmark, device, backend):
    torch.manual_seed(0)
    k, v = torch.randn(2, B, T, H, D, device=device).unbind(0)
    pages = [torch.zeros(B * T // PAGE, PAGE, H, D, device=device) for _ in range(2)]
    if backend == "copy":
        benchmark.pedantic(lambda: (pages[0].copy_(k.view_as(pages[0])), pages[1].copy_(v.view_as(pages[1]))),
                           rounds=20, warmup_rounds=3)
        return
    table = torch.arange(B * T // PAGE, dtype=torch.int32, device=device).view(B, -1)
    positions = torch.arange(T, dtype=torch.int32, device=device).expand(B, T)
    with fastlm.use(cache_append=backend):
        benchmark.pedantic(fastlm.cache_append_, (*pages, k, v, table, positions), rounds=20, warmup_rounds=3)
        close(pages[0].view_as(k), k)
