"""What a run begins with: data that fits its inputs and settings, a checkpoint to start from, settings that count."""

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from runs import SMALL, Notes, config, weights

import fastlm
from fastlm.data.prepare import load_manifest, prepare
from fastlm.data.shards import write_shard
from fastlm.data.tokenizer import Tokenizer
from fastlm.training.config import TrainConfig
from fastlm.training.curve import Curve
from fastlm.training.metrics import read_metrics
from fastlm.training.report import Terminal
from fastlm.training.sample import Sample
from fastlm.training.setup import find_dtype
from fastlm.training.trainer import Trainer


def text_of(trainer):
    return "".join(trainer.tokenizer.decode(tokens) for loader in (trainer.train_data, trainer.val_data) if loader
                   for tokens in loader.shards.values())


# ---- prepared data fits its inputs and settings


def test_text_that_was_added_counts(tmp_path):
    """The same command after "add text"."""
    text = tmp_path / "text.txt"
    text.write_text("too short for a sequence and what is held out\n")
    with pytest.raises(ValueError, match="add text"):
        Trainer(config(text, tmp_path / "run"))
    text.write_text("now it is long enough for both of them\n" * 40)
    notes = Notes()
    trainer = Trainer(config(text, tmp_path / "run"), listeners=[notes])
    assert text_of(trainer) == text.read_text()
    assert any("other text" in said and "made anew" in said for said in notes.said), notes.said


@pytest.mark.parametrize("change, told", [
    ({"tokenizer": "bytes"}, "tokenizer"), ({"val_fraction": 0.4}, "val_fraction"),
    ({"tokenizer": "bpe", "vocab_size": 270}, "vocab_size"), ({"data": "other.txt"}, "text"),
])
def test_data_of_other_settings_is_made_anew(tmp_path, text, change, told):
    first = {"tokenizer": "bpe", "vocab_size": 280} if "vocab_size" in change else {}
    Trainer(config(text, tmp_path / "run", **first))
    if "data" in change:
        change["data"] = str(tmp_path / change["data"])
        (tmp_path / "other.txt").write_text(text.read_text().replace("so", "on"))
    notes = Notes()
    trainer = Trainer(config(text, tmp_path / "run", **{**first, **change}), listeners=[notes])
    assert any(told in said and "made anew" in said for said in notes.said), notes.said
    whole = Trainer(config(text, tmp_path / "whole", **{**first, **change}))
    assert trainer.tokenizer.vocab_size == whole.tokenizer.vocab_size
    assert text_of(trainer) == text_of(whole) and trainer.val_data.tokens == whole.val_data.tokens


def test_a_tokenizer_that_changed_in_its_place_counts(tmp_path, text):
    Tokenizer.chars(text.read_text()).save(tmp_path / "vocabulary")
    Trainer(config(text, tmp_path / "run", tokenizer=str(tmp_path / "vocabulary")))
    Tokenizer.bytes().save(tmp_path / "vocabulary")
    trainer = Trainer(config(text, tmp_path / "run", tokenizer=str(tmp_path / "vocabulary")))
    assert trainer.tokenizer.vocab_size == 257


def test_data_that_fits_is_not_made_again(tmp_path, text):
    Trainer(config(text, tmp_path / "run"))
    made = tmp_path / "run" / "data" / "train_000000.bin"
    before = made.stat().st_mtime_ns
    Trainer(config(text, tmp_path / "run"))
    assert made.stat().st_mtime_ns == before


def test_damaged_data_of_a_run_is_made_anew(tmp_path, text):
    Trainer(config(text, tmp_path / "run"))
    made = tmp_path / "run" / "data" / "train_000000.bin"
    made.write_bytes(made.read_bytes()[:-1])
    assert text_of(Trainer(config(text, tmp_path / "run"))) == text.read_text()


def without_fingerprint(directory):
    values = json.loads((directory / "manifest.json").read_text())
    values.pop("fingerprint")
    (directory / "manifest.json").write_text(json.dumps(values))


