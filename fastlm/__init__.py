"""fastlm: GPT-2, trained and run fast.

The names below are imported when they are first used, so that `import fastlm` and `fastlm --help` start at once,
touch no GPU and import neither Triton nor transformers.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "BLOCK_WEIGHTS": "fastlm.ops",
    "adamw_": "fastlm.ops",
    "attention": "fastlm.ops",
    "attention_qkv": "fastlm.ops",
    "bias_gelu": "fastlm.ops",
    "cache_append_": "fastlm.ops",
    "decode_attention": "fastlm.ops",
    "gpt2_blocks": "fastlm.ops",
    "grad_norm": "fastlm.ops",
    "keep_heap": "fastlm.backends.native",
    "layer_norm": "fastlm.ops",
    "linear_xent": "fastlm.ops",
    "softmax_xent": "fastlm.ops",
    "use": "fastlm.ops",
    "GPT2": "fastlm.gpt2",
    "GPT2Config": "fastlm.gpt2",
    "Refused": "fastlm.dispatch.refusal",
    "Tokenizer": "fastlm.data.tokenizer",
    "generate": "fastlm.generation",
    "warmup": "fastlm.generation",
}

__all__ = list(_HOMES) + ["__version__"]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'fastlm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__():
    return sorted(__all__)
