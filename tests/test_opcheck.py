"""Every op as torch sees it: opcheck, gradcheck, torch.compile."""

import functools

import pytest
import torch
import torch._dynamo.testing
from conftest import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
import fastlm.ops
from fastlm import dispatch
from fastlm.dispatch.table import TABLE
from fastlm.ops import BLOCK_WEIGHTS

torch.manual_seed(0)


def qkv(B=2, T=5, S=None, H=2, D=8, layout="cut"):
    """q, k, v: cut from one packed tensor, permuted, or offset by an element."""
    S = T if S is None else S
    if 0 in (B, T):  # torch's checker cannot copy a strided tensor of size 0
        return tuple(torch.randn(B, n, H, D, device=DEVICE) for n in (T, S, S))
    if layout == "cut":
        packed = torch.randn(B, max(T, S), 3, H, D, device=DEVICE)
        return packed[:, :T, 0], packed[:, :S, 1], packed[:, :S, 2]
    if layout == "permuted":
        return tuple(torch.randn(B, H, n, D, device=DEVICE).transpose(1, 2) for n in (T, S, S))
    return tuple(torch.randn(B, n, H, D + 1, device=DEVICE)[..., 1:] for n in (T, S, S))


def samples():
    """(op, arguments) of every torch op on contiguous, permuted, offset and zero-size operands."""
    y = torch.tensor([0, 4, -100], device=DEVICE)
    for x in (torch.randn(3, 7), torch.randn(3, 9)[:, 1:8], torch.randn(3, 14)[:, :7], torch.zeros(0, 7)):
        x = x.to(DEVICE)
        labels = y[: len(x)]
        loss, lse = torch.ops.fastlm.softmax_xent_fwd(x, labels, -100)
        yield "softmax_xent_fwd", (x, labels, -100)
        yield "softmax_xent_bwd", (torch.ones_like(loss), x, labels, lse, -100)
        yield "softmax_xent_", (x, torch.ones_like(loss), labels, -100)
        bias, w = torch.randn(7, device=DEVICE), torch.randn(5, 7, device=DEVICE)
        yield "bias_gelu_fwd", (x, bias)
        yield "bias_gelu_bwd", (x, x, bias)
        for residual, dtype in ((None, torch.float32), (x, torch.float32), (x, torch.bfloat16)):
            x_bias = None if residual is None else bias
            y_, s, mean, rstd = torch.ops.fastlm.layer_norm_fwd(x, residual, x_bias, bias, bias, 1e-5, dtype)
            yield "layer_norm_fwd", (x, residual, x_bias, bias, bias, 1e-5, dtype)
            yield "layer_norm_bwd", (y_, residual, x if residual is None else s, bias, mean, rstd, torch.float32,
                                     x_bias is not None)
        h = x.contiguous()
        yield "linear_xent_fwd", (h, w, labels, -100)
        yield "linear_xent_bwd", (torch.ones_like(loss), h, w, labels, lse, -100)
        for factor in (torch.tensor(0.25, device=DEVICE), None):
            yield "linear_xent_grad", (h, w, labels, -100, factor)
    sizes = {"C": 6, "3C": 18, "F": 10}
    weights = [torch.randn(*(sizes[size] for size in shape.split()), device=DEVICE)
               for _ in range(2) for shape in BLOCK_WEIGHTS.values()]
    for B, T in ((2, 3), (0, 3)):
        x = torch.randn(B, T, 6, device=DEVICE)
        y_, *saved = torch.ops.fastlm.gpt2_blocks_fwd(x, weights, 2, 1e-5)
        yield "gpt2_blocks_fwd", (x, weights, 2, 1e-5)
        yield "gpt2_blocks_bwd", (y_, x, saved, weights, 2)
    flat = [torch.rand(9, device=DEVICE) for _ in range(4)]
    for scale, rates in ((None, None), (torch.tensor(0.5, device=DEVICE), torch.ones(3, device=DEVICE))):
        yield "adamw_", (*flat, scale, rates, 2, 1e-3, 0.9, 0.95, 1e-8, 0.1)
    yield "grad_norm", (flat[0],)
    options = [(1, 0.3, 0.0, None), (0, 0.3, 0.0, None), (2, 0.3, 0.25, torch.tensor([1, 2, 3, 4], device=DEVICE))]
    shapes = [{"layout": layout} for layout in ("cut", "permuted", "offset")] + [{"B": 0}, {"T": 3, "S": 6}, {"T": 0}]
    for shape in shapes:
        for option in options:
            q, k, v = qkv(**shape)
            o, lse = torch.ops.fastlm.attention_fwd(q, k, v, *option)
            yield "attention_fwd", (q, k, v, *option)
            yield "attention_bwd", (torch.randn_like(o), q, k, v, o, lse, *option)
            if "S" not in shape:
                packed = torch.stack([q, k, v], 2)
                yield "attention_qkv_fwd", (packed, *option)
                yield "attention_qkv_bwd", (torch.randn_like(o), packed, o, lse, *option)
    for B, T in ((2, 1), (2, 3), (0, 1), (2, 0)):
        for heads_first in (False, True):
            pages = [torch.randn(5, 4, 2, 8, device=DEVICE) for _ in range(2)]
            if heads_first:
                pages = [torch.randn(5, 2, 4, 8, device=DEVICE).transpose(1, 2) for _ in range(2)]
            table = torch.tensor([[4, 1], [0, 2]], dtype=torch.int32, device=DEVICE)[:B]
            q, k, v = qkv(B, T)
            lengths = torch.tensor([7, 4], dtype=torch.int32, device=DEVICE)[:B]
            where = torch.arange(T, dtype=torch.int32, device=DEVICE).expand(B, T)
            yield "decode_attention", (q, *pages, table, lengths, 0.3)
            yield "cache_append_", (*pages, k, v, table, where)


