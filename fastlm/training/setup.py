"""What a run begins with: its device, its data, its model, and the backends of its ops."""

from functools import partial
from pathlib import Path

import torch

from fastlm import dispatch
from fastlm.config import GPT2Config
from fastlm.data.prepare import MANIFEST, load_manifest, prepare
from fastlm.dispatch.table import TABLE
from fastlm.gpt2 import GPT2
from fastlm.ops import adamw_
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


def find_shards(config, tell):
    """The directory of shards: the one given, or OUT/data made from the text given, of which `tell` hears."""
    given, made = Path(config.data), Path(config.out) / "data"
    for directory in (given, made):
        if (directory / MANIFEST).is_file():
            load_manifest(directory)
            return directory
    if given.is_dir() and list(given.glob("*train*.bin")):  # shards that another program wrote
        return given
    manifest = prepare(
        [given], made, tokenizer=config.tokenizer, vocab_size=config.vocab_size, val_fraction=config.val_fraction,
        progress=partial(tell, "preparing"),
    )
    tell("prepared", manifest)
    return made


def make_model(config, tokenizer):
    """The GPT2 to train, on the CPU: with random weights, or those of init_from.

    Raises ValueError where init_from has another vocabulary, or positions for shorter sequences.
    """
    vocab = tokenizer.vocab_size
    if config.init_from is not None:
        model = GPT2.from_pretrained(config.init_from).train()
        if model.config.vocab_size != vocab or model.config.n_positions < config.sequence_length:
            raise ValueError(
                f"{config.init_from}: has vocab_size {model.config.vocab_size} and n_positions "
                f"{model.config.n_positions}, but the run needs {vocab} and {config.sequence_length}"
            )
        return model
    end = tokenizer.end_of_text
    return GPT2(GPT2Config(
        vocab_size=vocab, n_positions=config.sequence_length, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, embd_pdrop=config.dropout, attn_pdrop=config.dropout, resid_pdrop=config.dropout,
        bos_token_id=end, eos_token_id=end,
    ))


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
