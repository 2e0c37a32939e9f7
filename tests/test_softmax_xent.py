"""softmax_xent against PyTorch and fp64, on every backend."""

import numerics
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from guard import guarded

import fastlm
from fastlm.backends import reference, vendor

FAMILY = "softmax_xent"
SIZES = (1, 37, 127, 8193, 50257)


def labels(N, V, seed=0):
    y = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))
    if N > 2:
        y[1] = -100
    return y


def truth(x, y):
    """loss (N,) and dx (N, V) in fp64 of the loss's sum."""
    x = x.double().requires_grad_()
    loss = F.cross_entropy(x, y, ignore_index=-100, reduction="none")
    loss.sum().backward()
    return loss.detach(), x.grad


def check(x, y, backend):
    """Forward and backward of logits x (N, V) on the current backend, held to the numerics policy."""
    loss_true, dx_true = truth(x.cpu(), y)
    ours = x.to(DEVICE).detach().requires_grad_()
    loss = fastlm.softmax_xent(ours, y.to(DEVICE), reduction="none")
    loss.sum().backward()
    assert loss.dtype == torch.float32 and ours.grad.dtype == x.dtype
    composed = F.cross_entropy(x.float().cpu(), y, ignore_index=-100, reduction="none")
    lse = torch.logsumexp(x.float().cpu(), 1)
    slope = reference.softmax_xent_bwd(torch.ones_like(lse), x.cpu(), y, lse, -100)
    numerics.close("softmax_xent loss", backend, loss.detach().cpu(), composed, loss_true)
    numerics.close("softmax_xent dx", backend, ours.grad.cpu(), slope, dx_true, backward=True)


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("V", SIZES)
def test_sizes(backend, V, dtype):
    check(numerics.inputs("normal", (5 if V < 50257 else 2, V), dtype), labels(5 if V < 50257 else 2, V), backend)


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("kind", numerics.KINDS)
def test_inputs(backend, kind, dtype):
    check(numerics.inputs(kind, (3, 127), dtype), labels(3, 127), backend)


def test_one_huge_logit_wherever_it_stands(backend):
    """The maximum is that of the whole row: without it, exp overflows."""
    V = 130
    x = numerics.inputs("normal", (V, V), torch.float32)
    check(x + 1e4 * torch.eye(V), torch.arange(V) * 7 % V, backend)


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_masked_logits(backend, dtype):
    x = numerics.inputs("normal", (4, 37), dtype)
    x[:, 5:30] = float("-inf")
    check(x, torch.tensor([0, 1, -100, 36]), backend)


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("cut", ["rows apart", "offset by one", "transposed", "one row repeated"])
def test_views(backend, cut, dtype):
    x = numerics.inputs("normal", (40, 64), dtype)
    views = {
        "rows apart": x[:5, :37], "offset by one": x[:5, 1:38], "transposed": x.t()[:5, :37],
        "one row repeated": x[:1, :37].expand(5, 37),
    }
    check(views[cut], labels(5, 37), backend)


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 7, 37, 1031])
@pytest.mark.parametrize("front", [False, True], ids=["end", "front"])
def test_guard_pages(backend, V, front, dtype):
    if DEVICE != "cpu":
        pytest.skip("guard pages lie in the memory of the CPU; on a GPU compute-sanitizer does this")
    x, y = numerics.inputs("normal", (3, V), dtype), labels(3, V)
    for operand in (guarded(x, front=front), guarded(x, front=front).requires_grad_()):
        fastlm.softmax_xent(operand, guarded(y, front=front), reduction="none")
    check(guarded(x, front=front), guarded(y, front=front), backend)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(backend, reduction):
    x, y = numerics.inputs("normal", (6, 37), torch.float32), labels(6, 37)
    loss = fastlm.softmax_xent(x.to(DEVICE), y.to(DEVICE), reduction=reduction)
    torch.testing.assert_close(loss.cpu(), F.cross_entropy(x, y, reduction=reduction))


