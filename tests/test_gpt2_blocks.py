"""gpt2_blocks against plain PyTorch and fp64, on every backend, and the model that calls it."""

import numerics
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from guard import guarded

import fastlm
from fastlm import dispatch
from fastlm.backends.machine import machine_why_not
from fastlm.measure import cuts, tuned
from fastlm.ops import BLOCK_WEIGHTS

FAMILY = "gpt2_blocks"


def weights_of(C, inner, L=1, dtype=torch.float32, seed=1):
    """The weights of L blocks, large enough that every one of them shows."""
    random, sizes = torch.Generator().manual_seed(seed), {"C": C, "3C": 3 * C, "F": inner}
    found = []
    for shape in list(BLOCK_WEIGHTS.values()) * L:
        shape = [sizes[size] for size in shape.split()]
        found.append((torch.randn(shape, generator=random, dtype=torch.float64) / shape[0] ** 0.5 + 0.1).to(dtype))
    return found


def composition(x, weights, heads, epsilon=1e-5):
    """The same in plain PyTorch."""
    B, T, C = x.shape
    for i in range(0, len(weights), 12):
        ln_1_w, ln_1_b, qkv_w, qkv_b, proj_w, proj_b, ln_2_w, ln_2_b, up_w, up_b, down_w, down_b = weights[i : i + 12]
        qkv = F.layer_norm(x, (C,), ln_1_w, ln_1_b, epsilon) @ qkv_w + qkv_b
        q, k, v = qkv.view(B, T, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + o @ proj_w + proj_b
        h = F.layer_norm(x, (C,), ln_2_w, ln_2_b, epsilon) @ up_w + up_b
        x = x + F.gelu(h, approximate="tanh") @ down_w + down_b
    return x


def results(function, x, weights, dy):
    """y and all gradients of function(x, weights) for the gradient dy."""
    x, weights = x.detach().requires_grad_(), [weight.detach().requires_grad_() for weight in weights]
    y = function(x, weights)
    y.backward(dy.to(y.dtype))
    names = [f"d{i // 12} {name}" for i, name in enumerate(list(BLOCK_WEIGHTS) * (len(weights) // 12))]
    return {"y": y.detach(), "dx": x.grad} | {name: weight.grad for name, weight in zip(names, weights)}


def check(x, weights, heads, backend):
    dy = numerics.inputs("normal", x.shape, x.dtype, seed=9)
    truth = results(lambda x, w: composition(x, w, heads), x.double(), [w.double() for w in weights], dy.double())
    moved = x.to(DEVICE), [w.to(DEVICE) for w in weights], dy.to(DEVICE)
    composed = results(lambda x, w: composition(x, w, heads), *moved)
    for what, got in results(lambda x, w: fastlm.gpt2_blocks(x, w, heads=heads), *moved).items():
        quantity = f"gpt2_blocks {what.split()[-1]}"
        numerics.close(quantity, backend, got.cpu(), composed[what].cpu(), truth[what], backward=what != "y")


# widths around the tiles: 6 or 12 rows, 16 or 32 columns, 256 deep, 48 rows of a block, 64 of attention
SIZES = [
    (1, 1, 1, 1, 1), (2, 5, 12, 3, 7), (1, 47, 32, 2, 33), (3, 16, 64, 4, 256), (1, 49, 48, 1, 130), (2, 70, 24, 3, 31),
    (1, 97, 264, 4, 300), (5, 3, 40, 5, 513),
]


@pytest.mark.parametrize("B, T, C, heads, inner", SIZES)
def test_sizes(backend, B, T, C, heads, inner):
    check(numerics.inputs("normal", (B, T, C), torch.float32), weights_of(C, inner), heads, backend)


def test_blocks_one_after_the_other(backend):
    check(numerics.inputs("normal", (2, 21, 24), torch.float32), weights_of(24, 50, L=3), 2, backend)


@pytest.mark.parametrize("kind", [kind for kind in numerics.KINDS if kind != "equal"])
def test_inputs(backend, kind):
    check(numerics.inputs(kind, (2, 19, 32), torch.float32), weights_of(32, 65), 4, backend)


def test_views(backend):
    x = numerics.inputs("normal", (24, 7, 40), torch.float32).transpose(0, 1)[:3, :, :24]
    weights = [w.t().contiguous().t() if w.dim() == 2 else w.repeat_interleave(2)[::2] for w in weights_of(24, 50)]
    assert not any(tensor.is_contiguous() for tensor in (x, *weights))
    check(x, weights, 3, backend)


@pytest.mark.parametrize("front", [False, True], ids=["end", "front"])
@pytest.mark.parametrize("C, inner", [(12, 7), (20, 33)])
def test_guard_pages(backend, C, inner, front):
    if DEVICE != "cpu":
        pytest.skip("guard pages lie in the memory of the CPU; on a GPU compute-sanitizer does this")
    x = numerics.inputs("normal", (2, 9, C), torch.float32)
    check(guarded(x, front=front), [guarded(w, front=front) for w in weights_of(C, inner)], 2, backend)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_zero_size(backend, shape):
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    weights = [w.to(DEVICE).requires_grad_() for w in weights_of(8, 12, L=2)]
    fastlm.gpt2_blocks(x, weights, heads=2).sum().backward()
    assert x.grad.shape == shape and all((w.grad == 0).all() for w in weights)


def test_same_bits_for_any_number_of_threads(backend):
    if backend == "torch":
        pytest.skip("PyTorch's own sums depend on the number of threads")
    x, weights = numerics.inputs("normal", (2, 130, 32), torch.float32), weights_of(32, 300)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(lambda x, w: fastlm.gpt2_blocks(x, w, heads=2), x.to(DEVICE),
                                 [w.to(DEVICE) for w in weights], x.to(DEVICE)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][what], other[what]) for other in found[1:] for what in other)


def test_a_weight_that_needs_no_gradient_gets_none(backend):
    x, weights = torch.randn(2, 9, 8, device=DEVICE), [w.to(DEVICE) for w in weights_of(8, 12)]
    weights[2].requires_grad_()
    fastlm.gpt2_blocks(x, weights, heads=2).sum().backward()
    assert weights[2].grad is not None and weights[3].grad is None and x.grad is None


def test_nan_is_not_lost(backend):
    x = torch.zeros(2, 40, 8, device=DEVICE)
    x[1, 30, 3] = float("nan")
    y = fastlm.gpt2_blocks(x, [w.to(DEVICE) for w in weights_of(8, 12)], heads=2)
    assert not y[0].isnan().any() and y[1, 30:].isnan().all()


@pytest.mark.parametrize(
    "change, error, told",
    [
        (lambda x, w, h: (x[0], w, h), ValueError, r"x has shape \(5, 8\), wanted \(B, T, C\)"),
        (lambda x, w, h: (x, w[:-1], h), ValueError, "got 11 weights, wanted 12 a block: ln_1.weight"),
        (lambda x, w, h: (x, [], h), ValueError, "got 0 weights"),
        (lambda x, w, h: (x, [*w[:5], w[5][:7], *w[6:]], h), ValueError, "block 0 attn.c_proj.bias has C=7"),
        (lambda x, w, h: (x, [*w[:2], w[2][:, :9], w[3][:9], *w[4:]], h), ValueError, "9 outputs, wanted 3C=24"),
        (lambda x, w, h: (x, w + weights_of(8, 13), h), ValueError, "block 1 has F=13, but block 0 has F=12"),
        (lambda x, w, h: (x, w, 3), ValueError, "heads is 3, which does not divide C=8"),
        (lambda x, w, h: (x.half(), w, h), TypeError, "x is torch.float16, wanted float32"),
        (lambda x, w, h: (x, [*w[:-1], w[-1].double()], h), TypeError, "mlp.c_proj.bias is torch.float64, but x is"),
    ],
)
def test_bad_input(change, error, told):
    x, weights, heads = change(torch.zeros(2, 5, 8), weights_of(8, 12), 2)
    with pytest.raises(error, match=told):
        fastlm.gpt2_blocks(x, weights, heads=heads)


def test_double_backward_is_refused():
    x = torch.randn(1, 3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(fastlm.gpt2_blocks(x, weights_of(8, 12), heads=2).sum(), x, create_graph=True)


# ---- the model


def model_of(**changes):
    torch.manual_seed(3)
    off = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 24, "n_layer": 3, "n_head": 2}
    return fastlm.GPT2(fastlm.GPT2Config(**sizes | off | changes))


needs_kernels = pytest.mark.skipif(
    DEVICE != "cpu" or machine_why_not("cpu") is not None, reason="needs the CPU kernels, and a CPU to run on"
)

@needs_kernels
def test_the_same_bits_however_products_are_cut():
    x, weights, dy = torch.randn(2, 90, 96), weights_of(96, 1100, L=2), torch.randn(2, 90, 96)
    found = []
    for cut in cuts.every("gpt2_blocks"):
        with tuned.trying("gpt2_blocks", cut), fastlm.use(gpt2_blocks="cpu"):
            found.append(results(lambda x, w: fastlm.gpt2_blocks(x, w, heads=3), x, weights, dy))
    assert len(found) == 12
    for other in found[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())


def calls(model, train=True, **forced):
    """The torch ops that a step of a model calls."""
    tokens = torch.arange(20).view(2, 10)
    with fastlm.use(**forced), dispatch.record() as found:
        model.train(train).loss(tokens, tokens).backward()
    return {op for op, _ in found}


@needs_kernels
def test_the_model_takes_whole_blocks():
    assert {"gpt2_blocks_fwd", "gpt2_blocks_bwd"} < calls(model_of())


@needs_kernels
@pytest.mark.parametrize("case", ["dropout", "a part is forced", "hook", "another class", "fp64"])
def test_the_model_takes_the_parts_where_whole_blocks_do_not_serve(case):
    model, forced = model_of(attn_pdrop=0.1) if case == "dropout" else model_of(), {}
    if case == "a part is forced":
        forced = {"attention": "reference"}
    if case == "hook":
        model.transformer.h[1].mlp.register_forward_hook(lambda *_: None)
    if case == "another class":
        model.transformer.h[1].mlp.__class__ = type("Mine", (type(model.transformer.h[1].mlp),), {})
    if case == "fp64":
        model = model.double()
    found = calls(model, **forced)
    assert "attention_qkv_fwd" in found and "gpt2_blocks_fwd" not in found
    if case == "dropout":
        assert "gpt2_blocks_fwd" in calls(model, train=False)


@needs_kernels
@pytest.mark.parametrize("at_once", [1, 2, 3], ids="{} blocks a call".format)
def test_whole_blocks_give_what_the_parts_give(at_once, monkeypatch):
    monkeypatch.setattr("fastlm.fast_path.AT_ONCE", at_once * 12 * 24**2)
    model, tokens = model_of(), torch.arange(20).view(2, 10)

    def step(**forced):
        model.zero_grad()
        with fastlm.use(**forced):
            loss = model.loss(tokens, tokens)
            loss.backward()
        return loss, {name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None}

    (loss, whole), (parts_loss, parts) = step(), step(attention="reference")
    torch.testing.assert_close(loss, parts_loss)
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6, msg=name)
