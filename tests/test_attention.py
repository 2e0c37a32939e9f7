"""attention and attention_qkv against PyTorch's plain composition and fp64, on every backend."""

import itertools
import re

import numerics
import pytest
import torch
from conftest import DEVICE, GPU
from guard import far_apart, guarded

import fastlm
from fastlm import dispatch
from fastlm.backends import reference
from fastlm.backends.philox import keep_mask, philox

kernels = pytest.importorskip("fastlm.kernels.attention", reason="triton is not installed")
FAMILY = "attention"
SEED = [123, 7, 3, 5]
SHAPES = [  # T, S, causal
    (1, 1, True), (7, 7, True), (63, 63, True), (64, 64, True), (130, 130, True), (65, 200, True), (200, 65, True),
    (130, 131, True), (70, 90, "top-left"), (90, 70, "top-left"), (9, 70, False),
]


def operands(B, T, S, H, D, dtype, seed=0):
    """q, k, v cut from one packed tensor, D not whole rows of it, and do."""
    packed = numerics.inputs("normal", (B, max(T, S), 3, H, D + 3), dtype, seed)
    cut = packed[..., 1 : D + 1]
    return cut[:, :T, 0], cut[:, :S, 1], cut[:, :S, 2], numerics.inputs("normal", (B, T, H, D), dtype, seed + 1)


def plain(q, k, v, do, causal, scale=None, mask=None):
    """o, lse, dq, dk, dv by autograd through the plain composition, in the operands' dtype."""
    q, k, v = (tensor.detach().clone().requires_grad_() for tensor in (q, k, v))
    (T, D), S = (q.shape[1], q.shape[3]), k.shape[1]
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (D**-0.5 if scale is None else scale)
    if causal:
        seen = torch.ones(T, S, dtype=torch.bool).tril(0 if causal == "top-left" else S - T)
        scores = scores.masked_fill(~seen, float("-inf"))
    p = torch.softmax(scores, -1).nan_to_num(0.0)
    if mask is not None:
        p = p * mask
    o = torch.einsum("bhts,bshd->bthd", p, v)
    o.backward(do)
    return o.detach(), torch.logsumexp(scores.detach().float(), -1), q.grad, k.grad, v.grad


def refused(backend, q, dropout=0.0):
    """Whether the backend cannot attend to q; then the call has raised its sentence."""
    seed = torch.tensor(SEED, device=DEVICE) if dropout else None
    q = q.to(DEVICE)
    reason = dispatch.why_not("attention_fwd", backend, q, q, q, 1, 1.0, dropout, seed)
    if reason is not None:
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            fastlm.attention(q, q, q, dropout=dropout, seed=seed)
    return reason is not None


def plainest(backend):
    """The dtype with the least rounding that a backend takes."""
    return torch.float16 if backend.startswith("cuda") else torch.float32


def unluckiest(q, k, v, do, scale, truth):
    """dq, dk, dv of the composition that, like the op, has only lse in fp32 to get p back from, with lse rounded to
    either side: of each what is furthest from the truth. Scores are huge here, and luck would decide.
    """
    o, lse = reference.attention_fwd(q, k, v, 1, scale, 0.0, None)
    sides = [lse, *(torch.nextafter(lse, torch.full_like(lse, end)) for end in (-torch.inf, torch.inf))]
    found = [reference.attention_bwd(do, q, k, v, o, side, 1, scale, 0.0, None) for side in sides]
    return [max(of_one, key=lambda got, true=true: float((got.double() - true).abs().max()))
            for of_one, true in zip(zip(*found), truth)]


