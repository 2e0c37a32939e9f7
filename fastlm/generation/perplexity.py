"""The perplexity of a model on a text: exp of the mean loss of every token but the first of each window."""

import math

import torch

from fastlm.generation.cache import KVCache
from fastlm.generation.engine import Engine, cache_dtype, why_not
from fastlm.ops import softmax_xent


@torch.inference_mode()
def perplexity(model, ids, *, progress=lambda done, total: None):
    """exp(mean loss) of ids (a list or 1-D int64), in windows of n_positions, on the engine where it can run.

    Raises ValueError for fewer than two ids or one outside the vocabulary.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64, device=model.device)
    if len(ids) < 2:
        raise ValueError(f"perplexity: {len(ids)} tokens, wanted at least two")
    runs, total, count = why_not(model) is None, 0.0, 0
    for window in ids.split(model.config.n_positions):
        if len(window) < 2:
            continue
        tokens, targets = window[None, :-1], window[1:]
        model.check_tokens(window[None])
        if runs:
            cache = KVCache(model.config, 1, len(targets), device="cpu", dtype=cache_dtype(model))
            logits = Engine(model, cache).every(tokens)[0]
        else:
            logits = model(tokens)[0][0]
        total += float(softmax_xent(logits, targets, reduction="sum"))
        count += len(targets)
        progress(count, len(ids))
    return math.exp(total / count)