def test_data_without_a_fingerprint_is_taken_as_far_as_it_can_be_checked(tmp_path, text):
    Trainer(config(text, tmp_path / "run"))
    made, notes = tmp_path / "run" / "data", Notes()
    without_fingerprint(made)
    before = (made / "train_000000.bin").stat().st_mtime_ns
    Trainer(config(text, tmp_path / "run"), listeners=[notes])
    assert (made / "train_000000.bin").stat().st_mtime_ns == before
    assert any("no fingerprint" in said for said in notes.said), notes.said
    notes = Notes()
    Trainer(config(text, tmp_path / "run", val_fraction=0.5), listeners=[notes])
    assert any("made anew" in said for said in notes.said)


def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path, text):
    own = tmp_path / "text.txt"
    own.write_text(text.read_text())
    Trainer(config(own, tmp_path / "run", steps=2)).run()
    own.unlink()
    assert Trainer.resume(tmp_path / "run", steps=3).run()
    (tmp_path / "other.txt").write_text(text.read_text().replace("so", "on"))
    for changes, told in (
        ({"tokenizer": "bytes"}, "tokenizer is 'bytes'"), ({"val_fraction": 0.5}, "val_fraction is 0.5"),
        ({"data": str(tmp_path / "other.txt")}, "other text"), ({"init_from": str(tmp_path)}, "init_from"),
    ):
        with pytest.raises(ValueError, match=told):
            Trainer.resume(tmp_path / "run", **changes)
    own.write_text(text.read_text())
    assert Trainer.resume(tmp_path / "run", data=str(own)).done


@pytest.mark.parametrize("asked, told", [
    ({"tokenizer": "bytes"}, "tokenizer is 'bytes', but .* bpe"),
    ({"vocab_size": 300}, "vocab_size is 300, but .* 280"), ({"val_fraction": 0.5}, "val_fraction is 0.5, but .* 0.1"),
])
def test_prepared_data_refuses_settings_that_it_was_not_made_with(tmp_path, text, asked, told):
    prepare([text], tmp_path / "data", tokenizer="bpe", vocab_size=280)
    sizes = {key: value for key, value in SMALL.items() if key != "tokenizer"}
    given = {**sizes, "data": str(tmp_path / "data"), "out": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=told):
        Trainer(TrainConfig(**given, **asked))
    trainer = Trainer(TrainConfig(**given, tokenizer="bpe", vocab_size=280, val_fraction=0.1))
    assert trainer.tokenizer.vocab_size == 280
    preset = TrainConfig(**{**given, "tokenizer": "chars", "vocab_size": 512})  # what a preset says yields
    trainer = Trainer(preset, asked={"data", "out"})
    assert trainer.config.tokenizer == "bpe"


def test_a_manifest_says_what_it_was_made_of(tmp_path, text):
    one, same, other = (prepare([text], tmp_path / name, tokenizer="chars", val_fraction=part)["fingerprint"]
                        for name, part in (("a", 0.1), ("b", 0.1), ("c", 0.2)))
    assert one == same != other and load_manifest(tmp_path / "a", verify=True)["fingerprint"] == one


# ---- a checkpoint to start from


@pytest.fixture
def base(tmp_path, text):
    """A model directory of 1 layer, with dropout 0.1, whose tokenizer is of characters and an id more than the text."""
    tokenizer = Tokenizer.chars(text.read_text() + "Z")
    torch.manual_seed(0)
    model = fastlm.GPT2(fastlm.GPT2Config(
        vocab_size=tokenizer.vocab_size, n_positions=24, n_embd=32, n_layer=1, n_head=4, embd_pdrop=0.1,
        attn_pdrop=0.1, resid_pdrop=0.1))
    model.save_pretrained(tmp_path / "base", tokenizer=tokenizer)
    return tmp_path / "base"


def from_base(base, text, out, **changes):
    sizes = {key: value for key, value in SMALL.items() if key not in ("tokenizer", "n_layer", "n_head", "n_embd",
                                                                       "dropout")}
    return TrainConfig(**{**sizes, "data": str(text), "out": str(out), "init_from": str(base), "steps": 4, **changes})


