"""The fast paths are right, or step aside: what is done to a model counts, in its forward, its loss and generation."""

import copy
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, two_threads_for
from torch import nn

import fastlm
from fastlm import fast_path
from fastlm.backends.machine import machine_why_not
from fastlm.generation import engine, perplexity
from fastlm.gpt2 import MLP, Conv1D, LayerNorm

if DEVICE != "cpu" or machine_why_not("cpu") is not None:
    pytest.skip("needs the CPU kernels, and a CPU to run on", allow_module_level=True)

TOKENS = torch.arange(24).view(2, 12) * 7 % 300


@pytest.fixture(autouse=True)
def two_threads():
    with two_threads_for("cpu"):
        yield


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    monkeypatch.setattr(fast_path, "_told", set())
    warnings.simplefilter("ignore")


def make(**changes):
    torch.manual_seed(5)
    sizes = dict(vocab_size=300, n_positions=64, n_embd=64, n_layer=2, n_head=4, eos_token_id=None, bos_token_id=None)
    off = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    model = fastlm.GPT2(fastlm.GPT2Config(**off | sizes | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def by_hand(model, tokens):
    """Logits (B, T, V): torch's modules alone, called one by one, whatever they are."""
    parts = model.transformer
    B, T = tokens.shape
    x = parts.wte(tokens) + parts.wpe(torch.arange(T))
    for block in parts.h:
        n = block.ln_1(x)
        qkv = block.attn.c_attn(n).view(B, T, 3, block.attn.n_head, -1).transpose(1, 3)  # (B, H, 3, T, D)
        o = F.scaled_dot_product_attention(*qkv.unbind(2), is_causal=True)
        x = x + block.attn.c_proj(o.transpose(1, 2).reshape(B, T, -1))
        x = x + block.mlp(block.ln_2(x))
    return model.lm_head(parts.ln_f(x))


def greedy_by_hand(model, tokens, n):
    with torch.inference_mode():
        for _ in range(n):
            tokens = torch.cat([tokens, by_hand(model, tokens)[:, -1:].argmax(-1)], 1)
    return tokens.tolist()


def greedy(model, tokens=TOKENS, n=8):
    return [row.tolist() for row in model.generate(tokens, max_new_tokens=n, temperature=0, stop_at=None)]


def check_all(model):
    """Forward, loss and generation against the modules, called by hand."""
    with torch.no_grad():
        wanted = by_hand(model, TOKENS)
        torch.testing.assert_close(model(TOKENS)[0], wanted, rtol=1e-4, atol=1e-4)
        loss = F.cross_entropy(wanted.flatten(0, 1), TOKENS.flatten())
        torch.testing.assert_close(model.loss(TOKENS, TOKENS), loss, rtol=1e-4, atol=1e-4)
    assert greedy(model) == greedy_by_hand(model, TOKENS, 8)


class Adapter(nn.Module):
    """Low-rank, of a user's: knows nothing of `bias=False`."""

    def __init__(self, inner, told=True, dropout=0.0):
        super().__init__()
        K, N = inner.weight.shape
        self.inner, self.dropout = inner, nn.Dropout(dropout)
        self.a, self.b = nn.Parameter(torch.randn(K, 2) * 0.3), nn.Parameter(torch.randn(2, N) * 0.3)
        if told:
            self.weight, self.bias = inner.weight, inner.bias

    def forward(self, x):
        return self.inner(x) + self.dropout(x) @ self.a @ self.b


def each(model, name, change):
    for block in model.transformer.h:
        part, _, leaf = name.rpartition(".")
        owner = block.get_submodule(part)
        setattr(owner, leaf, change(getattr(owner, leaf)))


class MyMLP(MLP):
    def forward(self, x):
        return super().forward(x) * 0.5


def of_class(module, kind):
    module.__class__ = kind
    return module


class Doubling(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *given):
        return self.inner(*given) * 2


def forward_of_its_own(module, scale=0.0):
    module.forward = lambda x, own=module.forward: own(x) * scale


def untie(model):
    model.lm_head.weight = nn.Parameter(torch.randn(300, 64) * 0.2)


def as_view(model):
    wte = model.transformer.wte
    wte.weight = nn.Parameter(wte.weight.detach().t().contiguous().t())
    model.tie_weights()


def views(model):
    for name, parameter in list(model.named_parameters()):
        if parameter.dim() == 2 and "wte" not in name:
            part, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(part), leaf, nn.Parameter(parameter.detach().t().contiguous().t()))


def strided_norm(model):
    wide = torch.randn(64, 2)
    model.transformer.ln_f.weight = nn.Parameter(wide[:, 0])
    model.transformer.h[1].ln_2.bias = nn.Parameter(wide[:, 1])


def other_heads(model):
    for block in model.transformer.h:
        block.attn.n_head = 8


def linear_for_conv(model):
    conv = model.transformer.h[0].mlp.c_proj
    linear = nn.Linear(256, 64)
    linear.weight.data, linear.bias.data = conv.weight.detach().t().contiguous(), conv.bias.detach().clone()
    model.transformer.h[0].mlp.c_proj = linear


def cut_mlp(model, blocks=(1,)):
    for number in blocks:
        mlp = model.transformer.h[number].mlp
        mlp.c_fc.weight = nn.Parameter(mlp.c_fc.weight.detach()[:, :100].clone())
        mlp.c_fc.bias = nn.Parameter(mlp.c_fc.bias.detach()[:100].clone())
        mlp.c_proj.weight = nn.Parameter(mlp.c_proj.weight.detach()[:100].clone())


def head_with_bias(model):
    model.lm_head.bias = nn.Parameter(torch.randn(300))


def epsilon(model):
    model.transformer.h[1].ln_1.eps = 0.5


def swapped_blocks(model):
    h = model.transformer.h
    model.transformer.h = nn.ModuleList([h[1], h[0], h[1]])  # one of them twice


# name: (what is done, whether the engine still serves)
DONE = {
    "nothing": (lambda m: None, True),
    "last block removed": (lambda m: m.transformer.h.__delitem__(-1), True),
    "first block removed": (lambda m: m.transformer.h.__delitem__(0), True),
    "all blocks removed": (lambda m: setattr(m.transformer, "h", nn.ModuleList()), False),
    "a block added": (lambda m: m.transformer.h.append(copy.deepcopy(m.transformer.h[0])), True),
    "blocks swapped, one twice": (swapped_blocks, True),
    "adapter on c_attn": (lambda m: each(m, "attn.c_attn", Adapter), False),
    "adapter on c_fc": (lambda m: each(m, "mlp.c_fc", Adapter), False),
    "adapter without weight": (lambda m: each(m, "mlp.c_fc", lambda conv: Adapter(conv, told=False)), False),
    "adapter on c_proj": (lambda m: each(m, "attn.c_proj", Adapter), False),
    "a class of its own": (lambda m: of_class(m.transformer.h[0].mlp, MyMLP), False),
    "instance's forward": (lambda m: forward_of_its_own(m.transformer.h[0].mlp), False),
    "instance's forward of a leaf": (lambda m: forward_of_its_own(m.transformer.h[1].attn.c_proj, 2.0), False),
    "instance's forward of the head": (lambda m: forward_of_its_own(m.lm_head, -1.0), False),
    "instance's forward of wte": (lambda m: forward_of_its_own(m.transformer.wte, 2.0), False),
    "instance's forward of wpe": (lambda m: forward_of_its_own(m.transformer.wpe, 2.0), False),
    "torch's last norm": (lambda m: m.transformer.__setitem__("ln_f", nn.LayerNorm(64)), False),
    "a hook": (lambda m: m.transformer.h[1].mlp.register_forward_hook(lambda *call: call[2] * 2), False),
    "a hook on c_fc": (lambda m: m.transformer.h[1].mlp.c_fc.register_forward_hook(lambda *call: call[2].abs()), False),
    "a pre-hook on the head": (lambda m: m.lm_head.register_forward_pre_hook(lambda *call: (-call[1][0],)), False),
    "a hook on wte": (lambda m: m.transformer.wte.register_forward_hook(lambda *call: call[2] * 2), False),
    "torch's embedding for wte": (lambda m: m.transformer.__setitem__(
        "wte", nn.Embedding.from_pretrained(m.transformer.wte.weight.detach().clone())), False),
    "untied": (untie, True),
    "a transposed view": (as_view, True),
    "transposed views": (views, True),
    "strided norms": (strided_norm, True),
    "other heads": (other_heads, True),
    "a wrapped head": (lambda m: setattr(m, "lm_head", Doubling(m.lm_head)), False),
    "a wrapped embedding": (lambda m: setattr(m.transformer, "wte", Doubling(m.transformer.wte)), False),
    "torch's linear": (linear_for_conv, False),
    "narrower MLPs": (lambda m: cut_mlp(m, (0, 1)), True),
    "one narrower MLP": (cut_mlp, False),
    "a bias in the head": (head_with_bias, False),
    "another epsilon": (epsilon, False),
}


@pytest.mark.parametrize("name", DONE)
@pytest.mark.filterwarnings("ignore")
def test_what_is_done_to_a_model_counts(name):
    do, fast = DONE[name]
    model = make()
    greedy(model)  # and what was packed before does not
    do(model)
    check_all(model)
    assert (engine.why_not(model) is None) == fast
    assert model.why_slow() == engine.why_not(model)


@pytest.mark.parametrize("kind, forward", [
    (MLP, lambda self, x: torch.zeros_like(x)), (Conv1D, lambda self, x, bias=True: x @ self.weight),
    (LayerNorm, lambda self, x, residual=None: x if residual is None else (x + residual, x + residual)),
    (nn.Linear, lambda self, x: -F.linear(x, self.weight)), (nn.Embedding, lambda self, x: self.weight[x] * 2),
], ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.filterwarnings("ignore")
def test_a_forward_patched_onto_a_class_counts(kind, forward, monkeypatch):
    model = make()
    before = greedy(model)
    monkeypatch.setattr(kind, "forward", forward)
    assert "forward was replaced" in engine.why_not(model)
    check_all(model)
    monkeypatch.undo()
    assert engine.why_not(model) is None and greedy(model) == before


@pytest.mark.filterwarnings("ignore")
def test_a_call_patched_onto_all_modules_counts(monkeypatch):
    model, called = make(), []
    call = nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *a, **k: called.append(type(self)) or call(self, *a, **k))
    check_all(model)
    called.clear()
    greedy(model)
    assert MLP in called and nn.Linear in called


@pytest.mark.filterwarnings("ignore")
def test_hooks_for_all_modules_count():
    model, called = make(), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(type(module)))
    try:
        assert "hooks for all modules" in model.why_slow()
        model(TOKENS), model.loss(TOKENS, TOKENS), greedy(model)
        assert called.count(MLP) == 2 * (2 + 8) and called.count(nn.Linear) == 2 + 8
    finally:
        hook.remove()
    assert model.why_slow() is None


