"""The public ops: each checks its arguments once, knows its gradient, and makes one call."""

from fastlm.dispatch import use  # from here, so that the table is full when a backend is chosen
from fastlm.ops.attention import attention, attention_qkv
from fastlm.ops.cache_append import cache_append_
from fastlm.ops.decode_attention import decode_attention
from fastlm.ops.softmax_xent import softmax_xent

__all__ = ["attention", "attention_qkv", "cache_append_", "decode_attention", "softmax_xent", "use"]
