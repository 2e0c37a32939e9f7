"""Adapters on a GPT-2, by hand and by peft: they count everywhere, alone are trained, merge and are saved."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import nn

import fastlm
from fastlm.gpt2 import Conv1D

SIZES = {"vocab_size": 61, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
ALL = "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"


class Lora(nn.Module):
    """x W + b + x A B."""

    def __init__(self, layer, rank=4):
        super().__init__()
        self.layer = layer
        inputs, outputs = layer.weight.shape
        self.a = nn.Parameter(torch.randn(inputs, rank, device=layer.weight.device) * 0.3)
        self.b = nn.Parameter(torch.randn(rank, outputs, device=layer.weight.device) * 0.3)

    def forward(self, x):
        return self.layer(x) + x @ self.a @ self.b

    def merged(self):
        layer = copy.deepcopy(self.layer)
        layer.weight.data += self.a.data @ self.b.data
        return layer


class ShownLora(Lora):
    """With the properties of what it wraps."""

    @property
    def weight(self):
        return self.layer.weight

    @property
    def bias(self):
        return self.layer.bias


class InheritedLora(Conv1D):
    """A Conv1D with an adapter inside."""

    def __init__(self, layer, rank=4):
        super().__init__(*layer.weight.shape, 0.02)
        self.load_state_dict(layer.state_dict())
        other = Lora(layer, rank)
        self.a, self.b = other.a, other.b
        self.to(layer.weight.device)

    def forward(self, x):
        return super().forward(x) + x @ self.a @ self.b

    def merged(self):
        layer = Conv1D(*self.weight.shape, 0.02).to(self.weight.device)
        layer.load_state_dict({"weight": self.weight.data + self.a.data @ self.b.data, "bias": self.bias.data})
        return layer


@pytest.fixture
def model():
    torch.manual_seed(0)
    off = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    model = fastlm.GPT2(fastlm.GPT2Config(**SIZES, **off)).to(DEVICE).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.15)  # biases too
    return model


def batch():
    tokens = torch.randint(SIZES["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def replace(model, names, make):
    """The model with make(module) in place of modules of every block, by their names."""
    for block in model.transformer.h:
        for name in names:
            parent, _, last = name.rpartition(".")
            parent = block.get_submodule(parent)
            setattr(parent, last, make(getattr(parent, last)))
    return model


def continued(model):
    return [row.tolist() for row in model.generate([[1, 2, 3], [4, 5]], max_new_tokens=12, temperature=0)]


def same_model(one, other):
    """Whether two models say the same: logits, both losses, and what they generate."""
    tokens, targets = batch()
    torch.testing.assert_close(one(tokens)[0], other(tokens)[0], rtol=1e-4, atol=1e-5)
    for model in (one, other):
        torch.testing.assert_close(model.loss(tokens, targets), model(tokens, targets)[1], rtol=1e-5, atol=1e-6)
    assert continued(one) == continued(other)


def train(model, steps=20):
    """Losses of a few steps in what requires a gradient; everything else stays."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    tokens, targets = batch()
    losses = []
    for _ in range(steps):
        loss = model.loss(tokens, targets)
        loss.backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0], losses
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


BY_HAND = pytest.mark.parametrize("adapter", [Lora, ShownLora, InheritedLora])
WHERE = pytest.mark.parametrize("names", [*((name,) for name in ALL), ALL], ids=lambda names: "+".join(names))


@BY_HAND
@WHERE
def test_by_hand_it_counts_and_merges(model, adapter, names):
    plain = copy.deepcopy(model)
    replace(model, names, adapter)
    tokens, _ = batch()
    assert (model(tokens)[0] - plain(tokens)[0]).abs().max() > 0.05
    assert continued(model) != continued(plain)
    same_model(model, replace(copy.deepcopy(model), names, lambda module: module.merged()))


@BY_HAND
def test_by_hand_it_is_trained_and_saved(model, adapter):
    replace(model.requires_grad_(False), ALL, adapter)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith((".a", ".b")))
    first = copy.deepcopy(model)
    train(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    first.load_state_dict(torch.load(file))
    same_model(first, model)
    same_model(replace(first, ALL, lambda module: module.merged()), model)


class Norm(nn.Module):
    """A norm of somebody's own."""

    def __init__(self, norm):
        super().__init__()
        self.gain, self.shift = nn.Parameter(norm.weight.data * 1.3), nn.Parameter(norm.bias.data + 0.2)

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.gain, self.shift)