def check(backend, q, k, v, do, causal=True, *, scale=None, dropout=0.0, packed=False, saves_lse=False):
    if refused(backend, q, dropout):
        return
    mask = None
    if dropout:
        drop = round(dropout * 256)
        kept = keep_mask(torch.tensor(SEED), q.shape[0], q.shape[2], q.shape[1], k.shape[1], drop)
        mask = kept * (256 / (256 - drop))
    truth = plain(*(tensor.double() for tensor in (q, k, v, do)), causal, scale, mask)
    composed = plain(q, k, v, do, causal, scale, None if mask is None else mask.to(q.dtype))
    if saves_lse:
        composed = (*composed[:2], *unluckiest(q, k, v, do, scale, truth[2:]))
    seed = torch.tensor(SEED, device=DEVICE) if dropout else None
    options = dict(causal=causal, scale=scale, dropout=dropout, seed=seed, return_lse=True)
    if packed:
        qkv = torch.stack([q, k, v], dim=2).to(DEVICE).requires_grad_()
        o, lse = fastlm.attention_qkv(qkv, **options)
        o.backward(do.to(DEVICE))
        got = o.detach(), lse, *qkv.grad.unbind(2)
    else:
        ours = [tensor.to(DEVICE).detach().requires_grad_() for tensor in (q, k, v)]
        o, lse = fastlm.attention(*ours, **options)
        o.backward(do.to(DEVICE))
        got = o.detach(), lse, *(tensor.grad for tensor in ours)
    assert o.dtype == q.dtype and o.is_contiguous() and lse.dtype == torch.float32
    for name, mine, theirs, true in zip(("o", "lse", "dq", "dk", "dv"), got, composed, truth):
        # A single key has weight 1 whatever the scores: then dq and dk are 0 but for rounding of do·v.
        if name in ("dq", "dk") and true.abs().max() < 1e-12:
            assert mine.abs().max() <= 8 * torch.finfo(q.dtype).eps * do.abs().max() * v.abs().max() * q.shape[-1]
            continue
        numerics.close(f"attention {name}", backend, mine.cpu(), theirs, true.double(), backward=name[0] == "d")


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("T, S, causal", SHAPES)
def test_shapes(backend, T, S, causal, dtype):
    check(backend, *operands(2, T, S, 3, 64, dtype), causal)


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 8, 17, 40, 80, 128, 256])
def test_head_dimensions(backend, D, dtype):
    check(backend, *operands(1, 33, 33, 2, D, dtype))


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_packed(backend, dtype):
    check(backend, *operands(2, 70, 70, 3, 32, dtype), packed=True)


@pytest.mark.parametrize("scale", [0.31, -0.31, 0.0], ids=str)
@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_scale(backend, scale, dtype):
    check(backend, *operands(2, 90, 70, 2, 32, dtype), scale=scale)


@pytest.mark.parametrize("kind", ["scale 30", "offset 100", "equal", "tiny"])
def test_inputs(backend, kind):
    if backend == "torch":
        pytest.skip("PyTorch's own kernel rounds more where scores are huge; it is the vendor's, not ours to mend")
    shape, dtype = (1, 40, 2, 16), plainest(backend)
    q, k, v = (numerics.inputs(kind, shape, dtype, seed) for seed in range(3))
    check(backend, q, k, v, numerics.inputs("normal", shape, dtype, 3), scale=0.05, saves_lse=True)


@pytest.mark.parametrize("T, S, causal", [(65, 65, True), (30, 70, True), (70, 30, True), (20, 90, False)])
@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_dropout(backend, T, S, causal, dtype):
    check(backend, *operands(2, T, S, 3, 16, dtype), causal, dropout=0.25)


def test_dropout_mask_bit_for_bit(backend):
    """With v the unit vectors, o is the dropped weights themselves: where o is 0 is the mask."""
    if backend == "torch":
        pytest.skip("torch draws its own mask")
    S, options = 64, {"device": DEVICE, "dtype": plainest(backend)}
    q, k = torch.zeros(2, S, 2, S, **options), torch.zeros(2, S, 2, S, **options)
    v = torch.eye(S, **options)[None, :, None].expand(2, S, 2, S)
    o = fastlm.attention(q, k, v, causal=False, dropout=0.3, seed=torch.tensor(SEED, device=DEVICE))  # (B, T, H, S)
    kept = keep_mask(torch.tensor(SEED), 2, 2, S, S, round(0.3 * 256))  # (B, H, T, S)
    assert torch.equal(o.cpu().permute(0, 2, 1, 3) != 0, kept)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("tile", [(16, 32), (32, 16), (128, 64)], ids=str)
def test_dropout_mask_does_not_depend_on_tiles(backend, tile, monkeypatch):
    monkeypatch.setattr("fastlm.kernels.attention._config", lambda *_: (*tile, 4, 1))
    test_dropout_mask_bit_for_bit(backend)
    check(backend, *operands(1, 45, 70, 2, 16, torch.float32), dropout=0.25)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("T, S, causal", [(130, 130, True), (65, 200, True), (200, 65, True), (90, 70, "top-left")])
