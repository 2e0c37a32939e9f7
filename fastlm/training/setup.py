"""What a run begins with: its device, its data, its model, and the backends of its ops."""

from functools import partial
from pathlib import Path

import torch

from fastlm import dispatch
from fastlm.config import GPT2Config
from fastlm.data.fingerprint import KINDS, differences
from fastlm.data.loader import Loader
from fastlm.data.prepare import MANIFEST, Corpus, load_manifest, prepare
from fastlm.data.shards import read_split
from fastlm.data.tokenizer import Tokenizer, has_tokenizer
from fastlm.dispatch.table import TABLE
from fastlm.gpt2 import GPT2
from fastlm.ops import adamw_
from fastlm.pretrained import find, shape_head
from fastlm.training.config import TrainConfig
from fastlm.training.step import autocast


def find_device(name):
    """The torch.device of a setting: "auto", "cpu", "cuda", "cuda:1" … ValueError where there is none of that name."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}, wanted auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but this machine has no CUDA GPU that torch can use; use device=cpu")
    return device


def find_dtype(config, device):
    """The settings with dtype "fp32" or "bf16", as a device has it. ValueError for a residual that does not go with it.
    """
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if config.residual == "bf16" and dtype != "bf16":
        raise ValueError(f"residual is 'bf16', but the products are in {dtype}; set dtype=bf16 too")
    return config.model_copy(update={"dtype": dtype})


def find_data(config, asked, tell, *, resumed=False):
    """(directory of shards, their Tokenizer): the directory given, or OUT/data made from the text given.

    asked: names of the settings that somebody gave; a setting that the data was not made with is refused where it was
    asked for, and yields where not. Data of OUT that was made of other text or settings is made anew, but that of a
    run that is `resumed` stays. `tell` hears of it.
    """
    given, made = Path(config.data), Path(config.out) / "data"
    base = None if config.init_from is None or resumed else _base_tokenizer(config.init_from)
    if (given / MANIFEST).is_file():
        manifest, tokenizer = load_manifest(given), Tokenizer.load(given)
        _check_asked(given, manifest, tokenizer, config, asked)
        directory = given
    elif given.is_dir() and list(given.glob("*train*.bin")):  # shards that another program wrote
        directory, tokenizer = given, _tokenizer_of_shards(given, config, asked, base, resumed)
    elif resumed and (made / MANIFEST).is_file():
        manifest, tokenizer = load_manifest(made), Tokenizer.load(made)
        _check_asked(made, manifest, tokenizer, config, asked)
        if "data" in asked and "other text" in differences(manifest, Corpus([given], leave_out=made), "bytes", None,
                                                           config.val_fraction)[0]:
            raise ValueError(f"data is {given}, other text than the run in {config.out} began with; pass another --out")
        directory = made
    else:
        directory, tokenizer = _make_data(given, made, config, asked, base, tell)
    if base is not None and base.backend.get_vocab() != tokenizer.backend.get_vocab() and not (
        "tokenizer" in asked and config.tokenizer not in KINDS
    ):
        raise ValueError(
            f"{directory}: was tokenised with another vocabulary ({tokenizer.vocab_size} tokens) than that of "
            f"init_from={config.init_from} ({base.vocab_size}); pass its text as --data without a tokenizer, or "
            "the tokenizer that is meant, --set tokenizer=PATH"
        )
    return directory, tokenizer


def _base_tokenizer(name):
    """The Tokenizer of the checkpoint to start from, or None where it has none."""
    directory = find(name)
    return Tokenizer.load(directory) if has_tokenizer(directory) else None


def _check_asked(directory, manifest, tokenizer, config, asked):
    """Raises ValueError where a setting that was asked for is not what the data was made with."""
    made_with = manifest.get("fingerprint") if isinstance(manifest.get("fingerprint"), dict) else {}
    again = "prepare the text again, or leave the setting out"
    if "tokenizer" in asked:
        same = (tokenizer.kind == config.tokenizer if config.tokenizer in KINDS else
                Tokenizer.load(config.tokenizer).backend.get_vocab() == tokenizer.backend.get_vocab())
        if not same:
            raise ValueError(f"tokenizer is {config.tokenizer!r}, but {directory} was prepared with "
                             f"{manifest.get('tokenizer')}; {again}")
    if "vocab_size" in asked and config.vocab_size not in (None, tokenizer.vocab_size, made_with.get("vocab_size")):
        raise ValueError(f"vocab_size is {config.vocab_size}, but {directory} was prepared with "
                         f"{tokenizer.vocab_size}; {again}")
    if "val_fraction" in asked and config.val_fraction != manifest.get("val_fraction"):
        raise ValueError(f"val_fraction is {config.val_fraction}, but {directory} was prepared with "
                         f"{manifest.get('val_fraction')}; {again}")


def _tokenizer_of_shards(directory, config, asked, base, resumed):
    """The Tokenizer of shards that another program wrote: the one asked for, the one beside them, or the base's."""
    if "val_fraction" in asked and config.val_fraction:
        raise ValueError(f"val_fraction is {config.val_fraction}, but {directory} holds shards, split already; "
                         "leave it out, or 0 trains without a held-out split")
    own, out = has_tokenizer(directory), Path(config.out)
    if resumed and "tokenizer" not in asked and has_tokenizer(out):
        return Tokenizer.load(out)
    named = config.tokenizer if config.tokenizer not in ("bpe", "chars") else None  # made of a text, here is none
    if "tokenizer" in asked or (resumed and named):
        if named is None:
            raise ValueError(f"tokenizer is {config.tokenizer!r}, which is made of a text, but {directory} holds "
                             "shards; pass the one that made them, --set tokenizer=PATH")
        return Tokenizer.bytes() if named == "bytes" else Tokenizer.load(named)
    if own or base is None:
        try:
            return Tokenizer.load(directory)
        except ValueError as error:
            raise ValueError(f"{error}; pass the tokenizer of these shards, --set tokenizer=PATH") from None
    return base