class Head(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head, self.shift = head, nn.Parameter(torch.linspace(-3, 3, SIZES["vocab_size"], device=DEVICE))

    def forward(self, hidden):
        return self.head(hidden) + self.shift


class Embedding(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embedding, self.shift = embedding, nn.Parameter(torch.linspace(-1, 1, SIZES["n_embd"], device=DEVICE))

    def forward(self, tokens):
        return self.embedding(tokens) + self.shift


@pytest.mark.parametrize("norms", [("ln_1",), ("ln_2",), ("ln_1", "ln_2")])
def test_a_norm_of_ones_own(model, norms):
    scaled = copy.deepcopy(model)
    for block in scaled.transformer.h:
        for norm in norms:
            getattr(block, norm).weight.data *= 1.3
            getattr(block, norm).bias.data += 0.2
    same_model(replace(model, norms, Norm), scaled)


def test_the_last_norm(model):
    scaled = copy.deepcopy(model)
    scaled.transformer.ln_f.weight.data *= 1.3
    scaled.transformer.ln_f.bias.data += 0.2
    model.transformer["ln_f"] = Norm(model.transformer.ln_f)
    same_model(model, scaled)


def test_an_embedding_of_ones_own(model):
    shifted = copy.deepcopy(model)
    shifted.transformer.wpe.weight.data += torch.linspace(-1, 1, SIZES["n_embd"], device=DEVICE)
    model.transformer["wte"] = Embedding(model.transformer.wte)
    same_model(model, shifted)


@pytest.mark.parametrize("kind", ["of its own class", "with a bias", "with a hook"])
def test_a_head_of_ones_own(model, kind):
    tokens, targets = batch()
    shift = torch.linspace(-3, 3, SIZES["vocab_size"], device=DEVICE)
    wanted = model(tokens)[0] + shift
    if kind == "of its own class":
        model.lm_head = Head(model.lm_head)
    elif kind == "with a bias":
        model.lm_head.bias = nn.Parameter(shift)
    else:
        model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + shift)
    torch.testing.assert_close(model(tokens)[0], wanted)
    loss = F.cross_entropy(wanted.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(tokens, targets), loss)
    with fastlm.use(decode_attention="torch"):  # the model's own modules
        newest = [int(row[-1]) for row in model.generate(tokens, max_new_tokens=1, temperature=0)]
    assert newest == wanted[:, -1].argmax(-1).tolist()


def test_a_hook_sees_the_whole_output(model):
    """As in transformers: c_fc's with its bias, ln_2's without a sum beside it."""
    tokens, seen = batch()[0], {}
    for name in ("mlp.c_fc", "ln_2"):
        model.transformer.h[1].get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: (inputs, output)}))
    model(tokens)
    (x,), normed = seen["ln_2"]
    norm, up = (model.transformer.h[1].get_submodule(name) for name in ("ln_2", "mlp.c_fc"))
    torch.testing.assert_close(normed, F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias))
    torch.testing.assert_close(seen["mlp.c_fc"][1], normed @ up.weight + up.bias)


# ---- peft


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed: `pip install peft` for its adapters to be tried")


def adapted(peft, model, **options):
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**config)).eval()


TARGETS = pytest.mark.parametrize("options", [
    {}, {"target_modules": ["c_attn", "c_proj", "c_fc"]}, {"target_modules": "all-linear"}, {"use_dora": True},
    {"target_modules": ["c_fc"], "bias": "all"}, {"target_modules": ["c_attn", "wte"]},
    {"modules_to_save": ["ln_f", "ln_2"]},
], ids=str)


@TARGETS
def test_peft_counts_and_merges(peft, model, options):
    plain = copy.deepcopy(model)
    wrapped = adapted(peft, model, **options)
    tokens, _ = batch()
    assert (wrapped(tokens)[0] - plain(tokens)[0]).abs().max() > 0.05
    assert continued(wrapped) != continued(plain)
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(tokens)[0], plain(tokens)[0])
    if {"wte", "lm_head"} & {name.rpartition(".")[2] for name in wrapped.base_model.targeted_module_names}:
        return  # peft would merge it into the weight that both have
    merged = copy.deepcopy(wrapped).merge_and_unload()
    assert all(type(block.attn.c_attn) is Conv1D for block in merged.transformer.h)
    same_model(wrapped, merged)


@TARGETS
def test_peft_is_trained_and_saved(peft, model, options, tmp_path):
    plain = copy.deepcopy(model)
    wrapped = adapted(peft, model, **options, lora_dropout=0.0)
    assert all(p.requires_grad == any(part in name for part in ("lora_", "modules_to_save", "bias"))
               for name, p in wrapped.named_parameters() if p.requires_grad)
    train(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    same_model(again, wrapped)
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    same_model(fastlm.GPT2.from_pretrained(tmp_path / "merged", device=DEVICE), merged)


def test_peft_as_by_default(peft, model):
    """The line of peft's own manual, adapters that begin as nothing; and without fan_in_fan_out, which peft mends."""
    tokens, _ = batch()
    wanted = model(tokens)[0]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    torch.testing.assert_close(wrapped(tokens)[0], wanted)
    trainable, _ = wrapped.get_nb_trainable_parameters()
    assert trainable == 2 * 8 * (32 + 96)
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to True"):
        peft.get_peft_model(wrapped.unload(), peft.LoraConfig(target_modules=["c_attn"]))


# ---- the likeness that peft goes by


def test_transformers_knows_conv1d_where_it_is_imported(model):
    theirs = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = model.transformer.h[0].mlp.c_fc
    assert isinstance(layer, theirs) and isinstance(layer, Conv1D) and type(layer) is Conv1D
    assert not issubclass(Conv1D, theirs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.transformer.h[0].mlp.c_fc) is Conv1D
        same_model(other, model)
    tokens, targets = batch()
    compiled = torch.compile(copy.deepcopy(model).loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, targets), model.loss(tokens, targets))


@pytest.mark.parametrize("named", ["transformers", "none"])
def test_a_parametrized_layer(model, named, monkeypatch):
    if named == "transformers":
        pytest.importorskip("transformers.pytorch_utils")
    else:
        monkeypatch.delitem(sys.modules, "transformers.pytorch_utils", raising=False)

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    doubled = copy.deepcopy(model)
    for block in doubled.transformer.h:
        block.mlp.c_fc.weight.data *= 2
    for block in model.transformer.h:
        nn.utils.parametrize.register_parametrization(block.mlp.c_fc, "weight", Double())
    same_model(model, doubled)
    for block in model.transformer.h:
        nn.utils.parametrize.remove_parametrizations(block.mlp.c_fc, "weight")
    same_model(model, doubled)


def test_nothing_is_imported_for_it():
    code = ("import sys, fastlm; from fastlm.gpt2 import Conv1D; layer = Conv1D(2, 3, 0.1); "
            "assert layer.__class__ is Conv1D and isinstance(layer, Conv1D) and not isinstance(layer, dict); "
            "assert not {'transformers', 'peft'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)
