"""layer_norm, with and without a residual, against PyTorch and fp64, on every backend."""

import numerics
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from guard import far_apart, guarded

import fastlm
from fastlm.ops.layer_norm import LARGEST_C

FAMILY = "layer_norm"
DTYPE_PAIRS = [(dtype, dtype) for dtype in numerics.DTYPES] + [(torch.bfloat16, torch.float32)]  # of x, of the residual


def results(function, tensors, dy, ds):
    """Outputs and gradients of function(x, weight, bias, residual, x_bias) → (y, s or None)."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    y, s = function(*leaves)
    torch.autograd.backward([y] if s is None else [y, s], [dy.to(y.dtype)] if s is None else [dy.to(y.dtype), ds])
    found = {"y": y.detach(), **({} if s is None else {"s": s.detach()})}
    names = ("dx", "dweight", "dbias", "dresidual", "dx_bias")
    return found | {name: leaf.grad for name, leaf in zip(names, leaves) if leaf is not None}


def composition(dtype):
    def run(x, weight, bias, residual, x_bias):
        s = x if residual is None else x + residual
        s = s if x_bias is None else (x + x_bias + residual).to(residual.dtype)
        y = F.layer_norm(s, s.shape[1:], weight.to(s.dtype), bias.to(s.dtype), 1e-5).to(dtype or s.dtype)
        return y, None if residual is None else s

    return run


def ours(dtype):
    def run(x, weight, bias, residual, x_bias):
        found = fastlm.layer_norm(x, weight, bias, residual=residual, x_bias=x_bias, dtype=dtype)
        return (found, None) if residual is None else found

    return run


def check(x, residual, backend, dtype=None, rides=False):
    weight, bias, x_bias = (numerics.inputs("normal", x.shape[1:], torch.float32, seed) for seed in (2, 3, 6))
    s_dtype = x.dtype if residual is None else residual.dtype
    dy, ds = (numerics.inputs("normal", x.shape, kind, seed) for kind, seed in ((dtype or s_dtype, 4), (s_dtype, 5)))
    tensors = [x, weight, bias, residual, x_bias if rides else None]
    truth = results(composition(torch.float64), [t if t is None else t.double() for t in tensors], dy, ds.double())
    composed = results(composition(dtype), tensors, dy, ds)
    moved = [t if t is None else t.to(DEVICE) for t in tensors]
    for what, got in results(ours(dtype), moved, dy.to(DEVICE), ds.to(DEVICE)).items():
        assert got.dtype == composed[what].dtype, what
        numerics.close(f"layer_norm {what}", backend, got.cpu(), composed[what], truth[what], backward=what[0] == "d")


def operands(kind, N, C, dtypes, seed=0):
    return numerics.inputs(kind, (N, C), dtypes[0], seed), numerics.inputs("normal", (N, C), dtypes[1], seed + 1)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("N, C", [(1, 2), (5, 7), (33, 37), (70, 64), (3, 768), (40, 513), (2, 4096), (2, 5000)])
def test_sizes(backend, N, C, dtypes):
    if backend == "triton" and C > LARGEST_C:
        pytest.skip("too wide for its registers: refused")
    x, residual = operands("normal", N, C, dtypes)
    check(x, None, backend)
    check(x, residual, backend)
    check(x, residual, backend, rides=True)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_row_wider_than_the_registers_is_refused(backend):
    x, w = torch.zeros(2, LARGEST_C + 1, device=DEVICE), torch.zeros(LARGEST_C + 1, device=DEVICE)
    with pytest.raises(fastlm.Refused, match="takes C up to 4096, got 4097"):
        fastlm.layer_norm(x, w, w)
    with fastlm.use(layer_norm=None):
        fastlm.layer_norm(x, w, w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_the_dtype_of_x_and_apart(backend, dtype):
    x = numerics.inputs("normal", (7, 37), dtype).to(DEVICE)
    weight, bias = (numerics.inputs("normal", (74,), dtype, seed).to(DEVICE)[::2] for seed in (1, 2))
    got, wanted = (results(lambda *t: (fastlm.layer_norm(*t[:3]), None), (x, w, b, None, None), x, None)
                   for w, b in ((weight, bias), (weight.float(), bias.float())))
    for what, value in got.items():
        assert value.dtype == dtype, what
        torch.testing.assert_close(value.float(), wanted[what].float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
def test_gradients_with_rows_apart(backend, dtypes):
    dy, s, ds = (numerics.inputs("normal", (11, 80), dtype, seed).to(DEVICE)[:, 3:40]
                 for seed, dtype in enumerate((dtypes[0], dtypes[1], dtypes[1])))
    w = torch.randn(37, device=DEVICE)
    _, _, mean, rstd = torch.ops.fastlm.layer_norm_fwd(s, None, None, w, w, 1e-5, dtypes[0])
    for last in (None, ds):
        near = [t if t is None else t.contiguous() for t in (dy, last, s)]
        apart, wanted = (torch.ops.fastlm.layer_norm_bwd(*t, w, mean, rstd, dtypes[0], True)
                         for t in ((dy, last, s), near))
        for got, value in zip(apart, wanted):
            torch.testing.assert_close(got, value)


def test_rows_beyond_2_to_the_31(backend):
    if DEVICE != "cpu":
        pytest.skip("made of pages of the CPU that are never touched")
    operands = [far_apart((3, 40), torch.bfloat16) for _ in range(3)]
    for seed, operand in enumerate(operands):
        operand.copy_(numerics.inputs("normal", operand.shape, torch.bfloat16, seed))
    w, found = torch.randn(40), []
    for x, residual, dy in (operands, [operand.contiguous() for operand in operands]):
        _, _, mean, rstd = forward = torch.ops.fastlm.layer_norm_fwd(x, residual, w, w, w, 1e-5, x.dtype)
        found.append((*forward, *torch.ops.fastlm.layer_norm_bwd(dy, residual, x, w, mean, rstd, x.dtype, True)))
    assert all(torch.equal(far, near) for far, near in zip(*found))


@pytest.mark.parametrize("kind", ["normal", "scale 30", "offset 100", "outlier", "tiny"])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
def test_inputs(backend, kind, dtypes):
    x, residual = operands(kind, 6, 127, dtypes)
    check(x, None, backend)
    check(x, residual, backend)
    check(x, residual, backend, rides=True)


def test_as_autocast_uses_it(backend):
    x, residual = operands("normal", 40, 96, (torch.bfloat16, torch.float32))
    check(x, residual, backend, dtype=torch.bfloat16)
    check(x, residual, backend, dtype=torch.bfloat16, rides=True)
    check(residual, None, backend, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "offset 100", "outlier"])
def test_the_parts_that_inductor_is_given(kind, dtypes, monkeypatch):
    monkeypatch.setattr(fastlm.ops.module(FAMILY), "left_to_inductor", lambda *_: True)
    x, residual = operands(kind, 6, 127, dtypes)
    check(x, None, "inductor")
    check(x, residual, "inductor")
    check(x, residual, "inductor", rides=True)


def test_equal_values_are_the_bias(backend):
    bias = torch.randn(37, device=DEVICE)
    y = fastlm.layer_norm(torch.full((2, 37), 0.7, device=DEVICE), torch.ones(37, device=DEVICE), bias)
    torch.testing.assert_close(y, bias.expand(2, 37), rtol=0, atol=1e-4)


def test_one_column_is_the_bias(backend):
    x, w = torch.randn(9, 1, device=DEVICE, requires_grad=True), torch.randn(1, device=DEVICE, requires_grad=True)
    y = fastlm.layer_norm(x, w, w)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(y, w.expand(9, 1))
    torch.testing.assert_close((x.grad.abs().max(), w.grad), (0.0 * w[0], 0.0 * w + 9), rtol=0, atol=1e-3)


@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
def test_epsilon(backend, epsilon):
    x, w = torch.randn(3, 20, device=DEVICE), torch.ones(20, device=DEVICE)
    y = fastlm.layer_norm(x, w, 0 * w, epsilon=epsilon)
    torch.testing.assert_close(y, F.layer_norm(x, (20,), w, 0 * w, epsilon))


@pytest.mark.parametrize("cut", ["rows apart", "offset by one", "transposed"])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
def test_views(backend, cut, dtypes):
    cuts = {"rows apart": lambda t: t[:5, :37], "offset by one": lambda t: t[:5, 1:38],
            "transposed": lambda t: t.t()[:5, :37]}
    x, residual = (cuts[cut](t) for t in operands("normal", 40, 64, dtypes))
    check(x, residual, backend)


@pytest.mark.parametrize("used", ["y", "s"])
def test_a_result_that_is_not_used_has_no_gradient(backend, used):
    x, residual, w, b = (torch.randn(*shape, device=DEVICE, requires_grad=True)
                         for shape in ((4, 9), (4, 9), (9,), (9,)))
    y, s = fastlm.layer_norm(x, w, torch.zeros(9, device=DEVICE), residual=residual, x_bias=b)
    (y.square() if used == "y" else s.square()).sum().backward()
    assert torch.equal(x.grad, residual.grad) and (w.grad is None) == (used == "s")
    torch.testing.assert_close(b.grad, x.grad.sum(0))
    if used == "s":
        torch.testing.assert_close(x.grad, 2 * (x + b + residual).detach())


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("C", [2, 7, 37, 130])
@pytest.mark.parametrize("front", [False, True], ids=["end", "front"])
def test_guard_pages(backend, C, front, dtypes):
    if DEVICE != "cpu":
        pytest.skip("guard pages lie in the memory of the CPU; on a GPU compute-sanitizer does this")
    x, residual = (guarded(t, front=front) for t in operands("normal", 3, C, dtypes))
    check(x, residual, backend, rides=True)


def test_zero_rows(backend):
    x, w = torch.randn(0, 5, device=DEVICE, requires_grad=True), torch.randn(5, device=DEVICE, requires_grad=True)
    b = torch.randn(5, device=DEVICE, requires_grad=True)
    y, s = fastlm.layer_norm(x, w, w, residual=x, x_bias=b)
    (y.sum() + s.sum()).backward()
    assert y.shape == s.shape == x.grad.shape == (0, 5) and (w.grad == 0).all() and (b.grad == 0).all()


def test_same_bits_for_any_number_of_threads(backend):
    x, w = torch.randn(200, 300).to(DEVICE), torch.randn(300).to(DEVICE)
    _, s, mean, rstd = torch.ops.fastlm.layer_norm_fwd(x, x, w, w, w, 1e-5, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.ops.fastlm.layer_norm_bwd(x, x, s, w, mean, rstd, torch.float32, True))
    finally:
        torch.set_num_threads(threads)
    if backend == "torch":
        pytest.skip("PyTorch's own sum over rows depends on the number of threads")
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


W = torch.ones(5)


@pytest.mark.parametrize(
    "x, weight, options, error, told",
    [
        (torch.zeros(2, 5), torch.ones(4), {}, ValueError, "weight has C=4, but x has C=5"),
        (torch.zeros(2, 5), W, {"residual": torch.zeros(3, 5)}, ValueError, "residual has N=3, but x has N=2"),
        (torch.zeros(2, 5), W, {"residual": torch.zeros(2, 5).half()}, TypeError, "residual is torch.float16"),
        (torch.zeros(2, 5), W, {"x_bias": W}, ValueError, "x_bias goes with a residual"),
        (torch.zeros(2, 5), W, {"residual": torch.zeros(2, 5), "x_bias": torch.ones(4)}, ValueError,
         "x_bias has C=4, but x has C=5"),
        (torch.zeros(2, 5), W, {"residual": torch.zeros(2, 5), "x_bias": W.double()}, TypeError,
         "x_bias is torch.float64"),
        (torch.zeros(2, 5).long(), W, {}, TypeError, "x is torch.int64"),
        (torch.zeros(2, 5), W, {"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
    ],
)
def test_bad_input(x, weight, options, error, told):
    with pytest.raises(error, match=told):
        fastlm.layer_norm(x, weight, torch.zeros(5), **options)


def test_double_backward_is_refused():
    x = torch.randn(2, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(fastlm.layer_norm(x, W, W).sum(), x, create_graph=True)