def _make_data(given, made, config, asked, base, tell):
    """OUT/data and its Tokenizer, made of the text `given` unless it was made so before."""
    tokenizer = config.tokenizer
    if base is not None and "tokenizer" not in asked:
        tokenizer = str(find(config.init_from))  # as the manifest and train.json name it
    vocab_size = config.vocab_size if tokenizer == "bpe" or "vocab_size" in asked else None
    settings = {"tokenizer": tokenizer, "vocab_size": vocab_size, "val_fraction": config.val_fraction}
    again = (made / MANIFEST).is_file()
    if again:
        try:
            found, compared = differences(load_manifest(made), Corpus([given], leave_out=made), **settings)
        except ValueError as error:
            if str(made) not in str(error):
                raise
            found, compared = [str(error)], True
        if not found:
            if not compared:
                tell("say", f"{made} has no fingerprint, as data of earlier versions: it is taken, for its characters "
                            "and settings are those of this run")
            return made, Tokenizer.load(made)
        tell("say", f"{made} was made of {', '.join(found)}: it is made anew")
    manifest = prepare([given], made, **settings, overwrite=again, progress=partial(tell, "preparing"))
    tell("prepared", manifest)
    return made, Tokenizer.load(made)


def find_loaders(config, directory, tokenizer):
    """The Loaders of a directory's train and val split; None for val where val_fraction is 0."""
    splits, manifest = ["train", "val"], None
    if (directory / MANIFEST).is_file():
        manifest = load_manifest(directory)
    nothing = not manifest["val_tokens"] if manifest else not any(directory.glob("*val*.bin"))
    if nothing and config.val_fraction:
        why = "it was prepared with --val-fraction 0" if manifest else "it has no val_*.bin"
        raise ValueError(f"{directory}: holds no text out to evaluate on ({why}); prepare it again with "
                         "--val-fraction 0.1, or train without evaluation, --set val_fraction=0")
    if nothing or (not config.val_fraction and not manifest):
        splits = ["train"]
    loaders = [Loader(read_split(directory, split), config.sequence_length, config.batch_size, tokenizer.vocab_size,
                      config.seed) for split in splits]
    return loaders if len(loaders) == 2 else (*loaders, None)


