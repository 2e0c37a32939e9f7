"""Blocks that are computed again in the backward: the same bits, less memory; and sums through the blocks in bf16."""

import pytest
import torch
from conftest import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastlm
from fastlm import dispatch
from fastlm.generation import KVCache

SIZES = {"vocab_size": 61, "n_positions": 24, "n_embd": 32, "n_layer": 3, "n_head": 2}
WAYS = ("whole blocks", "sums in norms", "modules", "autocast")


def step(way, recomputes, dropout=0.0, residual=None):
    """(loss, {name: gradient}, {torch op: calls}) of a model whose blocks run in one of the WAYS."""
    torch.manual_seed(0)
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    model = fastlm.GPT2(fastlm.GPT2Config(**SIZES, **rates)).to(DEVICE)
    model.recomputes, model.residual = recomputes, residual
    if way == "modules":
        model.transformer.h[1].ln_1.register_forward_hook(lambda module, given, found: None)
    tokens = torch.randint(61, (2, 20), device=DEVICE)
    with fastlm.use(attention="torch" if way == "sums in norms" and not dropout else None), dispatch.record() as calls:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=way == "autocast"):
            loss = model.loss(tokens, tokens)
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), gradients, {op: count for (op, _), count in calls.items()}


@pytest.mark.filterwarnings("ignore:fastlm")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits(way, dropout):
    if way == "whole blocks" and (DEVICE != "cpu" or dispatch.machine_why_not("cpu")):
        pytest.skip("whole blocks run on a CPU, compiled")
    (loss, wanted, once), (again, found, twice) = (step(way, recomputes, dropout) for recomputes in (False, True))
    assert torch.equal(loss, again)
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name
    part = "gpt2_blocks_fwd" if way == "whole blocks" and not dropout else "bias_gelu_fwd"
    assert twice[part] == 2 * SIZES["n_layer"] and once[part] in (1, SIZES["n_layer"])


class Kept(TorchDispatchMode):
    """The largest number of bytes that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return found


@pytest.mark.parametrize("way", ["whole blocks", "autocast"])
def test_less_is_kept(way):
    peaks = []
    for recomputes in (False, True):
        torch.manual_seed(0)
        model = fastlm.GPT2(fastlm.GPT2Config(**{**SIZES, "n_layer": 12, "n_positions": 256})).to(DEVICE)
        for part in model.modules():
            part.training = False
        model.recomputes = recomputes
        tokens = torch.randint(61, (4, 256), device=DEVICE)
        with Kept() as kept, torch.autocast(DEVICE, torch.bfloat16, enabled=way == "autocast"):
            model.loss(tokens, tokens).backward()
        peaks.append(kept.most)
    assert peaks[1] < 0.3 * peaks[0], peaks


def test_nothing_is_computed_twice_without_a_backward():
    model = fastlm.GPT2(fastlm.GPT2Config(**SIZES)).to(DEVICE)
    model.recomputes = True
    tokens = torch.zeros(1, 4, dtype=torch.int64, device=DEVICE)
    with torch.no_grad(), dispatch.record() as calls:
        model.loss(tokens, tokens)
    assert max(calls.values()) <= 2 * SIZES["n_layer"] + 1


def test_compiled():
    torch._dynamo.reset()
    torch.manual_seed(0)
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    model = fastlm.GPT2(fastlm.GPT2Config(**SIZES, **rates)).to(DEVICE)
    tokens = torch.randint(61, (2, 9), device=DEVICE)
    plain = model.loss(tokens, tokens)
    model.recomputes = True
    with fastlm.use(attention="torch"):
        loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(tokens, tokens)
    loss.backward()
    torch.testing.assert_close(loss, plain)


def test_sums_in_bf16():
    """They are what goes from block to block, and the loss is as near to fp32's as bf16 is."""
    exact, *_ = step("sums in norms", False)
    wide, *_ = step("autocast", False)
    narrow, gradients, _ = step("autocast", False, residual=torch.bfloat16)
    assert abs(narrow - exact) < 4 * abs(wide - exact) + 2e-2 and not torch.equal(narrow, wide)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())
    again, same, _ = step("autocast", True, residual=torch.bfloat16)
    assert torch.equal(again, narrow) and all(torch.equal(same[name], gradients[name]) for name in same)


def test_sums_in_bf16_are_those_of_autocast_alone():
    exact, _, _ = step("sums in norms", False)
    assert torch.equal(step("sums in norms", False, residual=torch.bfloat16)[0], exact)
    model = fastlm.GPT2(fastlm.GPT2Config(**SIZES)).to(DEVICE).eval()
    wanted = model.generate([[1, 2, 3]], max_new_tokens=5, temperature=0)
    model.residual = torch.bfloat16
    with fastlm.use(decode_attention="torch"):  # the modules, not the engine
        found = model.generate([[1, 2, 3]], max_new_tokens=5, temperature=0)
    assert found[0].tolist() == wanted[0].tolist()


def test_no_memory_is_told_as_that(monkeypatch):
    def fill(*args, **options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("fastlm.gpt2.attention_qkv", fill)
    for residual in (None, torch.bfloat16):
        with pytest.raises(torch.OutOfMemoryError):
            step("autocast", False, residual=residual)


def test_torch_func_and_a_cache_know_no_recomputation():
    torch.manual_seed(0)
    model, tokens = fastlm.GPT2(fastlm.GPT2Config(**SIZES)).to(DEVICE).eval(), torch.randint(61, (1, 6), device=DEVICE)
    weights, found = dict(model.named_parameters()), []

    def loss(given):
        return torch.func.functional_call(model, given, (tokens, tokens))[1]

    for model.recomputes in (False, True):
        cache = KVCache(model.config, 1, 12, device=DEVICE, dtype=torch.float32)
        positions = cache.begin(torch.full((1,), 6, dtype=torch.int32, device=DEVICE), 6)
        model.hidden(tokens, positions=positions, cache=cache).sum()
        cache.end()
        found.append(torch.func.grad(loss)(weights)["transformer.wpe.weight"])
    assert torch.equal(*found)