def test_descriptors(backend, T, S, causal, dtype, monkeypatch):
    """The path of compute capability 10; the operands' rows lie 16 bytes apart, as the copy engine wants them."""
    if GPU and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("this GPU has no copy engine that takes descriptors")
    monkeypatch.setattr("fastlm.kernels.attention._capability", lambda q: (10, 0))
    packed = numerics.inputs("normal", (2, max(T, S), 3, 2, 32), dtype)
    q, k, v = packed[:, :T, 0], packed[:, :S, 1], packed[:, :S, 2]
    seen = []
    describable = kernels._describable
    monkeypatch.setattr(kernels, "_describable", lambda *a: seen.append(describable(*a)) or seen[-1])
    check(backend, q, k, v, numerics.inputs("normal", (2, T, 2, 32), dtype, 1), causal)
    assert seen == [True, True]
    seen.clear()
    check(backend, *operands(1, 9, 9, 1, 32, dtype))  # rows of 35 elements
    assert seen == [False, False]
    assert not describable((9, 0), q, k, v)


@pytest.mark.parametrize("front", [False, True], ids=["end", "front"])
@pytest.mark.parametrize("T, S, D", [(1, 1, 8), (7, 7, 17), (65, 70, 64), (70, 33, 80)])
@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_guard_pages(backend, T, S, D, front, dtype):
    if DEVICE != "cpu":
        pytest.skip("guard pages lie in the memory of the CPU; on a GPU compute-sanitizer does this")
    q, k, v = (guarded(numerics.inputs("normal", (1, n, 2, D), dtype), front=front) for n in (T, S, S))
    if refused(backend, q):
        return
    do = guarded(numerics.inputs("normal", (1, T, 2, D), dtype, 1), front=front)
    o, lse = torch.ops.fastlm.attention_fwd(q, k, v, 1, 0.2, 0.0, None)
    o, lse = guarded(o, front=front), guarded(lse, front=front)
    torch.ops.fastlm.attention_bwd(do, q, k, v, o, lse, 1, 0.2, 0.0, None)


def test_rows_beyond_2_to_the_31(backend):
    if DEVICE != "cpu":
        pytest.skip("made of pages of the CPU that are never touched")
    operands = [far_apart((3, 5, 2, 16), torch.bfloat16) for _ in range(4)]
    for seed, operand in enumerate(operands):
        operand.copy_(numerics.inputs("normal", operand.shape, torch.bfloat16, seed))
    results = []
    for q, k, v, do in (operands, [operand.contiguous() for operand in operands]):
        o, lse = torch.ops.fastlm.attention_fwd(q, k, v, 1, 0.2, 0.0, None)
        results.append((o, lse, *torch.ops.fastlm.attention_bwd(do, q, k, v, o, lse, 1, 0.2, 0.0, None)))
    assert all(torch.equal(far, near) for far, near in zip(*results))


def test_dropout_of_a_batch_is_that_of_its_parts(backend):
    if backend == "torch":
        pytest.skip("torch draws its own mask")
    q, k, v, _ = (tensor.to(DEVICE) for tensor in operands(4, 40, 40, 2, 16, plainest(backend)))
    seed = torch.tensor([1, 2, 3, 10], device=DEVICE)
    whole = fastlm.attention(q, k, v, dropout=0.5, seed=seed)
    later = fastlm.attention(q[2:], k[2:], v[2:], dropout=0.5, seed=torch.tensor([1, 2, 3, 12], device=DEVICE))
    torch.testing.assert_close(whole[2:], later)


@pytest.mark.parametrize("B, T, S, H", [(0, 3, 3, 2), (2, 0, 3, 2), (2, 0, 0, 2), (1, 3, 3, 0)])
def test_zero_size(backend, B, T, S, H):
    q, k, v = (
        torch.randn(B, n, H, 8, device=DEVICE, dtype=plainest(backend), requires_grad=True) for n in (T, S, S)
    )
    o = fastlm.attention(q, k, v)
    o.sum().backward()
    assert o.shape == q.shape and q.grad.shape == q.shape and k.grad.shape == k.shape


def test_no_keys(backend):
    q = torch.randn(1, 3, 2, 8, device=DEVICE, dtype=plainest(backend))
    k = torch.randn(1, 0, 2, 8, device=DEVICE, dtype=plainest(backend))
    o, lse = fastlm.attention(q, k, k, return_lse=True)
    assert (o == 0).all() and (lse == float("-inf")).all()


