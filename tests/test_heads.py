"""Heads that are not the embedding, and vocabularies of another length: computed, trained, generated with, saved."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import fastlm
from fastlm import heads
from fastlm.described import described
from fastlm.quantised import quantise_

V, C = 61, 32
SIZES = {"vocab_size": V, "n_positions": 24, "n_embd": C, "n_layer": 2, "n_head": 2}
OFF = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
TOKENS = torch.arange(40, device=DEVICE).view(2, 20) * 7 % V


def make(**changes):
    torch.manual_seed(3)
    model = fastlm.GPT2(fastlm.GPT2Config(**OFF | SIZES | changes)).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.dim() == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up, self.seen = nn.Linear(C, 16), nn.Linear(16, V), []

    def forward(self, hidden):
        self.seen.append(hidden.shape)
        return self.up(torch.tanh(self.down(hidden)))


def head(bias=False, rows=V):
    made = nn.Linear(C, rows, bias=bias)
    nn.init.normal_(made.weight, std=0.3)
    return made


def tied_with_bias(model):
    model.lm_head.bias = nn.Parameter(torch.randn(V, device=DEVICE))


HEADS = {
    "untied": lambda model: setattr(model, "lm_head", head()),
    "with a bias": lambda model: setattr(model, "lm_head", head(bias=True)),
    "tied, with a bias": tied_with_bias,
    "padded": lambda model: setattr(model, "lm_head", head(rows=64)),
    "padded, with a bias": lambda model: setattr(model, "lm_head", head(bias=True, rows=64)),
    "of its own class": lambda model: setattr(model, "lm_head", Own()),
    "frozen": lambda model: setattr(model, "lm_head", head().requires_grad_(False)),
}


@pytest.fixture(params=HEADS)
def model(request):
    model = make()
    HEADS[request.param](model)
    return model.to(DEVICE)


def test_the_loss_and_its_gradients(model):
    targets = TOKENS.roll(-1, 1).clone()
    targets[0, :5] = -100
    logits = model.lm_head(model.hidden(TOKENS))
    torch.testing.assert_close(model(TOKENS)[0], logits)
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    by_torch = torch.autograd.grad(wanted, parameters)
    loss = model.loss(TOKENS, targets)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for got, other in zip(torch.autograd.grad(loss, parameters), by_torch):
        torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(TOKENS, targets), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [4, 10**6])
@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)])
def test_a_scale_of_the_loss(model, scale, rows, monkeypatch):
    monkeypatch.setattr(heads, "LOGITS", rows * V)
    scale = scale.to(DEVICE) if isinstance(scale, torch.Tensor) else scale
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for hooked in False, True:
        if hooked:
            model.register_forward_hook(lambda module, inputs, output: None)
        losses = model.loss(TOKENS, TOKENS), model.loss(TOKENS, TOKENS, scale=scale)
        whole, part = (torch.autograd.grad(loss, parameters) for loss in losses)
        torch.testing.assert_close(losses[1], losses[0] / 4)
        for one, other in zip(part, whole):
            torch.testing.assert_close(one, other / 4)


def test_greedy_tokens(model):
    """Of a padded head none is drawn that is no token."""
    if len(getattr(model.lm_head, "weight", ())) > V:
        with torch.no_grad():
            model.lm_head.weight[V:] = 10 * model.lm_head.weight[:3]
    tokens = TOKENS[:, :4]
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens)[0][:, -1:, :V].argmax(-1)], 1)
    written = model.generate(TOKENS[:, :4], max_new_tokens=6, temperature=0, stop_at=None)
    assert [row.tolist() for row in written] == tokens.tolist()


def test_files(model, tmp_path):
    if isinstance(model.lm_head, Own):
        with pytest.raises(ValueError, match="cannot be saved as a GPT-2, lm_head.down.bias is none of its: merge"):
            model.save_pretrained(tmp_path / "own")
        assert not (tmp_path / "own").exists()
        return
    model.save_pretrained(tmp_path)
    tied = model.lm_head.weight is model.transformer.wte.weight
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is tied
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fastlm.GPT2.from_pretrained(tmp_path, device=DEVICE)
    assert (again.lm_head.weight is again.transformer.wte.weight) is tied
    assert again.config.tie_word_embeddings is tied and torch.equal(again(TOKENS)[0], model(TOKENS)[0])
    again.save_pretrained(tmp_path / "again")
    stored, once_more = (load_file(path / "model.safetensors") for path in (tmp_path, tmp_path / "again"))
    assert stored.keys() == once_more.keys() and all(torch.equal(stored[name], once_more[name]) for name in stored)


@pytest.mark.parametrize("rows", [4, 40, 10**6])
def test_a_head_of_ones_own_has_few_logits_at_once(monkeypatch, rows):
    monkeypatch.setattr(heads, "LOGITS", rows * V)
    model = make()
    model.lm_head = Own().to(DEVICE)
    loss = model.loss(TOKENS, TOKENS)
    once = len(model.lm_head.seen)
    loss.backward()
    assert max(B * T for B, T, _ in model.lm_head.seen) <= rows
    assert once == -(-40 // rows) and len(model.lm_head.seen) == (2 * once if rows < 40 else 1)
    with torch.no_grad():
        model.loss(TOKENS, TOKENS)
    assert len(model.lm_head.seen) == (3 * once if rows < 40 else 2)


@pytest.mark.parametrize("rows", [4, 10**6])
def test_dropout_in_a_head_of_ones_own_is_the_same_in_the_backward(monkeypatch, rows):
    monkeypatch.setattr(heads, "LOGITS", rows * V)
    model = make()
    model.lm_head = nn.Sequential(nn.Dropout(0.5), head()).to(DEVICE)
    weight, torch_seed = model.lm_head[1].weight, 4

    def loss(of):
        torch.manual_seed(torch_seed)
        with torch.no_grad():
            weight.copy_(of)
        return model.loss(TOKENS, TOKENS)

    at, step = weight.detach().clone(), torch.randn_like(weight)
    (gradient,) = torch.autograd.grad(loss(at), weight)
    slope = (loss(at + 1e-2 * step) - loss(at - 1e-2 * step)).detach() / 2e-2
    torch.testing.assert_close((gradient * step).sum(), slope, rtol=2e-2, atol=2e-3)


# ---- checkpoints whose head is not what their config says


def test_a_head_that_differs_is_never_tied_in_silence(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {key: value for key, value in SIZES.items()}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, tie_word_embeddings=False)).eval()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("tie_word_embeddings")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="lm_head.weight differs .* loaded as one of its own"):
        ours = fastlm.GPT2.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(TOKENS.cpu())[0], theirs(TOKENS.cpu()).logits, rtol=1e-4, atol=1e-5)
    assert not ours.config.tie_word_embeddings
    ours.save_pretrained(tmp_path / "again")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(TOKENS.cpu()).logits, theirs(TOKENS.cpu()).logits)


def test_a_head_that_is_the_embedding_is_tied(tmp_path):
    model = make().cpu()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file(stored | {"lm_head.weight": stored["transformer.wte.weight"].clone()}, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fastlm.GPT2.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight and again.config.tie_word_embeddings


@pytest.mark.parametrize("told", [True, False])
def test_safetensors_save_model(tmp_path, told):
    """It writes a tied weight once, as lm_head's, and tells of the other name in the file's metadata."""
    model = make().cpu()
    model.save_pretrained(tmp_path)
    save_model(model, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    assert "transformer.wte.weight" not in stored
    if not told:
        save_file(stored, tmp_path / "model.safetensors")
    again = fastlm.GPT2.from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS.cpu())[0], model(TOKENS.cpu())[0]) and again.config.tie_word_embeddings


def test_a_head_of_its_own_that_is_missing(tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"no weights for lm_head.weight \(1 missing\)"):
        fastlm.GPT2.from_pretrained(tmp_path)


def test_an_embedding_that_is_missing_beside_a_head_of_its_own(tmp_path):
    make(tie_word_embeddings=False).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["transformer.wte.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no weights for transformer.wte.weight \(1 missing\)"):
        fastlm.GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("head, told", [
    (nn.Linear(C, 10, bias=False), "lm_head has 10 rows for 61 tokens"), (nn.Identity(), "lm_head.weight is missing"),
])
def test_a_head_that_no_file_says_is_not_saved(tmp_path, head, told):
    model = make()
    model.lm_head = head
    with pytest.raises(ValueError, match=told):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised(tmp_path, kind):
    from fastlm.pretrained import save_quantised

    model = quantise_(make(tie_word_embeddings=False).cpu(), kind)
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    save_quantised(model, tmp_path)
    again = fastlm.GPT2.from_pretrained(tmp_path)
    assert again.quantised == kind and torch.equal(again(TOKENS.cpu())[0], model(TOKENS.cpu())[0])


# ---- vocabularies of another length


def resized(model, *of, **options):
    wte = model.resize_token_embeddings(*of, **options)
    assert wte is model.transformer.wte and len(wte.weight) == model.config.vocab_size == wte.num_embeddings
    assert len(model.lm_head.weight) == model.lm_head.out_features == model.config.vocab_size
    return model


@pytest.mark.parametrize("change", [None, *(name for name in HEADS if name not in ("of its own class", "padded"))])
@pytest.mark.parametrize("of, options, rows, tokens", [
    ((70,), {}, 70, None), ((50,), {}, 50, None), ((), {"pad_to_multiple_of": 64}, 64, V),
    ((65,), {"pad_to_multiple_of": 64}, 128, 65), ((V,), {}, V, None),
])
def test_resize(tmp_path, change, of, options, rows, tokens):
    model = make(eos_token_id=55)
    if change is not None:
        HEADS[change](model)
        model.to(DEVICE)
    model.requires_grad_(False)
    before, tied = model(TOKENS % 50)[0], model.lm_head.weight is model.transformer.wte.weight
    resized(model, *of, **options)
    kept = min(rows, V)
    torch.testing.assert_close(model(TOKENS % 50)[0][..., :kept], before[..., :kept])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.lm_head.weight is model.transformer.wte.weight) is tied
    assert model.config.unpadded_vocab_size == tokens and model.config.eos_token_id == (55 if rows > 55 else None)
    if rows > V:
        mean = model.transformer.wte.weight[:V].mean(0)
        torch.testing.assert_close(model.transformer.wte.weight[V:], mean.expand(rows - V, C), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert fastlm.GPT2.from_pretrained(tmp_path).config == described(model)[0]


def test_padding_stays_padding():
    """Whatever is padded again: the tokens are those that there were."""
    model = resized(make(), pad_to_multiple_of=64)
    for options, rows in (({}, 64), ({"pad_to_multiple_of": 64}, 64), ({"pad_to_multiple_of": 96}, 96),
                          ({"pad_to_multiple_of": 8}, 64)):
        resized(model, **options)
        assert (model.config.vocab_size, model.config.unpadded_vocab_size) == (rows, V), options
    resized(model, V + 1)
    assert (model.config.vocab_size, model.config.unpadded_vocab_size) == (V + 1, None)


@pytest.mark.parametrize("path", ["engine", "modules"])
def test_pads_are_never_drawn(path):
    model = resized(make(), pad_to_multiple_of=64).eval()
    model.config = model.config.model_copy(update={"unpadded_vocab_size": 3})  # nearly all of it
    with fastlm.use(decode_attention="torch" if path == "modules" else None):
        for options in ({"temperature": 0}, {"temperature": 5.0, "seed": 1}, {"temperature": 5.0, "vocab_size": 64}):
            rows = model.generate(TOKENS % 3, max_new_tokens=4, num_return_sequences=5, **options)
            assert max(int(row.max()) for row in rows) < 3


@pytest.mark.parametrize("of, options, told", [
    ((0,), {}, "new_num_tokens is 0, wanted a whole number"), (("many",), {}, "new_num_tokens is 'many'"),
    ((), {"pad_to_multiple_of": -2}, "pad_to_multiple_of is -2"),
])
def test_no_length(of, options, told):
    model = make()
    with pytest.raises(ValueError, match=told):
        model.resize_token_embeddings(*of, **options)
    assert model.config.vocab_size == V


def test_an_adapter_in_the_heads_place_is_not_resized():
    model = make()
    model.lm_head = Own()
    with pytest.raises(ValueError, match="lm_head is a Own, wanted a Linear with a weight of its own; merge adapters"):
        model.resize_token_embeddings(70)


def test_a_quantised_model_is_resized():
    model = resized(quantise_(make().cpu(), "int8"), 70).eval()
    with torch.no_grad():
        wanted = model(TOKENS.cpu())[0][:, -1].argmax(-1)
    written = model.generate(TOKENS.cpu(), max_new_tokens=1, temperature=0, stop_at=None)
    assert [int(row[-1]) for row in written] == wanted.tolist()


@pytest.mark.parametrize("mask, told", [
    (torch.ones(2, 3), r"attention_mask is \(2, 3\)"), ([[1] * 20] * 2, "attention_mask is list"),
    (torch.full((2, 20), 2), "attention_mask holds 2, wanted 0 and 1"),
    (torch.full((2, 20), -1e9), r"attention_mask holds -1000000000.0, wanted 0 and 1"),
])
def test_no_attention_mask(mask, told):
    mask = mask.to(DEVICE) if isinstance(mask, torch.Tensor) else mask
    model = make()
    for call in (model, lambda tokens, **given: model.generate(tokens, max_new_tokens=1, **given)):
        with pytest.raises(ValueError, match=told):
            call(TOKENS, attention_mask=mask)
    ones = torch.ones(2, 30, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="30 tokens a sequence, but the model has n_positions=24"):
        model(ones, attention_mask=ones)
    if DEVICE == "cpu":
        wrong, behind = TOKENS.clone(), torch.ones_like(TOKENS)
        wrong[1, 5], behind[1, :3] = 999, 0
        with pytest.raises(ValueError, match=r"token id 999 at \[1, 5\]"):
            model(wrong, attention_mask=behind)
    with pytest.raises(ValueError, match="attention_mask goes with tokens"):
        model.generate(TOKENS.tolist(), attention_mask=torch.ones_like(TOKENS))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        model.generate(TOKENS, attention_mask=torch.tensor([[1], [0]], device=DEVICE).expand(2, 20))
