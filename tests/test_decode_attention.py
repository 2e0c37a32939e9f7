"""decode_attention against plain attention over each sequence's own keys, on every backend."""

import numerics
import pytest
import torch
from conftest import DEVICE
from guard import far_apart, guarded
from test_attention import plain

import fastlm
from fastlm import dispatch

FAMILY = "decode_attention"
B, H, PAGE, MAX_PAGES = 4, 3, 16, 5


def make(T, D, dtype, lengths, layout="plain", max_pages=MAX_PAGES):
    """q, pages (NaN where nothing was written), table, lengths, and every sequence's own k, v."""
    B = len(lengths)
    pages = B * max_pages + 2
    shape = (pages, H, PAGE, D) if layout == "heads first" else (pages, PAGE, H, D)
    k_pages, v_pages = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    if layout == "heads first":
        k_pages, v_pages = k_pages.transpose(1, 2), v_pages.transpose(1, 2)
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(0))[: B * max_pages].view(B, max_pages).int()
    q = numerics.inputs("normal", (B, T, H, D + 1), dtype)[..., 1:]
    k, v = (numerics.inputs("normal", (B, max_pages * PAGE, H, D), dtype, seed) for seed in (1, 2))
    for b, length in enumerate(lengths):
        for s in range(length):
            k_pages[table[b, s // PAGE], s % PAGE] = k[b, s]
            v_pages[table[b, s // PAGE], s % PAGE] = v[b, s]
    return q, k_pages, v_pages, table, torch.tensor(lengths, dtype=torch.int32), k, v


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["plain", "heads first"])
@pytest.mark.parametrize("T", [1, 2, 7])
def test_unequal_lengths_and_shuffled_pages(backend, T, layout, dtype):
    lengths = (80, T, 33, 16 + T)
    q, k_pages, v_pages, table, counts, k, v = make(T, 64, dtype, lengths, layout)
    o = fastlm.decode_attention(*(tensor.to(DEVICE) for tensor in (q, k_pages, v_pages, table, counts))).cpu()
    for b, length in enumerate(lengths):
        own = q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], torch.zeros(1, T, H, 64, dtype=dtype)
        composed, truth = plain(*own, True)[0], plain(*(tensor.double() for tensor in own), True)[0]
        numerics.close("decode_attention o", backend, o[b : b + 1], composed, truth)


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 8, 19])
def test_long_sequences(backend, T, dtype):
    """Lengths around the borders at which kernels split them."""
    lengths = (127, 128, 129, 400)
    q, k_pages, v_pages, table, counts, k, v = make(T, 32, dtype, lengths, max_pages=26)
    o = fastlm.decode_attention(*(tensor.to(DEVICE) for tensor in (q, k_pages, v_pages, table, counts))).cpu()
    for b, length in enumerate(lengths):
        own = q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], torch.zeros(1, T, H, 32, dtype=dtype)
        composed, truth = plain(*own, True)[0], plain(*(tensor.double() for tensor in own), True)[0]
        numerics.close("decode_attention o", backend, o[b : b + 1], composed, truth)


@pytest.mark.parametrize("scale", [0.31, -0.31, 0.0], ids=str)
@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 7])
def test_scale(backend, T, dtype, scale):
    lengths = (80, T)
    q, k_pages, v_pages, table, counts, k, v = make(T, 32, dtype, lengths)
    given = (tensor.to(DEVICE) for tensor in (q, k_pages, v_pages, table, counts))
    o = fastlm.decode_attention(*given, scale=scale).cpu()
    for b, length in enumerate(lengths):
        own = q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], torch.zeros(1, T, H, 32, dtype=dtype)
        composed, truth = plain(*own, True, scale)[0], plain(*(tensor.double() for tensor in own), True, scale)[0]
        numerics.close("decode_attention o", backend, o[b : b + 1], composed, truth)