class OfItsLoss(fastlm.GPT2):
    def forward(self, tokens, targets):
        return self.loss(tokens, targets)


class LogitsAlone(fastlm.GPT2):
    def forward(self, tokens, targets=None):
        return super().forward(tokens)[0]


class AnObject(fastlm.GPT2):
    def forward(self, tokens, targets=None):
        logits, loss = super().forward(tokens, targets)
        return types.SimpleNamespace(logits=logits, loss=loss)


class Nonsense(fastlm.GPT2):
    def forward(self, tokens, targets=None):
        return {"a": 1}


@pytest.mark.parametrize("kind", [OfItsLoss, LogitsAlone, AnObject])
def test_forwards_of_the_whole_model_have_several_forms(kind):
    plain = make()
    model = kind(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model.loss(TOKENS, TOKENS), plain.loss(TOKENS, TOKENS))
    if kind is OfItsLoss:
        torch.testing.assert_close(model(TOKENS, TOKENS), plain.loss(TOKENS, TOKENS))
    else:
        assert greedy(model) == greedy(plain)
        assert perplexity.perplexity(model, [1, 2, 3]) == pytest.approx(perplexity.perplexity(plain, [1, 2, 3]))


def test_a_forward_of_the_whole_model_that_says_nothing():
    model = Nonsense(make().config)
    for call in (lambda: model.loss(TOKENS, TOKENS), lambda: greedy(model)):
        with pytest.raises(TypeError, match=r"Nonsense's forward returned dict, wanted \(logits \(B, T, V\), loss"):
            call()


