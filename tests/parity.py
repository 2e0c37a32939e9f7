"""A GPT-2 of transformers with fastlm's weights, and what the two are compared by."""

import math

import torch
import torch.nn.functional as F
from transformers import GPT2Config as HuggingFaceConfig
from transformers import GPT2LMHeadModel

import fastlm

OFF = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)


def make(seed=0, **sizes):
    """A model without dropout, with weights large enough that a wrong scale shows."""
    torch.manual_seed(seed)
    model = fastlm.GPT2(fastlm.GPT2Config(**OFF, **sizes))
    std = 0.2 * math.sqrt(64 / model.config.n_embd)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std) if parameter.dim() == 2 else parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def twin(model, attention="eager"):
    """transformers' GPT-2 with the same weights and `attention` implementation."""
    values = model.config.dump()
    values.pop("dtype")
    theirs = GPT2LMHeadModel(HuggingFaceConfig(**values, attn_implementation=attention))
    theirs.load_state_dict(model.state_dict())
    return theirs.eval()


def batch(model, B, T, seed=0):
    """tokens and shifted targets (B, T); the second half of the rows is shorter, its targets ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (B, T + 1), generator=generator)
    tokens, targets = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    for row in range(B // 2, B):
        targets[row, max(1, T // 2 + row - B) :] = -100
    return tokens, targets


def step(model, tokens, targets):
    """logits, loss and {name: gradient} of one forward and backward of either model."""
    model.zero_grad()
    if isinstance(model, fastlm.GPT2):
        logits, loss = model(tokens)[0], model.loss(tokens, targets)
    else:
        logits = model(tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    # The key bias has no effect on the loss: its gradient is rounding and is left out.
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for name, gradient in gradients.items():
        if name.endswith("attn.c_attn.bias"):
            C = gradient.shape[0] // 3
            gradient[C : 2 * C] = 0
    return logits.detach(), float(loss.detach()), gradients


def differences(one, other):
    """Of two steps: largest difference of the logits and of the loss, and of the gradients by tensor norm."""
    return {
        "logits": float((one[0] - other[0]).abs().max() / other[0].abs().max()),
        "loss": abs(one[1] - other[1]) / abs(other[1]),
        "gradients": max(float((one[2][name] - g).norm() / g.norm().clamp(min=1e-12)) for name, g in other[2].items()),
    }
