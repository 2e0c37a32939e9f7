"""linear_xent against PyTorch and fp64, on every backend; logits exist for a chunk alone."""

import numerics
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE

import fastlm
from fastlm.backends import chunked, vendor

FAMILY = "linear_xent"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", {"cpu": 16, "cuda": 16})
    monkeypatch.setattr(chunked, "FEW", 0)
    monkeypatch.setattr(chunked, "LARGE", 0)


def operands(N, C, V, dtype, w_dtype=None, kind="normal"):
    h, w = numerics.inputs(kind, (N, C), dtype), numerics.inputs("normal", (V, C), w_dtype or dtype, 1) * C**-0.5
    y = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    if N > 2:
        y[1] = -100
    return h, w, y


def results(function, h, w, y, reduction):
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    loss = function(h, w, y, reduction)
    loss.backward(torch.ones_like(loss))
    return {"loss": loss.detach().reshape(-1), "dh": h.grad, "dw": w.grad}


def composition(h, w, y, reduction):
    return F.cross_entropy((h @ w.to(h.dtype).t()).to(torch.promote_types(h.dtype, torch.float32)), y,
                           reduction=reduction)


def check(h, w, y, backend, reduction):
    truth = results(composition, h.double(), w.to(h.dtype).double(), y, reduction)
    composed = results(composition, h, w, y, reduction)
    got = results(lambda *a: fastlm.linear_xent(*a[:3], reduction=a[3]), h.to(DEVICE), w.to(DEVICE), y.to(DEVICE),
                  reduction)
    for what, value in got.items():
        assert value.dtype == composed[what].dtype, what
        # A loss is made of logits that were rounded to h's dtype.
        held = value if what != "loss" else value.to(h.dtype)
        by = composed[what] if what != "loss" else composed[what].to(h.dtype)
        numerics.close(f"linear_xent {what}", backend, held.cpu(), by, truth[what], backward=what[0] == "d")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("N, C, V", [(1, 3, 1), (5, 7, 11), (16, 8, 97), (17, 32, 65), (33, 8, 37), (20, 8, 128),
                                     (50, 16, 257)])
def test_sizes(backend, N, C, V, dtype, reduction):
    check(*operands(N, C, V, dtype), backend, reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", numerics.DTYPES[1:], ids=str)
def test_wide_weights_have_a_wide_gradient(backend, dtype, reduction):
    check(*operands(40, 24, 129, dtype, torch.float32), backend, reduction)


def test_gpt2s_vocabulary(backend):
    check(*operands(3, 16, 50257, torch.float32), backend, "mean")


def test_a_gradient_of_the_loss_scales_both(backend):
    h, w, y = (t.to(DEVICE) for t in operands(20, 8, 31, torch.float32))
    h.requires_grad_(), w.requires_grad_()
    once = torch.autograd.grad(fastlm.linear_xent(h, w, y), (h, w))
    thrice = torch.autograd.grad(3 * fastlm.linear_xent(h, w, y), (h, w))
    for a, b in zip(once, thrice):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("w_dtype", [torch.float16, torch.float32], ids=str)
def test_fp16_gradients_of_many_rows_are_not_lost(backend, w_dtype, monkeypatch):
    """1/N of a probability is below fp16's smallest numbers, what a gradient scaler makes of it is not."""
    monkeypatch.setattr(chunked, "CHUNK", {"cpu": 128, "cuda": 128})
    part, scaler = 2.0**-8, 2.0**18  # of 2^16 rows, these are 2^8
    h, w, y = operands(2**8, 8, 97, torch.float16, w_dtype)
    truth = results(composition, h.double(), w.half().double(), y, "mean")
    got = results(lambda *a: scaler * fastlm.linear_xent(*a[:3], scale=part), h.to(DEVICE), w.to(DEVICE), y.to(DEVICE),
                  "mean")
    for what in "dh", "dw":
        wanted = scaler * part * truth[what]
        error = (got[what].cpu().double() - wanted).norm() / wanted.norm()
        assert got[what].dtype == (h if what == "dh" else w).dtype and error < 2e-3, (what, error)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.25, 0.0, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)], ids=str)