def test_all_ignored(backend):
    x = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    y = torch.full((3,), 7, device=DEVICE)
    assert fastlm.softmax_xent(x, y, ignore=7).isnan()
    assert fastlm.softmax_xent(x, y, ignore=7, reduction="sum") == 0
    fastlm.softmax_xent(x, y, ignore=7, reduction="sum").backward()
    assert (x.grad == 0).all()


def test_rows_without_a_distribution(backend):
    x = torch.zeros(4, 5, device=DEVICE)
    x[0], x[1, 2], x[2, 3] = float("-inf"), float("nan"), float("inf")
    loss = fastlm.softmax_xent(x, torch.zeros(4, dtype=torch.int64, device=DEVICE), reduction="none")
    assert loss[:3].isnan().all() and loss[3].isfinite()


def test_wrong_label_below_the_checks(backend):
    """A label that reaches a kernel unchecked gives NaN and is never an address."""
    x = torch.randn(3, 5, device=DEVICE)
    y = torch.tensor([5, -1, 2**40], device=DEVICE)
    loss, lse = torch.ops.fastlm.softmax_xent_fwd(x, y, -100)
    assert loss.isnan().all() and lse.isfinite().all()
    assert torch.ops.fastlm.softmax_xent_bwd(torch.ones_like(lse), x, y, lse, -100).isnan().all()


@pytest.mark.parametrize("dtype", (*numerics.DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("ignore", [-100, 0, 9, -1])
def test_wrong_labels_of_the_torch_backend_are_the_references(ignore, dtype):
    """Its functions gather where F.nll_loss and scatter_ would assert on a GPU, which ends the CUDA context."""
    x, dloss = torch.randn(8, 5).to(DEVICE, dtype), torch.randn(8, device=DEVICE)
    dloss = dloss.to(torch.promote_types(dtype, torch.float32))
    y = torch.tensor([0, 4, 5, -1, 2**40, -(2**40), 9, -100], device=DEVICE)
    outside = ((y < 0) | (y >= 5)) & (y != ignore)
    loss, lse = vendor.softmax_xent_fwd(x, y, ignore)
    torch.testing.assert_close((loss, lse), reference.softmax_xent_fwd(x, y, ignore), equal_nan=True)
    assert torch.equal(loss.isnan(), outside) and (loss[y == ignore] == 0).all()
    dx = vendor.softmax_xent_bwd(dloss, x, y, lse, ignore)
    torch.testing.assert_close(dx, reference.softmax_xent_bwd(dloss, x, y, lse, ignore), equal_nan=True)
    assert torch.equal(dx.isnan(), outside[:, None].expand_as(dx)) and (dx[y == ignore] == 0).all()
    assert all(map(torch.equal, (loss.nan_to_num(7), lse),
                   (value.nan_to_num(7) for value in vendor.softmax_xent_(x, dloss, y, ignore))))
    assert torch.equal(x.nan_to_num(7), dx.nan_to_num(7))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_zero_size(backend, shape):
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    y = torch.full(shape[:1], -100, device=DEVICE)
    loss = fastlm.softmax_xent(x, y, reduction="sum")
    loss.backward()
    assert loss == 0 and x.grad.shape == shape


def test_same_bits(backend):
    x, y = numerics.inputs("normal", (4, 8193), torch.float32).to(DEVICE), labels(4, 8193).to(DEVICE)
    first = torch.ops.fastlm.softmax_xent_fwd(x, y, -100)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, torch.ops.fastlm.softmax_xent_fwd(x, y, -100)))


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("V", (1, 37, 8193, 50257))
def test_the_gradient_over_the_logits(backend, V, dtype):
    x, y = numerics.inputs("normal", (3, V), dtype), labels(3, V)
    _, dx_true = truth(x, y)
    leaf = x.to(DEVICE).requires_grad_()
    logits = leaf * 1
    loss = fastlm.softmax_xent(logits, y.to(DEVICE), reduction="sum", overwrite=True)
    loss.backward()
    lse = torch.logsumexp(x.float(), 1)
    slope = reference.softmax_xent_bwd(torch.ones_like(lse), x, y, lse, -100)
    numerics.close("softmax_xent dx", backend, leaf.grad.cpu(), slope, dx_true, backward=True)
    torch.testing.assert_close(loss.detach().cpu(), F.cross_entropy(x.float(), y, reduction="sum"))
    assert torch.equal(logits.detach(), leaf.grad)  # one buffer serves both


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("apart, first", [(64, 0), (65, 0), (65, 1), (67, 3)])
@pytest.mark.parametrize("V", (1, 37, 61))
def test_the_gradient_over_logits_that_lie_apart(backend, V, apart, first, dtype):
    """Rows any distance apart, of weights of their own; what lies between them stays."""
    around = numerics.inputs("normal", (6, apart + first), dtype).to(DEVICE)
    x, y, dloss = around[:, first : first + V], labels(6, V).to(DEVICE), torch.randn(6, device=DEVICE)
    y[0], y[5] = 0, V - 1
    loss, lse = reference.softmax_xent_fwd(x.float(), y, -100)
    before, wanted = around.clone(), reference.softmax_xent_bwd(dloss, x.double(), y, lse.double(), -100)
    torch.testing.assert_close(torch.ops.fastlm.softmax_xent_(x, dloss, y, -100), (loss, lse))
    numerics.close("softmax_xent dx", backend, x.cpu(), wanted.to(dtype).cpu(), wanted.cpu(), backward=True)
    around[:, first : first + V] = before[:, first : first + V]
    assert torch.equal(around, before)


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("V", [7, 37, 1031])
@pytest.mark.parametrize("front", [False, True], ids=["end", "front"])
def test_guard_pages_around_what_is_overwritten(backend, V, front, dtype):
    if DEVICE != "cpu":
        pytest.skip("guard pages lie in the memory of the CPU; on a GPU compute-sanitizer does this")
    x, y = guarded(numerics.inputs("normal", (3, V), dtype), front=front), guarded(labels(3, V), front=front)
    torch.ops.fastlm.softmax_xent_(x, guarded(torch.ones(3), front=front), y, -100)
    assert x.isfinite().all()


