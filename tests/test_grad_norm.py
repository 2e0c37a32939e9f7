"""grad_norm against fp64, on every backend."""

import numerics
import pytest
import torch
from conftest import DEVICE
from guard import guarded

import fastlm

FAMILY = "grad_norm"


@pytest.mark.parametrize("kind", ["normal", "scale 30", "offset 100", "outlier", "equal"])
@pytest.mark.parametrize("n", [1, 15, 37, 65536, 65537, 300001])
def test_sizes(backend, n, kind):
    g = numerics.inputs(kind, (n,), torch.float32)
    got = fastlm.grad_norm(g.to(DEVICE)).cpu()
    numerics.close("grad_norm", backend, got[None], torch.linalg.vector_norm(g)[None], g.double().norm()[None])


def test_a_buffer_offset_by_one(backend):
    g = numerics.inputs("normal", (70002,), torch.float32).to(DEVICE)
    torch.testing.assert_close(fastlm.grad_norm(g[1:]), g[1:].double().norm().float(), rtol=1e-5, atol=0)


def test_none_is_zero_and_nan_is_told(backend):
    assert fastlm.grad_norm(torch.zeros(0, device=DEVICE)) == 0
    g = torch.ones(70000, device=DEVICE)
    g[65999] = float("nan")
    assert fastlm.grad_norm(g).isnan()
    g[65999] = float("inf")
    assert fastlm.grad_norm(g).isinf()


@pytest.mark.parametrize("n", [1, 15, 37, 130])
@pytest.mark.parametrize("front", [False, True], ids=["end", "front"])
def test_guard_pages(backend, n, front):
    if DEVICE != "cpu":
        pytest.skip("guard pages lie in the memory of the CPU; on a GPU compute-sanitizer does this")
    g = guarded(numerics.inputs("normal", (n,), torch.float32), front=front)
    torch.testing.assert_close(fastlm.grad_norm(g), g.norm())


def test_same_bits_for_any_number_of_threads(backend):
    if backend == "torch":
        pytest.skip("PyTorch's own norm depends on the number of threads")
    g, threads, found = torch.randn(500000).to(DEVICE), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(float(fastlm.grad_norm(g)))
    finally:
        torch.set_num_threads(threads)
    if backend != "reference":  # the oracle sums as PyTorch does
        assert len(set(found)) == 1


@pytest.mark.parametrize("g, error, told", [
    (torch.zeros(2, 3), ValueError, r"g has shape \(2, 3\), wanted \(n\)"),
    (torch.zeros(3).half(), TypeError, "g is torch.float16, wanted float32"),
    ([1.0], TypeError, "g is list, wanted a tensor"),
])
def test_bad_input(g, error, told):
    with pytest.raises(error, match=told):
        fastlm.grad_norm(g)