def test_a_scale_of_the_loss(backend, dtype, reduction, scale):
    """It goes in before the gradient is rounded, and is no number that is read."""
    h, w, y = (t.to(DEVICE) for t in operands(40, 8, 31, dtype))
    given = scale.to(DEVICE) if isinstance(scale, torch.Tensor) else scale
    got = results(lambda *a: fastlm.linear_xent(*a[:3], reduction=a[3], scale=given), h, w, y, reduction)
    wanted = results(lambda *a: fastlm.linear_xent(*a[:3], reduction=a[3]), h, w, y, reduction)
    for what, value in got.items():
        assert value.dtype == wanted[what].dtype
        torch.testing.assert_close(value, wanted[what] * float(scale))
    with torch.no_grad():
        loss = fastlm.linear_xent(h, w, y, reduction=reduction, scale=given)
    torch.testing.assert_close(loss.reshape(-1), got["loss"])


def test_two_backwards_through_one_graph(backend):
    h, w, y = (t.to(DEVICE) for t in operands(20, 8, 31, torch.float32))
    h.requires_grad_(), w.requires_grad_()
    loss = fastlm.linear_xent(h, w, y)
    loss.backward(retain_graph=True)
    first = h.grad.clone(), w.grad.clone()
    loss.backward()
    torch.testing.assert_close((h.grad, w.grad), (2 * first[0], 2 * first[1]))


@pytest.mark.parametrize("missing", ["h", "w"])
def test_one_gradient_alone(backend, missing):
    h, w, y = (t.to(DEVICE) for t in operands(20, 8, 31, torch.float32))
    (w if missing == "h" else h).requires_grad_()
    fastlm.linear_xent(h, w, y).backward()
    assert (h.grad is None) == (missing == "h") and (w.grad is None) == (missing == "w")


def test_without_gradients_the_loss_is_the_same(backend):
    h, w, y = (t.to(DEVICE) for t in operands(20, 8, 31, torch.float32))
    plain = fastlm.linear_xent(h, w, y)
    torch.testing.assert_close(plain, fastlm.linear_xent(h.requires_grad_(), w, y).detach())


def test_all_ignored(backend):
    h, w, _ = (t.to(DEVICE) for t in operands(3, 4, 5, torch.float32))
    y = torch.full((3,), 7, device=DEVICE)
    h.requires_grad_()
    assert fastlm.linear_xent(h, w, y, ignore=7).isnan()
    loss = fastlm.linear_xent(h, w, y, ignore=7, reduction="sum")
    loss.backward()
    assert loss == 0 and (h.grad == 0).all()


def test_wrong_label_below_the_checks(backend):
    """A label that reaches a kernel unchecked gives NaN in its row, also where a padded head has a column for it."""
    h, w, _ = (t.to(DEVICE) for t in operands(20, 8, 31, torch.float32))
    y = torch.arange(20, device=DEVICE)
    y[3], y[17] = 31, -1
    loss, lse = torch.ops.fastlm.linear_xent_fwd(h, w, y, -100)
    assert loss.isnan().nonzero().flatten().tolist() == [3, 17] and lse.isfinite().all()
    total, dh, dw = torch.ops.fastlm.linear_xent_grad(h, w, y, -100, torch.tensor(1 / 34.0))
    assert total.isnan() and dw.isnan().all()
    assert dh.isnan().any(1).nonzero().flatten().tolist() == dh.isnan().all(1).nonzero().flatten().tolist() == [3, 17]


class Softmax:
    """vendor's, which keeps the shapes and distances of the logits it saw, and leaves no NaN in an ignored row."""

    def __init__(self):
        self.seen = []

    def softmax_xent_(self, x, dloss, y, ignore):
        self.seen.append((x.shape, x.stride()))
        loss = vendor.softmax_xent_(x, dloss, y, ignore)
        x.masked_fill_((y == ignore)[:, None], 0.0)
        return loss


def test_a_padded_head():
    """Logits lie a multiple of 64 apart; the columns behind the vocabulary add nothing, whatever h holds."""
    h, w, y = operands(35, 8, 131, torch.bfloat16, torch.float32)
    wanted = chunked.Chunked(vendor).linear_xent_grad(h, w, y, -100, torch.tensor(1 / 34.0))
    softmax = Softmax()
    got = chunked.Chunked(softmax, padded=True).linear_xent_grad(h, w, y, -100, torch.tensor(1 / 34.0))
    assert softmax.seen == [((16, 131), (192, 1))] * 2 + [((3, 131), (192, 1))]
    torch.testing.assert_close(got, wanted)
    assert got[2].shape == w.shape and got[2].is_contiguous() and not got[2]._is_view()
    h[1] = float("inf")  # the row that is ignored
    _, dh, _ = chunked.Chunked(softmax, padded=True).linear_xent_grad(h, w, y, -100, torch.tensor(1 / 34.0))
    assert (dh[1] == 0).all() and torch.equal(dh[2:], got[1][2:])