def make_model(config, tokenizer, *, asked=(), resumed=None):
    """The GPT2 to train, on the CPU: with random weights, or those of init_from, whose sizes are its own.

    Dropout is the setting where it was asked for, otherwise the checkpoint's. A run that goes on from the checkpoint
    `resumed` has the sizes of that and of OUT/config.json; init_from is not read again. Raises ValueError where a size
    that was asked for is not that of init_from, or where that has fewer tokens than the text needs, or positions for
    shorter sequences.
    """
    vocab, multiple = tokenizer.vocab_size, config.pad_vocab_to_multiple_of
    if config.init_from is not None:
        model = _base_model(config, asked, resumed)
        roles = {tokenizer.backend.token_to_id(token) for token in tokenizer.roles.values() if isinstance(token, str)}
        # A pad that the tokenizer adds to a model without one occurs in no text.
        if set(range(model.config.vocab_size, vocab)) - roles or model.config.n_positions < config.sequence_length:
            raise ValueError(
                f"{config.init_from}: has vocab_size {model.config.vocab_size} and n_positions "
                f"{model.config.n_positions}, but the run needs {vocab} and {config.sequence_length}; set "
                f"sequence_length to {model.config.n_positions} or less, and take its own tokenizer"
            )
        if model.config.vocab_size % multiple:
            model.resize_token_embeddings(pad_to_multiple_of=multiple)
        if model.config.unpadded_vocab_size is None and vocab < model.config.vocab_size:
            model.config = model.config.model_copy(update={"unpadded_vocab_size": vocab})
        return model
    end, rows = tokenizer.end_of_text, -(-vocab // multiple) * multiple
    return GPT2(GPT2Config(
        vocab_size=rows, n_positions=config.sequence_length, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, embd_pdrop=config.dropout, attn_pdrop=config.dropout, resid_pdrop=config.dropout,
        bos_token_id=end, eos_token_id=end, unpadded_vocab_size=vocab if vocab < rows else None,
    ))


def _base_model(config, asked, resumed):
    saved = Path(config.out) / "config.json"
    if resumed is not None and saved.is_file():
        model = GPT2(GPT2Config.load(saved))
        shape_head(model, resumed)
    else:
        model = GPT2.from_pretrained(config.init_from)
    for name in SIZES:
        if name in asked and getattr(config, name) != getattr(model.config, name):
            raise ValueError(f"{name} is {getattr(config, name)}, but init_from={config.init_from} has "
                             f"{getattr(model.config, name)}; leave {name} out")
    if "dropout" in asked:
        model.config = model.config.model_copy(update=dict.fromkeys(DROPOUTS, config.dropout))
        for block in model.transformer.h:
            block.attn.dropout = block.attn.residual_dropout = block.mlp.residual_dropout = config.dropout
    model.quantised = None  # what is trained is rounded no more
    return model.train()


def settled(config, model, directory):
    """The settings with what the run has in place of what it did not ask for: the checkpoint's sizes and dropout, and
    the tokenizer and val_fraction that the data was prepared with.
    """
    changes = {}
    if config.init_from is not None:
        changes = {name: getattr(model.config, name) for name in SIZES}
        changes["dropout"] = max(getattr(model.config, name) for name in DROPOUTS)
    if (directory / MANIFEST).is_file():
        manifest = load_manifest(directory)
        changes |= {name: manifest[name] for name, kind in (("tokenizer", str), ("val_fraction", (int, float)))
                    if isinstance(manifest.get(name), kind)}
    if changes.get("tokenizer", config.tokenizer) != "bpe":
        changes["vocab_size"] = None  # a preset's, of a vocabulary that was not made
    return TrainConfig(**{**config.model_dump(), **changes})


SIZES = "n_layer", "n_head", "n_embd"
DROPOUTS = "embd_pdrop", "attn_pdrop", "resid_pdrop"


def find_backends(model, optimizer, dtype):
    """{op: backend} that the model's step in dtype runs on here, found by a step on two tokens that changes nothing.

    An op whose parts run on several backends has the first's, and each torch op that runs on another stands beside
    it: {"attention": "cuda", "attention_qkv_bwd": "torch"}.
    """
    state, device = torch.get_rng_state(), next(model.parameters()).device
    with dispatch.record() as calls, autocast(dtype, device.type):
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
        model.loss(tokens, tokens).backward()
        optimizer.gradients()
        adamw_(*(torch.zeros(1, device=device) for _ in range(4)), step=1, learning_rate=0.0)
    optimizer.zero_grad()
    torch.set_rng_state(state)
    backends = {}
    for op, backend in calls:
        if backends.setdefault(TABLE[op].family, backend) != backend:
            backends[op] = backend
    return backends
