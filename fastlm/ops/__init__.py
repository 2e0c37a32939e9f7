"""The public ops: each checks its arguments once, knows its gradient, and makes one call."""

import sys

from fastlm.dispatch.forcing import use  # from here, so that the table is full when a backend is chosen
from fastlm.ops.adamw import adamw_
from fastlm.ops.attention import attention, attention_qkv
from fastlm.ops.bias_gelu import bias_gelu
from fastlm.ops.cache_append import cache_append_
from fastlm.ops.decode_attention import decode_attention
from fastlm.ops.gpt2_blocks import BLOCK_WEIGHTS, gpt2_blocks
from fastlm.ops.grad_norm import grad_norm
from fastlm.ops.layer_norm import layer_norm
from fastlm.ops.linear_xent import linear_xent
from fastlm.ops.softmax_xent import softmax_xent

__all__ = ["BLOCK_WEIGHTS", "adamw_", "attention", "attention_qkv", "bias_gelu", "cache_append_",
           "decode_attention", "gpt2_blocks", "grad_norm", "layer_norm", "linear_xent", "softmax_xent", "use"]
FAMILIES = ("adamw", "attention", "bias_gelu", "cache_append", "decode_attention", "gpt2_blocks", "grad_norm",
            "layer_norm", "linear_xent", "softmax_xent")  # a file each


def module(family):
    """The module of an op, whose name is a function's too."""
    return sys.modules[f"{__name__}.{family}"]