def test_one_huge_logit_wherever_it_stands_when_overwritten(backend):
    V = 130
    x = numerics.inputs("normal", (V, V), torch.float32) + 1e4 * torch.eye(V)
    y = torch.arange(V) * 7 % V
    loss_true, dx_true = truth(x, y)
    loss, _ = torch.ops.fastlm.softmax_xent_(over := x.to(DEVICE), torch.ones(V, device=DEVICE), y.to(DEVICE), -100)
    torch.testing.assert_close(loss.cpu(), loss_true.float())
    torch.testing.assert_close(over.cpu(), dx_true.float())


def test_labels_below_the_checks_when_overwritten(backend):
    """A wrong label gives NaN in its row; `ignore` may be a number of the vocabulary."""
    if backend == "reference":
        pytest.skip("the oracle is held to its own tests")
    x = torch.randn(5, 70, device=DEVICE)
    y = torch.tensor([70, -1, 2**40, 7, 8], device=DEVICE)
    loss, lse = torch.ops.fastlm.softmax_xent_(x, torch.ones(5, device=DEVICE), y, 7)
    assert loss[:3].isnan().all() and loss[3] == 0 and loss[4] > 0 and lse.isfinite().all()
    assert x[:3].isnan().all() and (x[3] == 0).all() and x[4].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_without_a_distribution_when_overwritten(backend, value):
    """NaN everywhere, but where the row is ignored."""
    if backend in ("torch", "reference"):
        pytest.skip("compositions, in which an ignored row's NaN stays")
    x = torch.randn(2, 37, device=DEVICE)
    x[:, 5] = value
    if value < 0:
        x[:] = value
    y = torch.tensor([3, -100], device=DEVICE)
    loss, _ = torch.ops.fastlm.softmax_xent_(x, torch.ones(2, device=DEVICE), y, -100)
    assert loss[0].isnan() and loss[1] == 0 and x[0].isnan().any() and (x[1] == 0).all()


