"""What the two programs, generation and training, share: the same GPT-2 in fastlm and in transformers, and costs."""

import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import fastlm
from fastlm.measure.certificate import transformers_twin

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


def plain_block(x, weights, heads, epsilon=1e-5):
    """A block of GPT-2 as nanoGPT and others write it, of x (B, T, C) and weights in gpt2_blocks' order."""
    ln_1_w, ln_1_b, qkv_w, qkv_b, proj_w, proj_b, ln_2_w, ln_2_b, up_w, up_b, down_w, down_b = weights
    B, T, C = x.shape
    qkv = torch.matmul(F.layer_norm(x, (C,), ln_1_w, ln_1_b, epsilon), qkv_w) + qkv_b
    q, k, v = (part.view(B, T, heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
    x = x + (torch.matmul(o, proj_w) + proj_b)
    up = torch.matmul(F.layer_norm(x, (C,), ln_2_w, ln_2_b, epsilon), up_w) + up_b
    return x + (torch.matmul(F.gelu(up, approximate="tanh"), down_w) + down_b)


def plain_loss(model, tokens, targets):
    """The loss of a GPT2 as nanoGPT and others write it: PyTorch's own functions, logits as a whole."""
    parts, config = model.transformer, model.config
    x = F.embedding(tokens, parts["wte"].weight) + parts["wpe"].weight[: tokens.shape[1]]
    for block in parts["h"]:
        x = plain_block(x, block.weights(), config.n_head, config.layer_norm_epsilon)
    ln_f = parts["ln_f"]
    x = F.layer_norm(x, x.shape[-1:], ln_f.weight, ln_f.bias, ln_f.eps)
    logits = F.linear(x, model.lm_head.weight)
    return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1))