def test_a_checkpoint_brings_its_tokenizer_and_its_sizes(tmp_path, text, base):
    trainer = Trainer(from_base(base, text, tmp_path / "run"))
    own = Tokenizer.load(base)
    assert trainer.tokenizer.backend.get_vocab() == own.backend.get_vocab() and text_of(trainer) == text.read_text()
    assert all(torch.equal(value, weights(trainer)[name])
               for name, value in fastlm.GPT2.from_pretrained(base).named_parameters())
    assert trainer.run()
    settings = TrainConfig.load(tmp_path / "run" / "train.json")
    assert (settings.n_layer, settings.n_head, settings.n_embd, settings.dropout) == (1, 4, 32, 0.1)
    assert settings.tokenizer == str(base) and settings.vocab_size is None
    preset = {"tokenizer": "bpe", "vocab_size": 512, "n_layer": 4}  # what a preset says yields
    trainer = Trainer(from_base(base, text, tmp_path / "other", **preset), asked={"data", "out", "init_from"})
    assert trainer.tokenizer.kind == "chars" and trainer.config.n_layer == 1


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_counts_in_a_checkpoint_that_is_trained_on(tmp_path, text, base, dropout):
    losses = []
    for name, changes in (("own", {}), ("asked", {"dropout": dropout})):
        trainer = Trainer(from_base(base, text, tmp_path / name, **changes))
        losses.append([trainer.train_step()[0] for _ in range(3)])
    assert losses[0] != losses[1]
    assert trainer.config.dropout == dropout
    assert {getattr(trainer.state.model.config, f"{part}_pdrop") for part in ("embd", "attn", "resid")} == {dropout}
    assert {block.attn.dropout for block in trainer.state.model.transformer.h} == {dropout}


def test_a_run_from_a_checkpoint_is_resumed_without_it(tmp_path, text, base):
    Trainer(from_base(base, text, tmp_path / "whole", dropout=0.5, steps=6)).run()
    Trainer(from_base(base, text, tmp_path / "run", dropout=0.5, steps=4)).run()
    base.rename(tmp_path / "elsewhere")
    trainer = Trainer.resume(tmp_path / "run", steps=6)
    assert trainer.config.dropout == 0.5 and trainer.run()
    wanted = fastlm.GPT2.from_pretrained(tmp_path / "whole")
    model = fastlm.GPT2.from_pretrained(tmp_path / "run")
    assert model.config.embd_pdrop == 0.5 == trainer.state.model.config.embd_pdrop
    assert all(a.shape == b.shape for a, b in zip(wanted.parameters(), model.parameters()))


@pytest.mark.parametrize("changes, told", [
    ({"n_layer": 6}, "n_layer is 6, but init_from=.* has 1; leave n_layer out"), ({"n_head": 2}, "n_head is 2"),
    ({"n_embd": 64}, "n_embd is 64"), ({"sequence_length": 25}, "n_positions 24, .* sequence_length to 24 or less"),
    ({"tokenizer": "bpe"}, "another vocabulary"), ({"tokenizer": "bytes"}, "another vocabulary"),
])
def test_what_a_checkpoint_is_not_is_refused(tmp_path, text, base, changes, told):
    with pytest.raises(ValueError, match=told):
        Trainer(from_base(base, text, tmp_path / "run", **changes))


def test_data_of_another_vocabulary_of_the_same_size_is_refused(tmp_path, text, base):
    other = Tokenizer.chars(text.read_text() + "Y")
    prepare([text], tmp_path / "data", tokenizer=other)
    with pytest.raises(ValueError, match="another vocabulary .* init_from"):
        Trainer(from_base(base, tmp_path / "data", tmp_path / "run"))


def test_a_padded_vocabulary_is_trained_on_and_its_pads_never_drawn(tmp_path, text, base):
    tokenizer = Tokenizer.load(base)
    config = fastlm.GPT2Config(vocab_size=tokenizer.vocab_size + 40, n_positions=24, n_embd=32, n_layer=1, n_head=4)
    fastlm.GPT2(config).save_pretrained(tmp_path / "padded", tokenizer=tokenizer)
    notes = Notes()
    given = from_base(tmp_path / "padded", text, tmp_path / "run", sample_tokens=40)
    trainer = Trainer(given, listeners=[notes, Sample()])
    assert trainer.run() and any("a sample" in said for said in notes.said)
    assert trainer.state.model.config.vocab_size == tokenizer.vocab_size + 40
    assert Trainer.resume(tmp_path / "run", steps=5).run()