class Calls(TorchDispatchMode):
    """Keeps the arguments of every torch op of ours."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastlm":
            self.made.append((function._opname, tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)))
        return function(*args, **(kwargs or {}))

    def __init__(self):
        super().__init__()
        self.made = []


def examples():
    """The calls that every op's own example makes."""
    for family in fastlm.ops.FAMILIES:
        with Calls() as calls:
            fastlm.ops.module(family).example(lambda *shape: torch.randn(shape), lambda x: x.to(DEVICE, torch.float32))
        yield from calls.made


SAMPLES = [*samples(), *examples()]


@pytest.mark.parametrize("op, arguments", SAMPLES, ids=[f"{op}-{i}" for i, (op, _) in enumerate(SAMPLES)])
def test_opcheck(op, arguments):
    torch.library.opcheck(getattr(torch.ops.fastlm, op).default, arguments)


def test_every_op_has_a_sample():
    assert {op for op, _ in SAMPLES} == set(TABLE)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck_softmax_xent(backend):
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 4, -100, 2])
    with fastlm.use(backend):
        for reduction in ("mean", "sum", "none"):
            assert torch.autograd.gradcheck(lambda x, r=reduction: fastlm.softmax_xent(x, y, reduction=r), x)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck_of_the_training_ops(backend):
    x, residual, w, b, head = (torch.randn(*shape, dtype=torch.float64, requires_grad=True)
                               for shape in ((4, 5), (4, 5), (5,), (5,), (7, 5)))
    y = torch.tensor([0, 4, -100, 2])
    with fastlm.use(backend):
        assert torch.autograd.gradcheck(fastlm.bias_gelu, (x, b))
        assert torch.autograd.gradcheck(fastlm.layer_norm, (x, w, b))
        assert torch.autograd.gradcheck(lambda *t: fastlm.layer_norm(*t[:3], residual=t[3]), (x, w, b, residual))
        for reduction in ("mean", "sum", "none"):
            loss = functools.partial(fastlm.linear_xent, y=y, reduction=reduction)
            assert torch.autograd.gradcheck(loss, (x, head))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck_gpt2_blocks(backend):
    sizes = {"C": 4, "3C": 12, "F": 3}
    x, *weights = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in (
        (1, 3, 4), *([sizes[size] for size in shape.split()] for shape in list(BLOCK_WEIGHTS.values()) * 2)))
    with fastlm.use(backend):
        assert torch.autograd.gradcheck(lambda x, *w: fastlm.gpt2_blocks(x, w, heads=2), (x, *weights), fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("T, S, causal", [(4, 4, True), (3, 6, True), (6, 3, True), (4, 6, "top-left"), (3, 4, False)])
def test_gradcheck_attention(backend, T, S, causal):
    q, k, v = (tensor.detach().double().requires_grad_() for tensor in qkv(1, T, S, 2, 4))
    with fastlm.use(backend):
        assert torch.autograd.gradcheck(lambda *operands: fastlm.attention(*operands, causal=causal), (q, k, v))


def small_model(**changes):
    sizes = {"vocab_size": 61, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 2, **changes}
    off = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    return fastlm.GPT2(fastlm.GPT2Config(**off, **sizes)).to(DEVICE)


@pytest.mark.parametrize("method", ["forward", "loss"])
def test_compiled_model_trains_a_step_with_the_same_loss(method):
    torch._dynamo.reset()
    torch.manual_seed(1)
    model, twin = small_model(), small_model()
    twin.load_state_dict(model.state_dict())
    tokens = torch.randint(61, (2, 9), device=DEVICE)
    compiled = torch.compile(getattr(twin, method), fullgraph=True)
    losses = []
    for net, call in ((model, getattr(model, method)), (twin, compiled)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            found = call(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            loss = found[1] if isinstance(found, tuple) else found
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5) and losses[1] < losses[0]
    for mine, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("forced", [False, True])
def test_pointwise_ops_are_left_to_inductor_on_a_gpu(monkeypatch, forced):
    """As if this were one: norms and GELU are traced as what they are made of, unless a backend is forced for them."""
    torch._dynamo.reset()
    monkeypatch.setattr(dispatch, "is_gpu", lambda x: True)
    torch.manual_seed(1)
    model, recorded = small_model(), torch._dynamo.testing.EagerAndRecordGraphs()
    tokens = torch.randint(61, (2, 9), device=DEVICE)
    with fastlm.use(attention="torch", **({"layer_norm": "torch", "bias_gelu": "torch"} if forced else {})):
        loss = torch.compile(model.loss, fullgraph=True, backend=recorded)(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    plain = model.loss(tokens[:, :-1], tokens[:, 1:])
    plain.backward()
    torch.testing.assert_close(loss, plain)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    traced = recorded.graphs[0].print_readable(print_output=False)
    assert "fastlm.attention_qkv_fwd" in traced and "fastlm.linear_xent_grad" in traced
    assert ("fastlm.layer_norm_fwd" in traced) == ("fastlm.bias_gelu_fwd" in traced) == forced


def test_dynamic_batch_is_one_frame():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(qkv, x, y):
        return fastlm.attention_qkv(qkv).sum() + fastlm.softmax_xent(x, y)

    for B in (6, 5, 9, 11):  # none like another size: torch takes equal sizes for one
        qkv = torch.randn(B, 4, 3, 2, 8, device=DEVICE)
        step(qkv, torch.randn(B, 7, device=DEVICE), torch.zeros(B, dtype=torch.int64, device=DEVICE))
    assert counter.frame_count == 1