def test_overwriting_and_what_comes_before_and_behind(backend):
    x, y = torch.randn(6, 37, device=DEVICE, requires_grad=True), labels(6, 37).to(DEVICE)
    wanted = torch.autograd.grad(5 * fastlm.softmax_xent(x * 2, y), x)
    torch.testing.assert_close(torch.autograd.grad(5 * fastlm.softmax_xent(x * 2, y, overwrite=True), x), wanted)
    logits = x * 2
    with torch.no_grad():  # nothing to write
        assert fastlm.softmax_xent(logits, y, overwrite=True) == fastlm.softmax_xent(x * 2, y)
        assert torch.equal(logits, x * 2)


def test_fp16_gradients_of_many_rows_are_not_lost_when_overwritten(backend):
    """1/N of a probability is below fp16's smallest numbers, what a gradient scaler makes of it is not."""
    N, scaler = 512, 2.0**16
    x, y = numerics.inputs("normal", (N, 1031), torch.float16), torch.arange(N)
    wide = (x.double() / 16).requires_grad_()
    wanted = torch.autograd.grad(scaler * F.cross_entropy(wide, y), wide)[0]
    logits = (x.to(DEVICE) / 16).requires_grad_()
    got = torch.autograd.grad(scaler * fastlm.softmax_xent(logits * 1, y.to(DEVICE), overwrite=True), logits)[0]
    others = torch.ones_like(wanted).scatter_(1, y[:, None], 0.0)  # than the label, whose gradient is far larger
    assert ((got.cpu().double() - wanted) * others).norm() / (wanted * others).norm() < 2e-3
    ignored = torch.full((3,), -100, device=DEVICE)
    loss = fastlm.softmax_xent(logits[:3] * 1, ignored, overwrite=True)
    assert loss.isnan() and (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_the_default_device_is_no_part_of_it():
    found = []
    for device in (DEVICE, "meta"):
        x = torch.arange(20.0, device=DEVICE).view(4, 5).requires_grad_()
        y = torch.tensor([0, 1, 2, 3], device=DEVICE)
        with torch.device(device):
            loss = fastlm.softmax_xent(x * 1, y, overwrite=True)
        found.append((loss.detach(), *torch.autograd.grad(loss, x)))
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_logits_that_somebody_else_needs_are_not_overwritten_silently():
    x = torch.randn(3, 5, requires_grad=True)
    logits = x * 2
    other = logits.exp().sum() + (logits * logits).sum()  # keeps the logits for its backward
    loss = fastlm.softmax_xent(logits, torch.tensor([0, 1, 2]), overwrite=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + loss).backward()
    with pytest.raises(ValueError, match="x is a leaf, whose values would be lost"):
        fastlm.softmax_xent(x, torch.tensor([0, 1, 2]), overwrite=True)
    with pytest.raises(ValueError, match="overwrite=True needs reduction 'mean' or 'sum', got 'none'"):
        fastlm.softmax_xent(x * 1, torch.tensor([0, 1, 2]), overwrite=True, reduction="none")


def test_labels_are_checked():
    with pytest.raises(ValueError, match=r"label 5 at \[1\], wanted 0 ≤ label < 5"):
        fastlm.softmax_xent(torch.zeros(2, 5), torch.tensor([0, 5]))


@pytest.mark.parametrize(
    "x, y, options, error, told",
    [
        (torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64), {}, ValueError, "y has N=3, but x has N=2"),
        (torch.zeros(5), torch.zeros(1, dtype=torch.int64), {}, ValueError, r"x has shape \(5,\), wanted \(N, V\)"),
        (torch.zeros(2, 5), torch.zeros(2), {}, TypeError, "y is torch.float32, wanted int64"),
        (torch.zeros(2, 5).int(), torch.zeros(2, dtype=torch.int64), {}, TypeError, "x is torch.int32, wanted float32"),
        ([[1.0]], torch.zeros(1, dtype=torch.int64), {}, TypeError, "x is list, wanted a tensor"),
        (torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), {"reduction": "avg"}, ValueError, "reduction is 'avg'"),
        (torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64, device="meta"), {}, ValueError, "y is on meta"),
    ],
)
def test_bad_input(x, y, options, error, told):
    with pytest.raises(error, match=told):
        fastlm.softmax_xent(x, y, **options)


def test_double_backward_is_refused():
    x = torch.randn(2, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(fastlm.softmax_xent(x, torch.tensor([0, 1])), x, create_graph=True)
