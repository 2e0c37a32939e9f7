"""GPT2Config: the sizes of a GPT-2, checked; its fields are those of Hugging Face's config.json."""

import json
import warnings
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PRESETS = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}

# What GPT-2 fixes: a config.json that says otherwise describes another model.
FIXED = {
    "model_type": ("gpt2",),
    "add_cross_attention": (False,),
}
Activation = Literal["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu", "relu", "silu", "swish", "tanh"]
ENDS = "bos_token_id", "eos_token_id"


class GPT2Config(BaseModel):
    """Sizes of a GPT-2: `GPT2Config()` is the 124M model, `GPT2Config.preset("gpt2-xl")` a published one.

    An attention's scores are fp32 always, so that reorder_and_upcast_attn, which asks for that, changes nothing. Ids
    from unpadded_vocab_size on, where it is given, are padding of the vocabulary, which is never drawn. Raises
    ValueError naming the field, what came and what was wanted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab_size: int = Field(50257, ge=1, le=2**24)
    n_positions: int = Field(1024, ge=1, le=2**20)
    n_embd: int = Field(768, ge=1, le=2**16)
    n_layer: int = Field(12, ge=1, le=1024)
    n_head: int = Field(12, ge=1, le=1024)
    n_inner: int | None = Field(None, ge=1, le=2**20)
    embd_pdrop: float = Field(0.1, ge=0, lt=1)
    attn_pdrop: float = Field(0.1, ge=0, lt=1)
    resid_pdrop: float = Field(0.1, ge=0, lt=1)
    layer_norm_epsilon: float = Field(1e-5, gt=0, lt=1)
    initializer_range: float = Field(0.02, gt=0, lt=10)
    activation_function: Activation = "gelu_new"
    scale_attn_weights: bool = True  # by 1/√D
    scale_attn_by_inverse_layer_idx: bool = False  # by 1/(layer + 1), too
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    unpadded_vocab_size: int | None = Field(None, ge=1)
    bos_token_id: int | None = Field(None, ge=0)  # 50256 in GPT-2's own vocabulary, None in others
    eos_token_id: int | None = Field(None, ge=0)

    def __init__(self, **values):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_told(error)) from None

    @model_validator(mode="before")
    @classmethod
    def _end_of_text(cls, values):
        own = values.get("vocab_size", 50257) == 50257
        return {"bos_token_id": 50256, "eos_token_id": 50256, **values} if own else values

    @model_validator(mode="after")
    def _sizes_fit(self):
        for name in ENDS:
            if (getattr(self, name) or 0) >= self.vocab_size:
                raise ValueError(f"{name}={getattr(self, name)} lies outside the vocabulary of {self.vocab_size}")
        if (tokens := self.unpadded_vocab_size or 0) > self.vocab_size:
            raise ValueError(f"unpadded_vocab_size={tokens} is more than vocab_size={self.vocab_size}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is no multiple of n_head={self.n_head}")
        return self

    @classmethod
    def preset(cls, name, **changes):
        """A published size: gpt2 (124M), gpt2-medium (355M), gpt2-large (774M), gpt2-xl (1558M)."""
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}, wanted {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def load(cls, path):
        """The config of a Hugging Face config.json; ValueError where it is no JSON or describes another model.

        An end of text outside the vocabulary (transformers writes GPT-2's into every config) is left out, and told.
        """
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: no valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: holds a JSON {type(values).__name__}, wanted an object")
        for key, wanted in FIXED.items():
            if key in values and values[key] not in wanted:
                raise ValueError(f"{path}: {key} is {values[key]!r}, but GPT-2 has {wanted[0]!r}")
        for old, new in (("n_ctx", "n_positions"),):
            if old in values and new not in values:
                values[new] = values[old]
        known = {key: value for key, value in values.items() if key in cls.model_fields}
        for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if key not in known:
                raise ValueError(f"{path}: has no {key}")
        for key in ENDS:
            known[key] = _end(path, key, known)
        try:
            return cls(**known)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def changed(self, **changes):
        """The config with changes; an end of text that is no longer among its tokens becomes None."""
        values = {**self.model_dump(), **changes}
        tokens = changes.get("unpadded_vocab_size") or values["vocab_size"]
        return type(self)(**{**values, **{name: None for name in ENDS if (values[name] or 0) >= tokens}})

    def dump(self):
        """The config.json that transformers reads, as a dict."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            **{key: wanted[0] for key, wanted in FIXED.items()},
            **self.model_dump(exclude={"unpadded_vocab_size"} if self.unpadded_vocab_size is None else None),
            "n_ctx": self.n_positions,
            "dtype": "float32",
        }

    to_dict = dump  # the name in transformers, by which peft asks


def _end(path, key, known):
    """The bos or eos of a config.json's values: one that is in the vocabulary, else None."""
    value, V = known.get(key), known["vocab_size"]
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"{path}: {key} is {value}, wanted one id: several ends of text are not known here")
        (value,) = value
    if key not in known and V == 50257:
        return 50256
    if isinstance(value, int) and isinstance(V, int) and not 0 <= value < V:
        warnings.warn(f"{path}: {key}={value} lies outside the vocabulary of {V}: the model has none", stacklevel=4)
        return None
    return value


def _told(error):
    """Pydantic's findings as one sentence each: field, what came, what was wanted."""
    told = []
    for finding in error.errors():
        where = ".".join(str(part) for part in finding["loc"])
        if finding["type"] == "extra_forbidden":
            told.append(f"{where} is no field of GPT2Config; it has {', '.join(GPT2Config.model_fields)}")
        elif not where:
            told.append(finding["msg"].removeprefix("Value error, "))
        else:
            told.append(f"{where} is {finding['input']!r}: {finding['msg'][0].lower()}{finding['msg'][1:]}")
    return "; ".join(told)
