"""The host never waits for a GPU within a step, forward, backward or update: proved on fake tensors, without one.

Tensors have shapes and devices and no numbers; ops run with the backends and launchers that a GPU is given, and their
kernels are counted, not run (fastlm.benchmarks.account). A number that is read, as many results as the numbers say, or
a copy between host and device is a wait.
"""

import pytest
import torch
from conftest import GPU

pytest.importorskip("triton", reason="triton is not installed")
if GPU:
    pytest.skip("a GPU is here: nothing is interpreted", allow_module_level=True)

import fastlm
from fastlm.benchmarks import account, fake_gpu
from fastlm.generation import KVCache
from fastlm.generation.sampling import Sampler
from fastlm.training.config import TrainConfig
from fastlm.training.optimizer import AdamW
from fastlm.training.step import autocast


def model(dropout=0.0):
    sizes = dict(vocab_size=97, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    with torch.device("cuda"):
        return fastlm.GPT2(fastlm.GPT2Config(**sizes, **rates))


def zeros(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype, device="cuda")


def training(dtype, dropout, logits):
    gpt2, tokens, seed, scale = model(dropout), zeros(2, 16), zeros(4), zeros(dtype=torch.float32)

    def run():
        with fake_gpu.autograd_of(gpt2.parameters()):
            with autocast(dtype, "cuda"):
                if logits:
                    _, loss = gpt2(tokens, tokens, attention_mask=torch.ones_like(tokens), seed=seed)
                else:
                    loss = gpt2.loss(tokens, tokens, seed=seed, scale=scale)
            loss.backward()
        assert all(parameter.grad is not None for parameter in gpt2.parameters())

    return run


def update(dtype):
    gpt2 = model()
    optimizer = AdamW(gpt2, TrainConfig(data="", out=""))

    def run():
        for parameter in gpt2.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(*optimizer.gradients(), 1e-3)
        optimizer.zero_grad()

    return run


def decoding(dtype, T):
    """A step of T tokens a sequence."""
    gpt2, tokens, counts = model().eval(), zeros(2, T), torch.full((2,), T, dtype=torch.int32, device="cuda")
    cache = KVCache(gpt2.config, 2, 20, device="cuda", dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    draw, uniform = Sampler(90, 0.7, 5, 0.9), zeros(2, dtype=torch.float64)

    def run():
        with fake_gpu.autograd_of(gpt2.parameters()), torch.no_grad(), autocast(dtype, "cuda"):
            hidden = gpt2.hidden(tokens, positions=cache.begin(counts, T), cache=cache)
            cache.end()
            draw(gpt2.lm_head(hidden[:, 0]), uniform)

    return run


PARTS = {
    "loss": lambda dtype: training(dtype, 0.0, False), "logits": lambda dtype: training(dtype, 0.0, True),
    "loss with dropout": lambda dtype: training(dtype, 0.1, False),
    "logits with dropout": lambda dtype: training(dtype, 0.1, True),
    "update": update, "prompt": lambda dtype: decoding(dtype, 16), "token": lambda dtype: decoding(dtype, 1),
}
WAITING = {
    "a number that is read": (lambda tensor: float(tensor.sum()), "_local_scalar_dense"),
    "a copy to the host": (lambda tensor: tensor.cpu(), "_to_copy between devices"),
    "a copy to the device": (lambda tensor: torch.zeros(3, device="cpu").to(tensor), "_to_copy between devices"),
    "as many results as the numbers say": (torch.nonzero, "nonzero"),
}


def waits(part):
    """What the host waits for in the function that part() makes on a GPU."""
    with account.counting() as counts:
        run, counts.account.waits = part(), []
        try:
            run()
        except torch._subclasses.fake_tensor.DynamicOutputShapeException:  # nobody knows how many results
            pass
        assert counts.account.rows
        return counts.account.waits


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_waited_for(part, dtype):
    assert waits(lambda: PARTS[part](dtype)) == []


@pytest.mark.parametrize("what", WAITING)
def test_what_waits_is_found(what):
    function, told = WAITING[what]
    assert waits(lambda: lambda: function(zeros(3, dtype=torch.float32))) == [f"{told}, forward"]


def test_what_waits_in_the_backward_is_found(monkeypatch):
    module = fastlm.ops.module("bias_gelu")
    gradients = module._gradients

    def reading(dy, *rest):
        float(dy.sum())
        return gradients(dy, *rest)

    monkeypatch.setattr(module, "_gradients", reading)
    found = waits(lambda: training("bf16", 0.0, False))
    assert len(found) == 2 and all("_local_scalar_dense at " in wait and wait.endswith(", backward") for wait in found)
