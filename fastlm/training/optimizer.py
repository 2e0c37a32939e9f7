"""AdamW as GPT-2 is trained with it, and the learning rate over a run."""

import math

import torch


def learning_rate(step, config):
    """The rate of a step: linear warm-up, then half a cosine down to min_learning_rate at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    span = config.steps - config.warmup_steps
    part = min((step - config.warmup_steps) / span, 1.0) if span > 0 else 1.0
    low, high = config.min_learning_rate, config.learning_rate
    return low + 0.5 * (1.0 + math.cos(math.pi * part)) * (high - low)


def make_optimizer(model, config):
    """AdamW; matrices and embeddings decay, biases and norms (1-D) do not."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )
