"""The model's configuration, its files, and what both refuse."""

import copy
import json
import math
import struct
import warnings
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fastlm
from fastlm.activations import GELU, KNOWN
from fastlm.cli import app
from fastlm.config import PRESETS, Activation

SIZES = {"vocab_size": 19, "n_positions": 8, "n_embd": 12, "n_layer": 2, "n_head": 3}


@pytest.fixture
def saved(tmp_path):
    """A directory with a small model."""
    torch.manual_seed(0)
    fastlm.GPT2(fastlm.GPT2Config(**SIZES)).save_pretrained(tmp_path)
    return tmp_path


def rewrite(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


# ---- sizes


def test_presets_have_the_published_sizes():
    with torch.device("meta"):
        count = {
            name: sum(parameter.numel() for parameter in fastlm.GPT2(fastlm.GPT2Config.preset(name)).parameters())
            for name in PRESETS
        }
    assert count == {
        "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    }


def test_first_loss_is_that_of_a_guess():
    torch.manual_seed(0)
    model = fastlm.GPT2(fastlm.GPT2Config(vocab_size=512, n_positions=32, n_embd=64, n_layer=2, n_head=2))
    tokens = torch.randint(512, (4, 32))
    assert float(model.eval()(tokens, tokens.roll(-1, 1))[1].detach()) == pytest.approx(math.log(512), abs=0.1)


def test_the_head_is_tied():
    model = fastlm.GPT2(fastlm.GPT2Config(**SIZES))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.to(torch.bfloat16).lm_head.weight is model.transformer.wte.weight
    tokens = torch.randint(19, (1, 8))
    model(tokens, tokens)[1].backward()
    unused = next(index for index in range(19) if index not in tokens)
    assert model.transformer.wte.weight.grad[unused].abs().sum() > 0  # through the head alone


def test_dropout_only_while_training():
    torch.manual_seed(0)
    model = fastlm.GPT2(fastlm.GPT2Config(**SIZES, embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5))
    tokens = torch.randint(19, (2, 8))
    one, other = model(tokens)[0], model(tokens)[0]
    assert not torch.equal(one, other)
    torch.manual_seed(4)
    one = model(tokens)[0]
    torch.manual_seed(4)
    assert torch.equal(one, model(tokens)[0])
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"n_head": 5}, "n_embd=12 is no multiple of n_head=5"),
        ({"n_head": 0}, "n_head is 0: .* greater than or equal to 1"),
        ({"n_layer": "many"}, "n_layer is 'many'"),
        ({"vocab_size": -3}, "vocab_size is -3"),
        ({"attn_pdrop": 1.0}, "attn_pdrop is 1.0"),
        ({"heads": 3}, "heads is no field of GPT2Config; it has vocab_size"),
        ({"eos_token_id": 19}, "eos_token_id=19 lies outside the vocabulary of 19"),
    ],
)
def test_bad_sizes(changes, told):
    with pytest.raises(ValueError, match=told):
        fastlm.GPT2Config(**{**SIZES, **changes})


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset is 'gpt3', wanted gpt2, gpt2-medium"):
        fastlm.GPT2Config.preset("gpt3")


@pytest.mark.parametrize(
    "tokens, targets, told",
    [
        (torch.zeros(8, dtype=torch.int64), None, r"tokens are torch.int64 \(8,\), wanted int64 \(B, T\)"),
        (torch.zeros(1, 8), None, "tokens are torch.float32"),
        (torch.zeros(1, 9, dtype=torch.int64), None, "9 tokens a sequence, but the model has n_positions=8"),
        (torch.full((2, 3), 19), None, r"token id 19 at \[0, 0\], wanted 0 ≤ id < vocab_size 19"),
        (torch.full((2, 3), -1), None, r"token id -1"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64), r"targets have shape \(2, 4\)"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), 20), "label 20 at"),
    ],
)
def test_bad_tokens(tokens, targets, told):
    with pytest.raises(ValueError, match=told):
        fastlm.GPT2(fastlm.GPT2Config(**SIZES))(tokens, targets)


# ---- files


