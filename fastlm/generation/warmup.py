"""warmup: everything that happens only once, before it would disturb a measurement or a CUDA graph."""

import time

import torch

from fastlm.generation.cache import KVCache


def warmup(model, shapes):
    """Runs a model once at every shape (B, T), so that its kernels are chosen, compiled and loaded; seconds it took.

    In training mode forward and backward, otherwise forward, and a prompt and one decoded token. Neither parameters,
    gradients nor random numbers change. A kernel that is first called under CUDA graph capture raises RuntimeError:
    capture after a warm-up. Raises ValueError for a shape that the model does not take.
    """
    started = time.perf_counter()
    for shape in shapes:
        B, T = shape
        if B < 1 or not 1 <= T <= model.config.n_positions:
            raise ValueError(
                f"warmup: shape is {tuple(shape)}, wanted (B, T) with B ≥ 1 and 1 ≤ T ≤ n_positions "
                f"{model.config.n_positions}"
            )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for B, T in shapes:
            tokens = torch.zeros(B, T, dtype=torch.int64, device=model.device)
            if model.training:
                loss = model(tokens, tokens)[1] + model.loss(tokens, tokens)
                torch.autograd.grad(loss, list(model.parameters()))
            else:
                _generate(model, tokens)
    if devices:
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - started


@torch.inference_mode()
def _generate(model, tokens):
    B, T = tokens.shape
    model(tokens)
    cache = KVCache(model.config, B, T, device=model.device, dtype=model.dtype)
    for part in tokens.split([T - 1, 1], dim=1):  # as generation does: the prompt, then a token
        if part.numel():
            counts = torch.full((B,), part.shape[1], dtype=torch.int32, device=model.device)
            model.hidden(part, positions=cache.begin(counts, part.shape[1]), cache=cache)
            cache.end()
