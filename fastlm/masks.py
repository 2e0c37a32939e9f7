"""Attention masks of batches with pads: real tokens are put in front, where causality alone keeps pads out of sight."""

import torch


def check(name, mask, tokens):
    """The mask (B, T) as bool. Raises ValueError unless it has one number, 0 or 1, for each of tokens (B, T)."""
    shape = tuple(tokens.shape)
    if not isinstance(mask, torch.Tensor) or mask.shape != tokens.shape or mask.device != tokens.device:
        got = type(mask).__name__ if not isinstance(mask, torch.Tensor) else f"{tuple(mask.shape)} on {mask.device}"
        raise ValueError(f"{name}: attention_mask is {got}, wanted {shape} on {tokens.device}: 1 where a token is real")
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and ((mask != 0) & (mask != 1)).any():
        raise ValueError(f"{name}: attention_mask holds {mask[(mask != 0) & (mask != 1)][0].item()}, wanted 0 and 1")
    return mask.bool()


def order(mask):
    """(where each row's real tokens and then its pads stand, where each token went), (B, T) int64 both."""
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    return order, order.argsort(dim=1)