def test_a_chunk_of_rows_fills_a_gpu(monkeypatch):
    monkeypatch.undo()
    on_gpu, torch_ = chunked.Chunked(None, padded=True), chunked.Chunked(None, padded=True, share=0.25)
    h = torch.empty(1, 1, dtype=torch.bfloat16)
    assert on_gpu._rows(h, 50304) == 16384 and on_gpu._rows(h.float(), 50304) == 8192 and torch_._rows(h, 50304) == 4096
    assert on_gpu._rows(h, 2**30) == 1024 and chunked.Chunked(None)._rows(h, 50257) == 512
    for Vp in (64, 8192, 50304, 256000):
        rows = on_gpu._rows(h, Vp)
        assert rows % 1024 == 0 and rows * Vp * 2 <= chunked.LARGE < (rows + 1024) * Vp * 2


def test_no_value_is_read_on_the_host():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "local_scalar" not in str(function) and "nonzero" not in str(function), function
            return function(*args, **(kwargs or {}))

    h, w, y = operands(35, 8, 131, torch.bfloat16, torch.float32)
    on_gpu = chunked.Chunked(vendor, padded=True)
    with Watch():
        _, lse = on_gpu.linear_xent_fwd(h, w, y, -100)
        on_gpu.linear_xent_bwd(torch.ones(35), h, w, y, lse, -100)
        on_gpu.linear_xent_grad(h, w, y, -100, torch.tensor(1 / 34.0))


def test_zero_rows(backend):
    h, w = torch.randn(0, 4, device=DEVICE, requires_grad=True), torch.randn(5, 4, device=DEVICE, requires_grad=True)
    loss = fastlm.linear_xent(h, w, torch.zeros(0, dtype=torch.int64, device=DEVICE), reduction="sum")
    loss.backward()
    assert loss == 0 and (w.grad == 0).all() and h.grad.shape == (0, 4)


def test_logits_never_exist_as_a_whole(backend):
    """The largest tensor that is made is (V, C), or the logits of a chunk."""
    if backend == "reference":
        pytest.skip("the oracle is written plainly")
    if DEVICE != "cpu":
        pytest.skip("what is counted is the memory of the CPU")
    from torch.profiler import ProfilerActivity, profile

    h, w, y = operands(256, 8, 4096, torch.float32)
    h.requires_grad_(), w.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fastlm.linear_xent(h, w, y).backward()
    made = [event for event in profiler.events() if event.name in ("aten::empty", "aten::new_empty")]
    largest = max(event.cpu_memory_usage for event in made)
    assert 4 * 16 * 4096 <= largest < 4 * 256 * 4096 / 4


@pytest.mark.parametrize(
    "change, error, told",
    [
        ({"w": torch.zeros(5, 3)}, ValueError, "w has C=3, but h has C=4"),
        ({"y": torch.zeros(3, dtype=torch.int64)}, ValueError, "y has N=3, but h has N=2"),
        ({"y": torch.zeros(2)}, TypeError, "y is torch.float32, wanted int64"),
        ({"y": torch.tensor([0, 5])}, ValueError, r"linear_xent: label 5 at \[1\], wanted 0 ≤ label < 5"),
        ({"w": torch.zeros(5, 4).half()}, TypeError, "w is torch.float16, wanted float32"),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'"),
        ({"scale": torch.ones(2)}, ValueError, r"scale is float32 \(2,\) on cpu, wanted a number, or a tensor \(\)"),
        ({"scale": torch.ones((), requires_grad=True)}, ValueError, "scale requires a gradient, but there is none"),
        ({"scale": "one"}, TypeError, "scale is 'one', wanted a number"),
    ],
)
def test_bad_input(change, error, told):
    given = {"h": torch.zeros(2, 4), "w": torch.zeros(5, 4), "y": torch.zeros(2, dtype=torch.int64), **change}
    with pytest.raises(error, match=told):
        fastlm.linear_xent(given.pop("h"), given.pop("w"), given.pop("y"), **given)


def test_double_backward_is_refused():
    h, w, y = operands(4, 4, 5, torch.float32)
    h.requires_grad_()
    for reduction in ("mean", "none"):
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(fastlm.linear_xent(h, w, y, reduction=reduction).sum(), h, create_graph=True)