def test_an_instances_forward_may_call_the_loss():
    model = make()
    own, wanted = model.forward, model.loss(TOKENS, TOKENS)
    model.forward = lambda *given, **options: (own(*given, **options)[0], 2 * model.loss(*given[:2]))
    torch.testing.assert_close(model.loss(TOKENS, TOKENS), 2 * wanted)


def test_why_slow_and_a_warning_once():
    model = make()
    assert model.why_slow() is None
    model.transformer.h[1].mlp.forward = lambda x: x
    assert model.why_slow() == "transformer.h.1.mlp has a forward of its own, which a fast path would not call"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        greedy(model), greedy(model), model(TOKENS), model.loss(TOKENS, TOKENS)
    assert [str(one.message) for one in told] == [f"fastlm: {model.why_slow()}; the model's own modules run, which "
                                                  "takes longer"]
    model = make()
    cut_mlp(model)
    assert model.why_slow().startswith("transformer.h.1.mlp.c_fc.weight is (64, 100)")
    model.transformer.h[0].ln_1 = model.transformer.h[0].attn.c_proj
    assert model.why_slow().startswith("transformer.h.0.ln_1 is a Conv1D")


def test_a_model_of_our_own_hooks_is_not_warned_of():
    model = make()

    def hook(*_):
        pass

    hook.__module__ = "fastlm.measure.certificate"
    model.transformer.h[0].register_forward_hook(hook)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(TOKENS), greedy(model)


@pytest.mark.parametrize("case", ["dropout of a module", "a block in another mode"])
def test_dropout_is_as_the_modules_have_it(case):
    model = make(resid_pdrop=0.5) if case == "a block in another mode" else make()
    if case == "dropout of a module":
        model.train().transformer.h[1].mlp.residual_dropout = 0.5
    else:
        model.transformer.h[1].train()
    first, second = model(TOKENS)[0], model(TOKENS)[0]
    assert not torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:fastlm")
def test_a_bias_that_cannot_ride_is_added_as_before():
    """One of another shape, which a product takes; none is refused, as the modules refuse it."""
    model, tokens = make(), torch.randint(300, (2, 9))
    with fastlm.use(attention="torch"):
        wanted = model.loss(tokens, tokens)
        held = model.transformer.h[0].mlp.c_proj
        held.bias = torch.nn.Parameter(held.bias.detach()[None])
        torch.testing.assert_close(model.loss(tokens, tokens), wanted)
        held.bias = None
        with pytest.raises((TypeError, ValueError)):
            model.loss(tokens, tokens)