@pytest.mark.parametrize("what", ["new", "padded before", "fine-tuned"])
def test_a_vocabulary_is_padded_to_a_multiple(tmp_path, text, base, what):
    changes = {"pad_vocab_to_multiple_of": 32, "sample_tokens": 40}
    if what == "new":
        config = TrainConfig(**{**SMALL, "data": str(text), "out": str(tmp_path / "run"), "steps": 4, **changes})
    else:
        if what == "padded before":
            model = fastlm.GPT2.from_pretrained(base)
            model.resize_token_embeddings(pad_to_multiple_of=32)
            model.save_pretrained(tmp_path / "base", tokenizer=Tokenizer.load(base))
        config = from_base(tmp_path / "base" if what == "padded before" else base, text, tmp_path / "run", **changes)
    notes = Notes()
    trainer = Trainer(config, listeners=[notes, Sample()])
    tokens = trainer.tokenizer.vocab_size
    assert tokens % 32 and trainer.run() and any("a sample" in said for said in notes.said)
    model = fastlm.GPT2.from_pretrained(tmp_path / "run")
    assert model.config.vocab_size == -(-tokens // 32) * 32 and model.config.unpadded_vocab_size == tokens
    with torch.no_grad():
        model.transformer.wte.weight[tokens:] = 3 * model.transformer.wte.weight[:1]
    rows = model.generate([[1]], max_new_tokens=15, num_return_sequences=8, temperature=5.0)
    assert max(int(row.max()) for row in rows) < tokens
    assert Trainer.resume(tmp_path / "run", steps=5).run()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 7])
def test_a_checkpoint_with_a_head_of_its_own_is_trained_on(tmp_path, text, base, bias, rows):
    model = fastlm.GPT2.from_pretrained(base)
    model.lm_head = torch.nn.Linear(32, model.config.vocab_size + rows, bias=bias)
    model.save_pretrained(tmp_path / "base", tokenizer=Tokenizer.load(base))
    trainer = Trainer(from_base(tmp_path / "base", text, tmp_path / "run", dropout=0.0))
    before = {name: value.clone() for name, value in weights(trainer).items() if name.startswith("lm_head")}
    assert list(before) == ["lm_head.weight", "lm_head.bias"][: 1 + bias] and trainer.run()
    assert not any(torch.equal(value, weights(trainer)[name]) for name, value in before.items())
    again = fastlm.GPT2.from_pretrained(tmp_path / "run")
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in again.named_parameters())
    shutil.rmtree(tmp_path / "base")
    assert Trainer.resume(tmp_path / "run", steps=5).run()


def test_a_pad_that_the_tokenizer_adds_to_a_model_without_one(tmp_path, text):
    """As GPT-2 with pad_token "[PAD]": 50258 tokens of the tokenizer, 50257 of the model. The role is kept."""
    model = fastlm.GPT2(fastlm.GPT2Config(vocab_size=257, n_positions=24, n_embd=32, n_layer=1, n_head=4))
    model.save_pretrained(tmp_path / "base", tokenizer=Tokenizer.bytes())
    path = tmp_path / "base" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "[PAD]"}))
    trainer = Trainer(from_base(tmp_path / "base", text, tmp_path / "run"))
    assert trainer.tokenizer.vocab_size == 258 and trainer.run()
    saved = Tokenizer.load(tmp_path / "run")
    assert saved.roles["pad_token"] == "[PAD]" and saved.max_length == 24
    path.write_text(json.dumps({**json.loads(path.read_text()), "additional_special_tokens": ["<speaker>"]}))
    with pytest.raises(ValueError, match="has vocab_size 257 .* but the run needs 259"):
        Trainer(from_base(tmp_path / "base", text, tmp_path / "other"))


# ---- shards of another program, and data without a held-out split


def shards(folder, text, tokenizer, splits=("train", "val")):
    folder.mkdir()
    ids = tokenizer.encode_array(text.read_text())
    for split, part in (("train", ids[:-500]), ("val", ids[-500:])):
        if split in splits:
            write_shard(folder / f"tiny_{split}.bin", part)
    return folder


