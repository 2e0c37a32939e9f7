"""softmax_xent forward and backward at GPT-2's vocabulary beside eager and compiled PyTorch.

    pytest benchmarks/bench_softmax_xent.py --benchmark-enable --benchmark-group-by=func

Least traffic: one read and one write of the logits, 2 · N · V · 4 bytes (412 MB at N = 1024, V = 50257, fp32).
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import close, native_backends

import fastlm

N, V = 1024, 50257


def ours(x, y):
    loss = fastlm.softmax_xent(x, y)
    loss.backward()
    return loss


def eager(x, y):
    loss = F.cross_entropy(x, y)
    loss.backward()
    return loss


@pytest.fixture
def batch(device):
    torch.manual_seed(0)
    return torch.randn(N, V, device=device, requires_grad=True), torch.randint(V, (N,), device=device)


def _measure(benchmark, step, batch):
    x, y = batch
    close(step(x, y), F.cross_entropy(x.detach(), y), 1e-5)

    def run():
        x.grad = None
        step(x, y)

    benchmark.pedantic(run, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("backend", native_backends("softmax_xent"))
def bench_ours(benchmark, batch, backend):
    with fastlm.use(softmax_xent=backend):
        _measure(benchmark, ours, batch)


def bench_eager(benchmark, batch):
    _measure(benchmark, eager, batch)


def bench_compiled(benchmark, batch):
    compiled = torch.compile(F.cross_entropy)

    def step(x, y):
        loss = compiled(x, y)
        loss.backward()
        return loss

    _measure(benchmark, step, batch)
