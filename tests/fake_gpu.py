"""What the host waits for on a GPU, found without one: parts of a step run on fake tensors of device cuda.

    python fake_gpu.py GUARD_LIBRARY      prints {part: [what waits, …]} as JSON

Tensors have shapes and devices and no numbers, so that an op which reads one on the host cannot run; copies between
host and device are noted. GUARD_LIBRARY gives a torch without CUDA the guard of devices that its autograd asks for.
The backward is not here: autograd's engine wants a real device.
"""

import ctypes
import json
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastlm
from fastlm.generation import KVCache
from fastlm.generation.sampling import Sampler
from fastlm.training.config import TrainConfig
from fastlm.training.optimizer import AdamW

READS = "_local_scalar_dense", "nonzero", "masked_select", "unique"  # what has as many results as the numbers say


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in READS):
            self.waits.append(str(function))
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.waits.append(f"{function} between devices")
        return result


def model(dropout):
    sizes = dict(vocab_size=97, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    with torch.device("cuda"):
        return fastlm.GPT2(fastlm.GPT2Config(**sizes, **rates))


def parts():
    """(name, function) of what a step consists of."""
    tokens, one = torch.zeros(2, 16, dtype=torch.int64, device="cuda"), torch.ones((), device="cuda")
    seed = torch.zeros(4, dtype=torch.int64, device="cuda")
    for name, dropout in (("plain", 0.0), ("dropout", 0.1)):
        gpt2 = model(dropout)
        yield f"{name} loss", lambda gpt2=gpt2: gpt2.loss(tokens, tokens, seed=seed, scale=one)
        mask = torch.ones_like(tokens)
        yield f"{name} logits", lambda gpt2=gpt2, mask=mask: gpt2(tokens, tokens, attention_mask=mask, seed=seed)
    gpt2 = model(0.0)
    optimizer = AdamW(gpt2, TrainConfig(data="", out=""))

    def update():
        for parameter in gpt2.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(*optimizer.gradients(), 1e-3)
        optimizer.zero_grad()

    yield "update", update
    decoding = model(0.0).eval()
    cache, draw = KVCache(decoding.config, 2, 20, device="cuda", dtype=torch.float32), Sampler(90, 0.7, 5, 0.9)

    def decode(T):
        counts = torch.full((2,), T, dtype=torch.int32, device="cuda")
        hidden = decoding.hidden(tokens[:, :T], positions=cache.begin(counts, T), cache=cache)
        cache.end()
        draw(decoding.lm_head(hidden[:, 0]), torch.zeros(2, dtype=torch.float64, device="cuda"))

    yield "prompt", torch.no_grad()(lambda: decode(16))
    yield "decode", torch.no_grad()(lambda: decode(1))
    yield "a number that is read", lambda: float(one)
    yield "a copy to the host", lambda: tokens.cpu()
    yield "a copy to the device", lambda: torch.zeros(3, device="cpu").to("cuda")


def main():
    ctypes.CDLL(sys.argv[1])
    found = {}
    with FakeTensorMode():
        for dtype in "fp32", "bf16":
            torch.set_autocast_enabled("cuda", dtype == "bf16")
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            for name, run in parts():
                watch = Watch()
                try:
                    with watch:
                        run()
                except Exception as error:  # a read has no result here
                    watch.waits.append(f"{type(error).__name__}: {error}")
                found[f"{name} {dtype}"] = watch.waits
    print(json.dumps(found))


if __name__ == "__main__":
    main()
