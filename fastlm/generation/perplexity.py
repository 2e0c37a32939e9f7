"""The perplexity of a model on a text: exp of the mean loss of every token but the first of each window."""

import math

import torch

from fastlm import fast_path
from fastlm.generation.engine import Engine, make_cache, packed, why_not
from fastlm.generation.inference import inference
from fastlm.ops import softmax_xent


def perplexity(model, ids, *, progress=lambda done, total: None):
    """exp(mean loss) of ids (a list or 1-D int64), in windows of n_positions, on the engine where it can run.

    Raises ValueError for fewer than two ids or one outside the vocabulary.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64, device=model.device)
    if len(ids) < 2:
        raise ValueError(f"perplexity: {len(ids)} tokens, wanted at least two")
    total, count = 0.0, 0
    with inference(model):
        weights = packed(model, math.inf) if why_not(model) is None else None
        for window in ids.split(model.config.n_positions):
            if len(window) < 2:
                continue
            tokens, targets = window[None, :-1], window[1:]
            model.check_tokens(window[None])
            cache = make_cache(model, weights, 1, len(targets))
            logits = _logits(model, tokens, cache) if weights is None else Engine(model, cache, weights).every(tokens)
            total += float(softmax_xent(logits[0], targets, reduction="sum"))
            count += len(targets)
            progress(count, len(ids))
    return math.exp(total / count)


def _logits(model, tokens, cache):
    if fast_path.own_call(model):
        return fast_path.logits_of(model, tokens)
    counts = torch.full((1,), tokens.shape[1], dtype=torch.int32, device=model.device)
    return model.lm_head(model.hidden(tokens, positions=cache.begin(counts, tokens.shape[1]), cache=cache))