def test_shards_of_another_program_take_a_tokenizer(tmp_path, text):
    tokenizer = Tokenizer.chars(text.read_text())
    tokenizer.save(tmp_path / "vocabulary")
    data = shards(tmp_path / "shards", text, tokenizer)
    with pytest.raises(ValueError, match="shards: has neither tokenizer.json .* --set tokenizer=PATH"):
        Trainer(config(data, tmp_path / "run"), asked={"data", "out"})
    with pytest.raises(ValueError, match="tokenizer is 'chars', which is made of a text"):
        Trainer(config(data, tmp_path / "run"))
    with pytest.raises(ValueError, match="val_fraction is 0.3, but .* split already"):
        Trainer(config(data, tmp_path / "run", tokenizer=str(tmp_path / "vocabulary"), val_fraction=0.3))
    trainer = Trainer(config(data, tmp_path / "run", tokenizer=str(tmp_path / "vocabulary"), steps=2))
    assert text_of(trainer) == text.read_text() and trainer.run()
    (tmp_path / "vocabulary").rename(tmp_path / "elsewhere")
    assert Trainer.resume(tmp_path / "run", steps=3).run()  # with what OUT holds
    byte = shards(tmp_path / "bytes", text, Tokenizer.bytes())
    assert text_of(Trainer(config(byte, tmp_path / "other", tokenizer="bytes"))) == text.read_text()


def test_data_without_a_held_out_split_says_why_and_trains_where_asked(tmp_path, text):
    prepare([text], tmp_path / "data", tokenizer="chars", val_fraction=0)
    with pytest.raises(ValueError, match="prepared with --val-fraction 0.; prepare .*--set val_fraction=0"):
        Trainer(config(tmp_path / "data", tmp_path / "run"))
    bare = shards(tmp_path / "shards", text, Tokenizer.bytes(), ["train"])
    with pytest.raises(ValueError, match="it has no val_.*.bin.*--set val_fraction=0"):
        Trainer(config(bare, tmp_path / "run", tokenizer="bytes"))
    for number, (data, changes) in enumerate((
        (tmp_path / "data", {}), (bare, {"tokenizer": "bytes"}), (text, {"sample_tokens": 4}),
    )):
        out, notes = tmp_path / f"run{number}", Notes()
        console = Console(file=io.StringIO(), width=200)
        listeners = Terminal(console), Curve(), Sample(), notes
        trainer = Trainer(config(data, out, val_fraction=0, steps=3, **changes), listeners=listeners)
        assert trainer.val_data is None and trainer.run()
        rows = read_metrics(out / "metrics.jsonl")
        assert [row["val_loss"] for row in rows] == [None, None] and rows[-1]["train_loss"]
        assert "step      3: training" in console.file.getvalue() and "held out" not in console.file.getvalue().split(
            "parameters")[1]
        assert (out / "loss.png").is_file() and Trainer.resume(out, steps=4).run()


@pytest.mark.parametrize("asked, device, capability, found", [
    ("auto", "cpu", None, "fp32"), ("auto", "cuda", (9, 0), "bf16"), ("auto", "cuda", (8, 0), "bf16"),
    ("auto", "cuda", (7, 5), "fp32"), ("fp32", "cuda", (9, 0), "fp32"), ("bf16", "cpu", None, "bf16"),
])
def test_the_dtype_that_a_device_has(asked, device, capability, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    given = TrainConfig(data="x", out="y", dtype=asked)
    assert find_dtype(given, torch.device(device)).dtype == found
    narrow = TrainConfig(data="x", out="y", dtype=asked, residual="bf16")
    if found == "bf16":
        assert find_dtype(narrow, torch.device(device)).residual == "bf16"
    else:
        with pytest.raises(ValueError, match="residual is 'bf16', but the products are in fp32; set dtype=bf16 too"):
            find_dtype(narrow, torch.device(device))


def test_a_run_says_what_it_computes_in(text, tmp_path):
    file = io.StringIO()
    terminal = Terminal(Console(file=file, width=400))
    Trainer(config(text, tmp_path / "run", device="cpu", steps=1, recompute=True), listeners=[terminal]).run()
    told = "M parameters in fp32 on cpu, products in fp32, blocks computed again in the backward; "
    assert told in file.getvalue()
    assert json.loads((tmp_path / "run" / "train.json").read_text())["dtype"] == "fp32"
