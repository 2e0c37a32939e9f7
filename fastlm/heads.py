"""Heads and vocabularies: the loss under any head, its logits a part at a time, and tables of another length."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlm import fast_path
from fastlm.ops import linear_xent, softmax_xent
from fastlm.ops.once import transformed
from fastlm.quantised import quantise_

LOGITS = 2**26  # numbers of logits that exist together under a head of somebody's own
ALIGNED = 16  # columns that a bias becomes, of which one counts


def loss_of(head, hidden, targets, vocab_size, scale=None):
    """The mean loss of targets (B, T), -100 ignored, under a head of hidden states (B, T, C), times scale.

    A head of another class, or with hooks, is called on as many whole sequences as have LOGITS logits, and called again
    in the backward, as often.
    """
    if fast_path.is_plain(head, nn.Linear):
        h, w = hidden.view(-1, hidden.shape[-1]), head.weight
        if head.bias is not None:  # one more input, that is 1
            h = F.pad(F.pad(h, (0, 1), value=1.0), (0, ALIGNED - 1))
            w = F.pad(torch.cat([w, head.bias[:, None]], 1), (0, ALIGNED - 1))
        return linear_xent(h, w, targets.reshape(-1), scale=scale)
    rows = max(1, LOGITS // vocab_size)
    if targets.numel() <= rows or transformed():
        return scaled(_loss(head, hidden, targets, "mean"), scale)
    B, T = targets.shape
    parts = [(of_h, of_y) for some_h, some_y in zip(hidden.split(max(1, rows // T)), targets.split(max(1, rows // T)))
             for of_h, of_y in zip(some_h.split(rows, 1), some_y.split(rows, 1))]
    total = sum(checkpoint(_loss, head, of_h, of_y, "sum", use_reentrant=False) for of_h, of_y in parts)
    return scaled(total / (targets != -100).sum(), scale)


def scaled(loss, scale):
    return loss if scale is None else loss * scale


def _loss(head, hidden, targets, reduction):
    logits = head(hidden)
    return softmax_xent(logits.view(-1, logits.shape[-1]), targets.reshape(-1), reduction=reduction)


@torch.no_grad()
def resize(model, count, multiple):
    """GPT2.resize_token_embeddings."""
    wte, head, config = model.transformer.wte, model.lm_head, model.config
    if count is None and multiple is None:
        return wte
    old = config.unpadded_vocab_size or config.vocab_size
    asked = old if count is None else count
    multiple = multiple or 1
    for name, value in (("new_num_tokens", asked), ("pad_to_multiple_of", multiple)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"resize_token_embeddings: {name} is {value!r}, wanted a whole number ≥ 1")
    for name, module, kind in (("transformer.wte", wte, nn.Embedding), ("lm_head", head, nn.Linear)):
        if not isinstance(module, kind) or not isinstance(module.weight, nn.Parameter):
            raise ValueError(f"resize_token_embeddings: {name} is a {type(module).__name__}, wanted a {kind.__name__} "
                             "with a weight of its own; merge adapters before")
    rows, tied = -(-asked // multiple) * multiple, head.weight is wte.weight
    model.config = config.changed(vocab_size=rows, unpadded_vocab_size=None if rows == asked else asked)
    wte.weight, wte.num_embeddings = _of_length(wte.weight, rows, old), rows
    head.weight, head.out_features = wte.weight if tied else _of_length(head.weight, rows, old), rows
    if head.bias is not None:
        head.bias = _of_length(head.bias, rows, old)
    return wte if model.quantised is None else quantise_(model, model.quantised).transformer.wte


def _of_length(parameter, rows, tokens):
    """A parameter of so many rows: those that there are, then the mean of those of tokens."""
    new = parameter.detach()[:rows]
    if rows > len(new):
        mean = new[:tokens].float().mean(0, keepdim=True).to(new.dtype)
        new = torch.cat([new, mean.expand(rows - len(new), *new.shape[1:])])
    return nn.Parameter(new.clone(), requires_grad=parameter.requires_grad)