def test_nan_is_not_hidden(backend):
    if backend == "torch" and DEVICE == "cpu":
        pytest.skip("PyTorch's own attention on the CPU turns a query of NaN into 0")
    q, k, v, _ = operands(1, 5, 5, 1, 8, plainest(backend))
    q = q.clone()
    q[0, 2] = float("nan")
    o = fastlm.attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE))
    assert o[0, 2].isnan().all() and o[0, :2].isfinite().all()


def test_same_bits(backend):
    q, k, v, do = (tensor.to(DEVICE) for tensor in operands(2, 130, 130, 3, 32, plainest(backend)))
    results = []
    for _ in range(3):
        o, lse = torch.ops.fastlm.attention_fwd(q, k, v, 1, 0.2, 0.0, None)
        results.append((o, lse, *torch.ops.fastlm.attention_bwd(do, q, k, v, o, lse, 1, 0.2, 0.0, None)))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result))


@pytest.mark.parametrize("B, H", [(1, 1), (2, 3)])
def test_cpu_bits_do_not_depend_on_threads(B, H):
    if dispatch.why_not("attention_fwd", "cpu") is not None:
        pytest.skip(dispatch.why_not("attention_fwd", "cpu"))
    q, k, v, do = operands(B, 200, 300, H, 32, torch.float32)
    former, results = torch.get_num_threads(), []
    try:
        with fastlm.use(attention="cpu"):
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                o, lse = torch.ops.fastlm.attention_fwd(q, k, v, 1, 0.2, 0.0, None)
                results.append((o, lse, *torch.ops.fastlm.attention_bwd(do, q, k, v, o, lse, 1, 0.2, 0.0, None)))
    finally:
        torch.set_num_threads(former)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result))


def test_philox_known_answers():
    """The vectors that Random123 publishes for philox4x32 with 10 rounds."""
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, key, wanted in known:
        words = philox([torch.tensor(word) for word in counter], [torch.tensor(word) for word in key])
        assert tuple(int(word) for word in words) == wanted


def test_reference_gradients():
    torch.manual_seed(0)
    shapes = [(5, 5, 1), (3, 6, 1), (6, 3, 1), (4, 6, 2), (3, 4, 0)]
    for (T, S, causal), dropout in itertools.product(shapes, [0, 0.25]):
        q, k, v = (torch.randn(2, n, 2, 2, dtype=torch.float64, requires_grad=True) for n in (T, S, S))
        seed = torch.tensor(SEED)

        def attend(q, k, v, causal=causal, dropout=dropout, seed=seed):
            wanted = {0: False, 1: True, 2: "top-left"}[causal]
            return fastlm.attention(q, k, v, causal=wanted, dropout=dropout, seed=seed)

        with fastlm.use("reference"):
            assert torch.autograd.gradcheck(attend, (q, k, v))
    assert reference.attention_fwd(q, k, v, 0, 0.5, 0.0, None)[0].shape == q.shape


Q = torch.zeros(2, 5, 3, 8)


@pytest.mark.parametrize(
    "call, error, told",
    [
        (lambda: fastlm.attention(Q, Q[..., :4], Q), ValueError, "k has D=4, but q has D=8"),
        (lambda: fastlm.attention(Q, Q, Q[:1]), ValueError, "v has B=1, but q has B=2"),
        (lambda: fastlm.attention(Q[0], Q, Q), ValueError, r"q has shape \(5, 3, 8\), wanted \(B, T, H, D\)"),
        (lambda: fastlm.attention(Q, Q.half(), Q), TypeError, "k is torch.float16, but q is torch.float32"),
        (lambda: fastlm.attention(Q, Q, Q, causal="left"), ValueError, "causal is 'left'"),
        (lambda: fastlm.attention(Q, Q, Q, dropout=1.0), ValueError, "dropout is 1.0, wanted 0 ≤ dropout < 1"),
        (lambda: fastlm.attention(Q, Q, Q, dropout=0.1), ValueError, "dropout=0.1 needs seed"),
        (lambda: fastlm.attention(Q, Q, Q, dropout=0.1, seed=torch.zeros(4)), ValueError, "seed is torch.float32"),
        (lambda: fastlm.attention_qkv(Q), ValueError, r"qkv has shape .* wanted \(B, T, 3, H, D\)"),
        (lambda: fastlm.attention_qkv(torch.zeros(1, 2, 4, 3, 8)), ValueError, r"wanted \(B, T, 3, H, D\)"),
    ],
)
def test_bad_input(call, error, told):
    with pytest.raises(error, match=told):
        call()