def test_bits_do_not_depend_on_the_batch(backend):
    if backend in ("reference", "torch"):
        pytest.skip("PyTorch's products may sum in another order for another batch")
    q, k_pages, v_pages, table, counts, _, _ = make(1, 64, torch.float32, (300, 5, 129, 256), max_pages=20)
    given = [tensor.to(DEVICE) for tensor in (q, table, counts)]
    k_pages, v_pages = k_pages.to(DEVICE), v_pages.to(DEVICE)
    whole = fastlm.decode_attention(given[0], k_pages, v_pages, *given[1:])
    for b in range(4):
        q, table, counts = (tensor[b : b + 1] for tensor in given)
        assert torch.equal(fastlm.decode_attention(q, k_pages, v_pages, table, counts), whole[b : b + 1])
        used = -(-int(counts) // PAGE)  # a table that ends with the sequence changes nothing
        assert torch.equal(fastlm.decode_attention(q, k_pages, v_pages, table[:, :used], counts), whole[b : b + 1])


@pytest.mark.parametrize("front", [False, True], ids=["end", "front"])
@pytest.mark.parametrize("D", [1, 17, 64])
@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_guard_pages(backend, D, front, dtype):
    """The first sequence ends with the last page's last row, or begins with the first page's first."""
    if DEVICE != "cpu":
        pytest.skip("guard pages lie in the memory of the CPU; on a GPU compute-sanitizer does this")
    pages = torch.arange(6).flip(0) if not front else torch.arange(6)
    table = guarded(pages.view(2, 3).int(), front=front)
    counts = guarded(torch.tensor([48, 16], dtype=torch.int32), front=front)
    q, k_pages, v_pages = (
        guarded(numerics.inputs("normal", shape, dtype), front=front)
        for shape in ((2, 3, H, D), (6, PAGE, H, D), (6, PAGE, H, D))
    )
    assert fastlm.decode_attention(q, k_pages, v_pages, table, counts).isfinite().all()


def test_pages_beyond_2_to_the_31(backend):
    if DEVICE != "cpu":
        pytest.skip("made of pages of the CPU that are never touched")
    pages = [far_apart((3, PAGE, H, 16), torch.bfloat16) for _ in range(2)]
    for seed, page in enumerate(pages):
        page.copy_(numerics.inputs("normal", page.shape, torch.bfloat16, seed))
    q = numerics.inputs("normal", (1, 2, H, 16), torch.bfloat16, 2)
    rest = torch.tensor([[0, 2]], dtype=torch.int32), torch.tensor([2 * PAGE], dtype=torch.int32)
    near = [page.contiguous() for page in pages]
    assert torch.equal(fastlm.decode_attention(q, *pages, *rest), fastlm.decode_attention(q, *near, *rest))


@pytest.mark.parametrize("D", [1, 8, 17, 80, 128, 256])
def test_head_dimensions(backend, D):
    q, k_pages, v_pages, table, counts, k, v = make(1, D, torch.float32, (5, 1, 20, 64))
    given = [tensor.to(DEVICE) for tensor in (q, k_pages, v_pages, table, counts)]
    if (reason := dispatch.why_not("decode_attention", backend, *given, 0.2)) is not None:
        assert D > 128
        with pytest.raises(RuntimeError, match=reason):
            fastlm.decode_attention(*given, scale=0.2)
        return
    o = fastlm.decode_attention(*given, scale=0.2).cpu()
    for b, length in enumerate(counts.tolist()):
        own = q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], torch.zeros(1, 1, H, D)
        truth = plain(*(tensor.double() for tensor in own), True, 0.2)[0]
        numerics.close("decode_attention o", backend, o[b : b + 1], plain(*own, True, 0.2)[0], truth)


def test_more_queries_than_positions(backend):
    """Queries before the first position see nothing and give 0."""
    q, k_pages, v_pages, table, counts, k, v = make(4, 16, torch.float32, (0, 2, 4, 30))
    o = fastlm.decode_attention(*(tensor.to(DEVICE) for tensor in (q, k_pages, v_pages, table, counts))).cpu()
    assert (o[0] == 0).all() and (o[1, :2] == 0).all() and (o[1, 2:] != 0).any()
    torch.testing.assert_close(o[1, 2], v[1, 0])
    assert o.isfinite().all()


@pytest.mark.parametrize("batch, T", [(0, 1), (2, 0)])
def test_zero_size(backend, batch, T):
    q = torch.zeros(batch, T, H, 8, device=DEVICE)
    pages = torch.zeros(3, PAGE, H, 8, device=DEVICE)
    table = torch.zeros(batch, 1, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
    assert fastlm.decode_attention(q, pages, pages, table, counts).shape == q.shape


@pytest.mark.parametrize(
    "changes, error, told",
    [
        ({"lengths": torch.full((B,), 81, dtype=torch.int32)}, ValueError, "reach from 81 to 81, wanted 0 to 80"),
        ({"lengths": torch.full((B,), -1, dtype=torch.int32)}, ValueError, "lengths reach from -1"),
        ({"lengths": torch.full((B,), 3)}, TypeError, "lengths is torch.int64, wanted int32"),
        ({"block_table": torch.full((B, MAX_PAGES), 22, dtype=torch.int32)}, ValueError, r"block_table\[0, 0\] is 22"),
        ({"q": torch.zeros(B, 1, H, 9)}, ValueError, "k_pages has D=8, but q has D=9"),
        ({"k_pages": torch.zeros(22, PAGE, 8, H).transpose(2, 3)}, ValueError, "k_pages has strides"),
        ({"k_pages": torch.zeros(22, PAGE, H, 8).half()}, TypeError, "k_pages is torch.float16"),
    ],
)
def test_bad_input(changes, error, told):
    q, k_pages, v_pages, table, counts, _, _ = make(1, 8, torch.float32, (1, 2, 3, 4))
    given = {"q": q, "k_pages": k_pages, "v_pages": v_pages, "block_table": table, "lengths": counts, **changes}
    with pytest.raises(error, match=told):
        fastlm.decode_attention(**given)
