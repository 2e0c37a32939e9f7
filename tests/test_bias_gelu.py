"""bias_gelu against PyTorch and fp64, on every backend."""

import numerics
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from guard import far_apart, guarded

import fastlm

FAMILY = "bias_gelu"


def results(function, x, bias, dy):
    """y, dx and dbias of function(x, bias) for the gradient dy."""
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    y = function(x, bias)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "dx": x.grad, "dbias": bias.grad}


def composition(x, bias):
    return F.gelu(x + bias.to(x.dtype), approximate="tanh")


def check(x, bias, backend):
    dy = numerics.inputs("normal", x.shape, x.dtype, seed=9)
    truth = results(composition, x.double(), bias.double(), dy.double())
    composed = results(composition, x, bias, dy)
    for what, got in results(fastlm.bias_gelu, x.to(DEVICE), bias.to(DEVICE), dy.to(DEVICE)).items():
        assert got.dtype == composed[what].dtype
        numerics.close(f"bias_gelu {what}", backend, got.cpu(), composed[what], truth[what], backward=what[0] == "d")


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("N, C", [(1, 1), (5, 7), (33, 37), (70, 64), (2, 3072), (65, 513)])
def test_sizes(backend, N, C, dtype):
    check(numerics.inputs("normal", (N, C), dtype), numerics.inputs("normal", (C,), dtype, 1), backend)


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("kind", numerics.KINDS)
def test_inputs(backend, kind, dtype):
    check(numerics.inputs(kind, (6, 127), dtype), numerics.inputs("normal", (127,), torch.float32, 1), backend)


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("kind", numerics.KINDS)
def test_the_parts_that_inductor_is_given(kind, dtype, monkeypatch):
    monkeypatch.setattr(fastlm.ops.module(FAMILY), "left_to_inductor", lambda *_: True)
    check(numerics.inputs(kind, (6, 127), dtype), numerics.inputs("normal", (127,), torch.float32, 1), "inductor")


def test_far_from_zero_it_is_the_line_or_zero(backend):
    if backend == "torch":
        pytest.skip("PyTorch's own slope is NaN where x³ overflows")
    x = torch.tensor([[-3e38, -1e30, -100.0, 100.0, 1e30, 3e38]], device=DEVICE, requires_grad=True)
    y = fastlm.bias_gelu(x, torch.zeros(6, device=DEVICE))
    y.sum().backward()
    assert y.tolist() == [[0, 0, 0, *x[0, 3:].tolist()]] and x.grad.tolist() == [[0, 0, 0, 1, 1, 1]], backend


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_negative_by_a_mark_alone(backend, grad):
    """torch keeps the imaginary part of a conjugate as numbers that are to be negated."""
    z = torch.complex(torch.zeros(3, 1), torch.tensor([[1.0], [-2.0], [3.0]])).to(DEVICE)
    x, bias = z.conj().imag, torch.zeros(1, device=DEVICE)
    assert x.is_neg()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(fastlm.bias_gelu(x, bias), fastlm.bias_gelu(x.clone(), bias))


def test_nan_stays_where_it_is(backend):
    x = torch.zeros(2, 40, device=DEVICE)
    x[1, 3] = float("nan")
    assert fastlm.bias_gelu(x, torch.zeros(40, device=DEVICE)).isnan().nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("cut", ["rows apart", "offset by one", "transposed"])
def test_views(backend, cut, dtype):
    x = numerics.inputs("normal", (40, 64), dtype)
    views = {"rows apart": x[:5, :37], "offset by one": x[:5, 1:38], "transposed": x.t()[:5, :37]}
    check(views[cut], numerics.inputs("normal", (75,), dtype, 1)[1::2], backend)


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_gradients_with_rows_apart(backend, dtype):
    dy, x = (numerics.inputs("normal", (70, 80), dtype, seed).to(DEVICE)[:, 3:40] for seed in range(2))
    bias = torch.randn(37, device=DEVICE)
    apart, near = (torch.ops.fastlm.bias_gelu_bwd(*t, bias) for t in ((dy, x), (dy.contiguous(), x.contiguous())))
    for got, wanted in zip(apart, near):
        torch.testing.assert_close(got, wanted)


def test_nan_of_the_gradient_stays_in_its_column(backend):
    x, dy = torch.zeros(70, 600, device=DEVICE), torch.ones(70, 600, device=DEVICE)
    x[33, 3], dy[1, 599] = float("nan"), float("nan")
    dx, dbias = torch.ops.fastlm.bias_gelu_bwd(dy, x, torch.zeros(600, device=DEVICE))
    assert dx.isnan().nonzero().tolist() == [[1, 599], [33, 3]] and dbias.isnan().nonzero().tolist() == [[3], [599]]


def test_rows_beyond_2_to_the_31(backend):
    if DEVICE != "cpu":
        pytest.skip("made of pages of the CPU that are never touched")
    operands = [far_apart((3, 40), torch.bfloat16) for _ in range(2)]
    for seed, operand in enumerate(operands):
        operand.copy_(numerics.inputs("normal", operand.shape, torch.bfloat16, seed))
    bias, found = torch.randn(40), []
    for x, dy in (operands, [operand.contiguous() for operand in operands]):
        found.append((torch.ops.fastlm.bias_gelu_fwd(x, bias), *torch.ops.fastlm.bias_gelu_bwd(dy, x, bias)))
    assert all(torch.equal(far, near) for far, near in zip(*found))


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("C", [1, 7, 37, 130])
@pytest.mark.parametrize("front", [False, True], ids=["end", "front"])
def test_guard_pages(backend, C, front, dtype):
    if DEVICE != "cpu":
        pytest.skip("guard pages lie in the memory of the CPU; on a GPU compute-sanitizer does this")
    x, bias = numerics.inputs("normal", (3, C), dtype), numerics.inputs("normal", (C,), torch.float32, 1)
    check(guarded(x, front=front), guarded(bias, front=front), backend)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_zero_size(backend, shape):
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    bias = torch.randn(shape[1], device=DEVICE, requires_grad=True)
    fastlm.bias_gelu(x, bias).sum().backward()
    assert x.grad.shape == shape and (bias.grad == 0).all()


def test_same_bits_for_any_number_of_threads(backend):
    x, bias = numerics.inputs("normal", (200, 1000), torch.float32), numerics.inputs("normal", (1000,), torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.ops.fastlm.bias_gelu_bwd(x.to(DEVICE), x.to(DEVICE), bias.to(DEVICE)))
    finally:
        torch.set_num_threads(threads)
    if backend == "torch":
        pytest.skip("PyTorch's own sum over rows depends on the number of threads")
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize(
    "x, bias, error, told",
    [
        (torch.zeros(2, 5), torch.zeros(4), ValueError, "bias has C=4, but x has C=5"),
        (torch.zeros(5), torch.zeros(5), ValueError, r"x has shape \(5,\), wanted \(N, C\)"),
        (torch.zeros(2, 5).int(), torch.zeros(5), TypeError, "x is torch.int32"),
        (torch.zeros(2, 5), torch.zeros(5).bfloat16(), TypeError, "bias is torch.bfloat16, wanted float32"),
    ],
)
def test_bad_input(x, bias, error, told):
    with pytest.raises(error, match=told):
        fastlm.bias_gelu(x, bias)


def test_double_backward_is_refused():
    x = torch.randn(2, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(fastlm.bias_gelu(x, torch.zeros(5)).sum(), x, create_graph=True)
