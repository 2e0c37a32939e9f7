"""What the ways to cut the CPU's products (fastlm/measure/cuts.py) are worth here, at a model's widths.

A case is a piece of work that goes through all products of a few layers; the candidates take turns at it. The fastest
by the geometric mean of an op's cases is kept.
"""

import math

import torch

from fastlm.dispatch.forcing import use
from fastlm.generation.cache import KVCache
from fastlm.generation.engine import Engine, cache_dtype
from fastlm.gpt2 import GPT2
from fastlm.measure import cuts, tuned
from fastlm.measure.clock import race
from fastlm.quantised import quantise_

LAYERS, VOCABULARY = 2, 4096  # enough to leave the caches


def cases(config, dtypes=None):
    """[(op, dtype of the weights)] that can be measured, in turn."""
    return [(op, dtype) for op in cuts.CANDIDATES for dtype in cuts.DTYPES[op] if not dtypes or dtype in dtypes]


def measure(config, op, dtype, *, seconds=1.0, rounds=(5, 50)):
    """A row of the tuned table: the fastest cut of an op with weights of a dtype, and the µs of every candidate."""
    config = config.model_copy(update={
        "n_layer": min(config.n_layer, LAYERS), "vocab_size": min(config.vocab_size, VOCABULARY), "attn_pdrop": 0.0,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None,
    })
    model = GPT2(config)
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    elif dtype in ("int8", "int4"):
        quantise_(model, dtype)
    parts = (_training if op == "gpt2_blocks" else _generation)(model)
    candidates = cuts.every(op)
    logs = [0.0] * len(candidates)
    for prepare in parts:
        calls = {}
        for number, cut in enumerate(candidates):
            with tuned.trying(op, cut):
                call = prepare()
                call()

            def tried(call=call, cut=cut):
                with tuned.trying(op, cut):
                    call()

            calls[str(number)] = [tried]
        times = race(calls, seconds=seconds / len(candidates), rounds=rounds)
        logs = [log + math.log(times[str(number)].median) for number, log in enumerate(logs)]
    means = [math.exp(log / len(parts)) * 1e6 for log in logs]
    best = min(range(len(means)), key=means.__getitem__)
    # The usual one stays unless another is clearly faster: two that are alike change places from run to run.
    best = best if means[best] < 0.97 * means[0] else 0
    return {"op": op, "dtype": dtype, "cut": candidates[best],
            "us": {_name(cut): mean for cut, mean in zip(candidates, means)}}


def _name(cut):
    return " ".join(f"{name}={value}" for name, value in cut.items())


def _generation(model):
    """A token of one sequence, of eight, and a prompt: functions that give the call."""
    config = model.config

    def step(B, T, held):
        def prepare():
            cache = KVCache(config, B, held + T, device="cpu", dtype=cache_dtype(model))
            for pages in (*cache.k_pages, *cache.v_pages):
                pages.zero_()
            engine, counts = Engine(model, cache), torch.full((B,), T, dtype=torch.int32)
            tokens = torch.arange(B * T).view(B, T) % config.vocab_size

            def call():
                cache.lengths.fill_(held)
                engine(tokens, counts)

            return call

        return prepare

    half = max(config.n_positions // 2, 1)
    return [step(1, 1, half - 1), step(8, 1, half - 1), step(1, half, 0)]


def _training(model):
    """A step forward and backward: a function that gives the call."""
    tokens = torch.arange(model.config.n_positions)[None] % model.config.vocab_size

    def prepare():
        def call():
            with use(gpt2_blocks="cpu"):
                model.hidden(tokens).sum().backward()
            model.zero_grad()

        return call

    return [prepare]
