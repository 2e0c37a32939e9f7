"""`fastlm convert`: quantised files, written, read, refused; what they cost."""

import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fastlm
from fastlm import pretrained
from fastlm.cli import app
from fastlm.data.tokenizer import Tokenizer
from fastlm.generation.perplexity import perplexity
from fastlm.pretrained import save_quantised
from fastlm.quantised import quantise_


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model directory, and a text."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = fastlm.GPT2(fastlm.GPT2Config(vocab_size=257, n_positions=48, n_embd=36, n_layer=2, n_head=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() == 2 else None
    model.save_pretrained(path / "model", tokenizer=Tokenizer.bytes())
    (path / "text.txt").write_text("Who would not rather be read than written? " * 9)
    return path


def convert(folder, out, *arguments, kind="int8", model="model"):
    return CliRunner().invoke(app, [
        "convert", "--model", str(folder / model), "--dtype", kind, "--out", str(out), "--text",
        str(folder / "text.txt"), *arguments,
    ])


def test_a_byte_order_mark_is_no_text(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "folder")
    (tmp_path / "folder" / "text.txt").write_bytes(b"\xef\xbb\xbf" + (folder / "text.txt").read_bytes())
    config = tmp_path / "folder" / "model" / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    done = [convert(path, tmp_path / f"out{number}") for number, path in enumerate((folder, tmp_path / "folder"))]
    assert [one.exit_code for one in done] == [0, 0], done[1].output
    assert done[0].output.splitlines()[0] == done[1].output.splitlines()[0]


@pytest.mark.parametrize("kind, share", [("int8", 0.35), ("int4", 0.35)])
def test_a_quantised_model_comes_back(folder, tmp_path, kind, share):
    done = convert(folder, tmp_path / "out", kind=kind)
    assert done.exit_code == 0, done.output + str(done.exception)
    assert "perplexity" in done.output and "before" in done.output
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        notes = file.metadata()
    assert notes["fastlm_quantised"] == kind and float(notes["perplexity_before"]) > 1
    got = fastlm.GPT2.from_pretrained(tmp_path / "out")
    wanted = quantise_(fastlm.GPT2.from_pretrained(folder / "model"), kind)
    assert got.quantised == kind and got.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), wanted.parameters()))
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "out", folder / "model")]
    assert sizes[0] < share * sizes[1]
    ids = Tokenizer.load(tmp_path / "out").encode((folder / "text.txt").read_text())
    assert perplexity(got, ids) == pytest.approx(float(notes["perplexity_after"]), rel=1e-4)
    got.save_pretrained(tmp_path / "plain")  # what stock programs read
    plain = fastlm.GPT2.from_pretrained(tmp_path / "plain")
    assert plain.quantised is None and all(torch.equal(a, b) for a, b in zip(got.parameters(), plain.parameters()))


def test_perplexity_is_the_mean_loss(folder, monkeypatch):
    model = fastlm.GPT2.from_pretrained(folder / "model")
    ids = torch.randint(257, (100,), generator=torch.Generator().manual_seed(0))
    losses = []
    with torch.no_grad():
        for window in ids.split(48):
            loss = torch.nn.functional.cross_entropy(model(window[None, :-1])[0][0], window[1:], reduction="none")
            losses += loss.tolist()
    wanted = math.exp(sum(losses) / len(losses))
    assert perplexity(model, ids) == pytest.approx(wanted, rel=1e-5)
    with fastlm.use("torch"):
        assert perplexity(model, ids) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="1 tokens, wanted at least two"):
        perplexity(model, ids[:1])


@pytest.mark.parametrize("arguments, told", [
    ({"kind": "int5"}, "--dtype is 'int5', wanted int8 or int4"),
    ({"model": "nowhere"}, "is no directory"),
])
def test_bad_input(folder, tmp_path, arguments, told):
    done = convert(folder, tmp_path / "out", **arguments)
    assert isinstance(done.exception, ValueError) and told in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_kind_that_is_none(folder, tmp_path):
    model = fastlm.GPT2.from_pretrained(folder / "model")
    with pytest.raises(ValueError, match="kind is None, wanted int8 or int4"):
        save_quantised(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_nor_quantised_twice(folder, tmp_path):
    assert convert(folder, tmp_path / "out").exit_code == 0
    assert "exists; pass another" in str(convert(folder, tmp_path / "out").exception)
    (tmp_path / "text.txt").write_text("text")
    done = convert(tmp_path, tmp_path / "again", model="out")
    assert "is int8 already" in str(done.exception)


NAME = "transformer.h.0.mlp.c_fc.weight"


@pytest.mark.parametrize("kind, change, told", [
    ("int8", lambda tensors: tensors.pop(f"{NAME}_scale"), f"{NAME} has no {NAME}_scale"),
    ("int8", lambda tensors: tensors.update({f"{NAME}_scale": torch.ones(7)}), "but config.json makes it"),
    ("int4", lambda tensors: tensors.update({NAME: tensors[NAME][:3]}), "but config.json makes it"),
    ("int3", lambda tensors: None, "weights are 'int3', wanted int8 or int4"),
    (None, lambda tensors: None, "wanted a floating-point tensor"),
])
def test_a_damaged_file_is_named(folder, tmp_path, kind, change, told):
    convert(folder, tmp_path / "out", kind=kind if kind in ("int8", "int4") else "int8")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    if kind is None:
        tensors = {name: value for name, value in tensors.items() if not name.endswith("_scale")}
    change(tensors)
    save_file(tensors, path, metadata={"fastlm_quantised": kind} if kind else None)
    with pytest.raises(ValueError, match="model.safetensors: .*" + told):
        fastlm.GPT2.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("names, line", [
    (["pytorch_model.bin"], "from_pretrained"),
    (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], "from_pretrained"),
    (["tf_model.h5"], "from_tf=True"), (["flax_model.msgpack"], "from_flax=True"), (["model.gguf"], None), ([], None),
])
def test_weights_in_another_format_are_named_with_the_line_that_converts_them(tmp_path, names, line):
    model = fastlm.GPT2(fastlm.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name in names:
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/unpickled'\ntR.")  # as a pickle it would run
    with pytest.raises(ValueError, match="has no model.safetensors") as raised:
        fastlm.GPT2.from_pretrained(tmp_path)
    told = str(raised.value)
    assert any(name in told for name in names) == bool(names) and not os.path.exists("/tmp/unpickled")
    if line:
        assert f"GPT2LMHeadModel.from_pretrained('{tmp_path}'" in told and line in told and "save_pretrained(" in told


def test_the_line_that_converts_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0))
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError) as raised:
        fastlm.GPT2.from_pretrained(tmp_path)
    line = re.search(r'python -c "(.*)"', str(raised.value))[1]
    subprocess.run([sys.executable, "-c", line], check=True, timeout=120, capture_output=True)
    ours = fastlm.GPT2.from_pretrained(tmp_path)
    assert torch.equal(ours.transformer.wte.weight, theirs.transformer.wte.weight)


def test_a_full_disk_is_told_and_leaves_the_model_that_was_there(tmp_path, monkeypatch):
    model = fastlm.GPT2(fastlm.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    model.save_pretrained(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, "save_file", full)
    with pytest.raises(RuntimeError, match="out: the model could not be written .No space left on device.; make room"):
        model.save_pretrained(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
