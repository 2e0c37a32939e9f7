"""What the two programs, generation and training, share: the same GPT-2 in fastlm and in transformers, and costs."""

import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import fastlm
from fastlm.certificate import transformers_twin

MODEL = {"L": 12, "H": 12, "C": 768, "V": 50257}  # GPT-2 124M


@dataclass(frozen=True)
class Program:
    """A program at one shape (letters → sizes, H divides C) in one dtype; what `run` returns are its rows."""

    shape: dict[str, int]
    dtype: str
    passes = 1

    def __post_init__(self):
        if self.shape["C"] % self.shape.get("H", 1):
            raise ValueError(f"{self.op}: C={self.shape['C']} is no multiple of H={self.shape['H']}")

    @property
    def name(self):
        return f"{self.op} {self.dtype} " + " ".join(f"{letter}={size}" for letter, size in self.shape.items())


def absent():
    """peer → the sentence why it does not take part."""
    if importlib.util.find_spec("transformers") is None:
        return {"transformers": "not installed: pip install transformers"}
    return {}


def pair(shape, positions, device):
    """(our GPT2, transformers' GPT2LMHeadModel or None): the same random weights in fp32, no dropout."""
    torch.manual_seed(0)
    off = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    config = fastlm.GPT2Config(
        vocab_size=shape["V"], n_positions=positions, n_embd=shape["C"], n_layer=shape["L"], n_head=shape["H"],
        bos_token_id=None, eos_token_id=None, **off,
    )
    ours = fastlm.GPT2(config).to(device)
    if absent():
        return ours, None
    theirs = transformers_twin(ours)
    theirs.generation_config.pad_token_id = 0
    return ours, theirs


def weights(shape):
    """Parameters that multiply something for every token: the blocks and the head, not the positions."""
    L, C, V = shape["L"], shape["C"], shape["V"]
    return L * (12 * C * C + 13 * C) + V * C + 2 * C


def plain_loss(model, tokens, targets):
    """The loss of a GPT2 as nanoGPT and others write it: PyTorch's own functions, logits as a whole."""
    parts, H = model.transformer, model.config.n_head
    B, T = tokens.shape
    x = F.embedding(tokens, parts["wte"].weight) + parts["wpe"].weight[:T]

    def norm(module, x):
        return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)

    def linear(module, x):
        return torch.matmul(x, module.weight) + module.bias

    for block in parts["h"]:
        q, k, v = (part.view(B, T, H, -1).transpose(1, 2)
                   for part in linear(block.attn.c_attn, norm(block.ln_1, x)).chunk(3, dim=-1))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)
        x = x + linear(block.attn.c_proj, o)
        up = linear(block.mlp.c_fc, norm(block.ln_2, x))
        x = x + linear(block.mlp.c_proj, F.gelu(up, approximate="tanh"))
    logits = F.linear(norm(parts["ln_f"], x), model.lm_head.weight)
    return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1))