def test_round_trip(saved):
    model = fastlm.GPT2.from_pretrained(saved)
    assert not model.training and model.config == fastlm.GPT2Config(**SIZES)
    stored = load_file(saved / "model.safetensors")
    assert "lm_head.weight" not in stored and all(tensor.dtype == torch.float32 for tensor in stored.values())
    assert all(torch.equal(stored[name], parameter) for name, parameter in model.named_parameters())
    half = fastlm.GPT2.from_pretrained(saved, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    half.save_pretrained(saved / "again")
    assert load_file(saved / "again" / "model.safetensors")["transformer.wpe.weight"].dtype == torch.float32
    assert not [path for path in saved.iterdir() if path.name.startswith(".")]


def test_openais_own_names(saved):
    """OpenAI's checkpoint has no `transformer.` in its names, and carries the causal masks."""
    stored = load_file(saved / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    renamed["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(renamed, saved / "model.safetensors")
    model = fastlm.GPT2.from_pretrained(saved)
    assert all(torch.equal(stored[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"n_layer": 3}, r"no weights for transformer.h.2.* \(12 missing\)"),
        ({"n_embd": 24}, r"has shape .* but config.json makes it"),
        ({"n_layer": 1}, "has a tensor transformer.h.1.*, which GPT-2 has not"),
        ({"n_head": 0}, "config.json: n_head is 0"),
        ({"n_positions": -1}, "config.json: n_positions is -1"),
        ({"activation_function": "mish"}, "activation_function is 'mish': .* 'gelu_new', .* 'relu'"),
        ({"model_type": "llama"}, "model_type is 'llama', but GPT-2 has 'gpt2'"),
        ({"scale_attn_weights": "some"}, "scale_attn_weights is 'some"),
        ({"n_embd": 10**12}, "n_embd is 1000000000000"),
    ],
)
def test_a_config_that_does_not_fit(saved, changes, told):
    rewrite(saved / "config.json", **changes)
    with pytest.raises(ValueError, match=told):
        fastlm.GPT2.from_pretrained(saved)


@pytest.mark.parametrize("end, kept", [
    (50256, None), (19, None), (-1, None), (18, 18), ([18], 18), ([50256], None), (None, None),
])
def test_an_end_of_text_outside_the_vocabulary_is_left_out(saved, end, kept):
    """transformers writes GPT-2's, 50256, into every config that says nothing."""
    rewrite(saved / "config.json", bos_token_id=18, eos_token_id=end)
    outside, given = end is not None and kept is None, end[0] if isinstance(end, list) else end
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = fastlm.GPT2.from_pretrained(saved)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (18, kept)
    assert [str(warning.message).partition(": ")[2] for warning in told] == outside * [
        f"eos_token_id={given} lies outside the vocabulary of 19: the model has none"]
    assert len(model.generate([[1]], max_new_tokens=4)[0]) == 5


def test_every_activation_that_a_config_may_name_is_there():
    assert set(get_args(Activation)) == set(KNOWN)


def test_the_end_of_text_of_gpt2s_own_vocabulary():
    assert fastlm.GPT2Config().eos_token_id == 50256


@pytest.mark.parametrize("end", [[17, 18], "</s>"])
def test_an_end_of_text_that_is_no_id(saved, end):
    rewrite(saved / "config.json", eos_token_id=end)
    with pytest.raises(ValueError, match="config.json: eos_token_id is"):
        fastlm.GPT2.from_pretrained(saved)


def drop(model):
    del model.transformer.h[-1]


def double(model):
    model.transformer.h.append(copy.deepcopy(model.transformer.h[0]))


def share(model):
    model.transformer.h[1] = model.transformer.h[0]
    model.transformer.h[0].ln_2.weight = model.transformer.h[0].ln_1.weight


def rectify(model):
    for block in model.transformer.h:
        block.mlp.act = torch.nn.ReLU()


def the_same_activation(model):
    for block, act in zip(model.transformer.h, (torch.nn.GELU("tanh"), GELU())):
        block.mlp.act = act
    model.transformer.h[1].attn.dropout = 0.5  # block 0's is what is saved


def rectify_in_place(model):
    for block in model.transformer.h:
        block.mlp.act = torch.nn.ReLU(inplace=True)


def more_heads(model):
    for block in model.transformer.h:
        block.attn.n_head = 2


def fewer_positions(model):
    model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight[:5].detach())


def other_epsilon(model):
    for block in model.transformer.h:
        block.ln_1.eps = block.ln_2.eps = model.transformer.ln_f.eps = 1e-3


@pytest.mark.parametrize("change", [drop, double, share, rectify, the_same_activation, rectify_in_place, more_heads,
                                    fewer_positions, other_epsilon])
def test_what_is_saved_says_what_the_model_is(saved, change):
    model = fastlm.GPT2.from_pretrained(saved)
    change(model)
    model.save_pretrained(saved)
    again = fastlm.GPT2.from_pretrained(saved)
    tokens = torch.arange(10).view(2, 5)
    assert (again.config == fastlm.GPT2Config(**SIZES)) == (change in (share, the_same_activation))
    torch.testing.assert_close(again(tokens)[0], model(tokens)[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("place, told", [
    ("transformer.h.0.attn", "transformer.h.0.attn is of a class of its own, Own"),
    ("lm_head", "lm_head is of a class of its own, Own"), ("transformer.wte", "transformer.wte is of a class"),
])
def test_what_a_class_of_ones_own_does_is_not_in_the_files_and_told(saved, place, told):
    model = fastlm.GPT2.from_pretrained(saved)
    module = model.get_submodule(place)
    module.__class__ = type("Own", (type(module),), {})
    with pytest.warns(UserWarning, match=f"{told}.*: its weights are saved, what it does is not"):
        model.save_pretrained(saved)


def test_explain_model(saved):
    def told(*arguments):
        return CliRunner().invoke(app, ["explain", *map(str, arguments)])

    plain = told("model", saved, "--dtype", "fp32", "--device", "cpu")
    assert plain.exit_code == 0 and "2 blocks" in plain.output and "float32" in plain.output
    rewrite(saved / "config.json", activation_function="relu")
    assert "does not: transformer.h.0.mlp.act is a ReLU" in told("model", saved, "--device", "cpu").output
    for wrong in (("model",), ("attention", saved), ("model", saved, "--shape", "B=3")):
        assert isinstance(told(*wrong).exception, ValueError)


OwnGELU = type("GELU", (torch.nn.GELU,), {})


@pytest.mark.parametrize("change, told", [
    (lambda h: setattr(h[1].mlp, "act", torch.nn.ReLU()),
     "transformer.h.1.mlp.act is torch.*ReLU, but .* makes that fastlm.*GELU"),
    (lambda h: setattr(h[0].mlp, "act", torch.nn.Mish()), "transformer.h.0.mlp.act is torch.*Mish, but"),
    (lambda h: setattr(h[0].mlp, "act", OwnGELU()), "mlp.act is test_model.GELU, but .* makes that fastlm.*GELU"),
    (lambda h: setattr(h[1].attn, "n_head", 2), "transformer.h.1.attn.n_head is 2, but .* makes that 3"),
    (lambda h: setattr(h[0].attn, "scale", 0.3), "transformer.h.0.attn.scale is 0.3, but"),
    (lambda h: setattr(h[1].ln_2, "eps", 0.3), "transformer.h.1.ln_2.eps is 0.3, but"),
    (lambda h: [setattr(norm, "eps", 0.3) for block in h for norm in (block.ln_1, block.ln_2)],
     "transformer.ln_f.eps is 1e-05, but .* makes that 0.3"),
    (lambda h: h[0].attn.register_parameter("a", torch.nn.Parameter(torch.ones(2))), "h.0.attn.a is none of its"),
    (lambda h: setattr(h[0], "mlp", torch.nn.Identity()), "transformer.h.0.mlp.c_fc.bias is missing"),
    (lambda h: setattr(h[1].mlp.c_fc, "bias", None), "transformer.h.1.mlp.c_fc.bias is missing"),
    (lambda h: h.__delitem__(slice(None)), "n_layer is 0"),
])
def test_what_no_file_says_is_not_saved(saved, change, told):
    model = fastlm.GPT2.from_pretrained(saved)
    change(model.transformer.h)
    before = {path: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(ValueError, match=told):
        model.save_pretrained(saved)
    assert before == {path: path.read_bytes() for path in saved.iterdir()}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"n_layer": 2}', b"null"])
def test_a_config_that_is_none(saved, content):
    (saved / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json"):
        fastlm.GPT2.from_pretrained(saved)


def test_damaged_weights(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    damaged = [
        b"", whole[:4], whole[: len(whole) // 2], whole[:-1], whole + b"x", struct.pack("<Q", 2**60) + whole[8:],
        whole[:8] + b"{" * length + whole[8 + length :], whole.replace(b"F32", b"F99", 1), b"\0" * len(whole),
    ]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors"):
            fastlm.GPT2.from_pretrained(saved)
    path.unlink()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        fastlm.GPT2.from_pretrained(saved)


def test_integer_weights(saved):
    stored = load_file(saved / "model.safetensors")
    save_file({**stored, "transformer.ln_f.bias": torch.zeros(12, dtype=torch.int32)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match="transformer.ln_f.bias is torch.int32, wanted a floating-point tensor"):
        fastlm.GPT2.from_pretrained(saved)


@pytest.mark.parametrize(
    "index",
    [{"weight_map": {"a": "../secret.safetensors"}}, {"weight_map": {"a": "/etc/passwd"}}, {"weight_map": {"a": 3}},
     {"weight_map": []}, {}, [], {"weight_map": {"a": "weights.bin"}}],
)
def test_an_index_leads_nowhere_else(saved, index):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model.safetensors.index.json"):
        fastlm.GPT2.from_pretrained(saved)


def test_a_name_that_is_no_directory(tmp_path):
    for name in ("./nowhere", tmp_path / "nowhere", "a/b/c"):
        with pytest.raises(ValueError, match="is no directory; pass one with config.json"):
            fastlm.GPT2.from_pretrained(name)
    with pytest.raises(ValueError, match="has no config.json"):
        fastlm.GPT2.from_pretrained(tmp_path)


def test_a_hub_id_without_a_network(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match="gpt2: no such directory, .*no route to the hub.*pass a directory"):
        fastlm.GPT2.from_pretrained("gpt2")
