"""cache_append_ against plain indexing, on every backend; bit for bit, since it only copies."""

import numerics
import pytest
import torch
from conftest import DEVICE
from guard import far_apart, guarded

import fastlm

FAMILY = "cache_append"
B, T, H, D, PAGE, PAGES = 3, 5, 2, 24, 4, 11


def cache(dtype, layout):
    """k_pages, v_pages (PAGES, PAGE, H, D) with the strides of `layout`, all NaN."""
    shape = (PAGES, H, PAGE, D) if layout == "heads first" else (PAGES, PAGE, H, D)
    pages = [torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
    return [cache.transpose(1, 2) for cache in pages] if layout == "heads first" else pages


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["plain", "heads first"])
@pytest.mark.parametrize("positions", ["from 0", "from 3", "with pads", "all pads"])
def test_append(backend, positions, layout, dtype):
    k_pages, v_pages = cache(dtype, layout)
    table = torch.randperm(PAGES, generator=torch.Generator().manual_seed(1))[: B * 3].view(B, 3).int()
    where = torch.arange(T, dtype=torch.int32).expand(B, T).clone()
    if positions == "from 3":
        where += torch.tensor([[3], [0], [6]], dtype=torch.int32)
    elif positions == "with pads":
        where[1, 2:], where[2] = -1, -1
    elif positions == "all pads":
        where[:] = -1
    qkv = numerics.inputs("normal", (B, T, 3, H, D), dtype).to(DEVICE)
    _, k, v = qkv.unbind(2)  # strided, as the model gives them
    wanted = k_pages.cpu().clone(), v_pages.cpu().clone()
    for b in range(B):
        for t in range(T):
            if (p := int(where[b, t])) >= 0:
                wanted[0][table[b, p // PAGE], p % PAGE] = k[b, t].cpu()
                wanted[1][table[b, p // PAGE], p % PAGE] = v[b, t].cpu()
    assert fastlm.cache_append_(k_pages, v_pages, k, v, table.to(DEVICE), where.to(DEVICE)) is None
    for got, want in zip((k_pages, v_pages), wanted):
        assert torch.equal(got.cpu().nan_to_num(99.0), want.nan_to_num(99.0))


@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0)])
def test_zero_size(backend, batch, length):
    k_pages, v_pages = cache(torch.float32, "plain")
    k = torch.zeros(batch, length, H, D, device=DEVICE)
    table = torch.zeros(batch, 3, dtype=torch.int32, device=DEVICE)
    fastlm.cache_append_(k_pages, v_pages, k, k, table, torch.zeros(batch, length, dtype=torch.int32, device=DEVICE))
    assert k_pages.isnan().all() and v_pages.isnan().all()


@pytest.mark.parametrize("front", [False, True], ids=["end", "front"])
def test_guard_pages(backend, front):
    if DEVICE != "cpu":
        pytest.skip("guard pages lie in the memory of the CPU; on a GPU compute-sanitizer does this")
    for head in (1, 24, 65):
        k_pages, v_pages = (guarded(torch.zeros(2, PAGE, H, head), front=front) for _ in range(2))
        k, v = (guarded(torch.ones(1, 2, H, head), front=front) for _ in range(2))
        table = guarded(torch.tensor([[0, 1]], dtype=torch.int32), front=front)
        where = guarded(torch.tensor([[0, 2 * PAGE - 1]], dtype=torch.int32), front=front)
        fastlm.cache_append_(k_pages, v_pages, k, v, table, where)
        assert k_pages.sum() == v_pages.sum() == 2 * H * head


def test_pages_beyond_2_to_the_31(backend):
    if DEVICE != "cpu":
        pytest.skip("made of pages of the CPU that are never touched")
    pages = [far_apart((3, PAGE, H, D), torch.bfloat16) for _ in range(2)]
    k, v = (numerics.inputs("normal", (1, 3 * PAGE, H, D), torch.bfloat16, seed) for seed in range(2))
    where = torch.arange(3 * PAGE, dtype=torch.int32)[None]
    fastlm.cache_append_(*pages, k, v, torch.tensor([[0, 1, 2]], dtype=torch.int32), where)
    for page, new in zip(pages, (k, v)):
        assert torch.equal(page.reshape(new.shape), new)


def arguments(**changes):
    given = {
        "k_pages": torch.zeros(PAGES, PAGE, H, D), "v_pages": torch.zeros(PAGES, PAGE, H, D),
        "k": torch.ones(B, T, H, D), "v": torch.ones(B, T, H, D),
        "block_table": torch.arange(B * 2, dtype=torch.int32).view(B, 2),
        "positions": torch.arange(T, dtype=torch.int32).expand(B, T),
    }
    return {**given, **changes}


@pytest.mark.parametrize(
    "changes, error, told",
    [
        ({"k": torch.ones(B, T, H, D + 1)}, ValueError, "k has D=25, but k_pages has D=24"),
        ({"v_pages": torch.zeros(PAGES, PAGE, D, H).transpose(2, 3)}, ValueError, "v_pages has strides"),
        ({"v": torch.ones(B, T, H, D).half()}, TypeError, "v is torch.float16, but k_pages is torch.float32"),
        ({"positions": torch.arange(T).expand(B, T)}, TypeError, "positions is torch.int64, wanted int32"),
        ({"positions": torch.full((B, T), 8, dtype=torch.int32)}, ValueError, "position 8, wanted < 8"),
        ({"positions": torch.full((B, T), -2, dtype=torch.int32)}, ValueError, "reach down to -2, wanted ≥ -1"),
        ({"block_table": torch.full((B, 2), 11, dtype=torch.int32)}, ValueError, "in page 11, wanted 0 ≤ page < 11"),
    ],
)
def test_bad_input_writes_nothing(changes, error, told):
    given = arguments(**changes)
    with pytest.raises(error, match=told):
        fastlm.cache_append_(**given)
    assert (given["k_pages"] == 0).all() and (given["v_pages"] == 0).all()
