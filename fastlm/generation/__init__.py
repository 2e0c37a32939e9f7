"""Generation: the KV cache, sampling, and the loop that continues prompts."""

from fastlm.generation.cache import KVCache
from fastlm.generation.generate import generate, generate_tokens, stream_tokens
from fastlm.generation.warmup import warmup

__all__ = ["KVCache", "generate", "generate_tokens", "stream_tokens", "warmup"]
