"""TrainConfig: everything a run depends on, checked; presets, TOML files and key=value settings."""

import difflib
import json
import os
import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = {
    # nanoGPT's recipe for a CPU, 0.8 M parameters: 1.88 nats a character in its README.
    "shakespeare-char": {
        "tokenizer": "chars", "n_layer": 4, "n_head": 4, "n_embd": 128, "sequence_length": 64, "batch_size": 12,
        "steps": 2000, "learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_steps": 100, "beta2": 0.99,
        "eval_every": 250, "save_every": 500, "sample_tokens": 300,
    },
    # GPT-2 124M with nanoGPT's and llm.c's settings: 0.5 M tokens a step. 16 sequences fill the waves of 132
    # multiprocessors (`fastlm explain preset gpt2`).
    "gpt2": {
        "n_layer": 12, "n_head": 12, "n_embd": 768, "sequence_length": 1024, "batch_size": 480, "micro_batch": 16,
        "steps": 19560, "learning_rate": 6e-4, "min_learning_rate": 6e-5, "warmup_steps": 700, "dtype": "bf16",
        "eval_every": 250, "save_every": 1000,
    },
    # A small GPT-2 for source code or prose on a CPU.
    "small": {
        "tokenizer": "bpe", "vocab_size": 512, "n_layer": 4, "n_head": 4, "n_embd": 128, "sequence_length": 64,
        "batch_size": 12, "steps": 1500, "learning_rate": 2e-3, "min_learning_rate": 1e-4, "warmup_steps": 50,
        "beta2": 0.99, "eval_every": 250, "save_every": 500, "sample_tokens": 120,
    },
}


class TrainConfig(BaseModel):
    """The settings of a run. Lengths are in tokens, batch sizes in sequences, rates per step.

    Raises ValueError naming the setting, what came and what was wanted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(description="prepared shards, or a text file or folder")
    out: str = Field(description="directory of the run")
    tokenizer: str = Field("bpe", description="bpe, bytes, chars or a path; for text that is not prepared yet")
    vocab_size: int | None = Field(None, ge=2, le=2**24, description="of a bpe that is trained")
    val_fraction: float = Field(0.1, ge=0, lt=1, description="of the text, held out; 0 trains without evaluation")

    n_layer: int = Field(12, ge=1, le=1024)
    n_head: int = Field(12, ge=1, le=1024)
    n_embd: int = Field(768, ge=1, le=2**16)
    dropout: float = Field(0.0, ge=0, lt=1)
    pad_vocab_to_multiple_of: int = Field(1, ge=1, le=2**16, description="rows that are trained and never drawn")
    init_from: str | None = Field(None, description="a model directory to start from instead of random weights")

    sequence_length: int = Field(1024, ge=1, le=2**20)
    batch_size: int = Field(12, ge=1, le=2**20, description="sequences a step")
    micro_batch: int | None = Field(None, ge=1, description="sequences at a time; all at once unless given")
    steps: int = Field(1000, ge=1)
    learning_rate: float = Field(6e-4, gt=0, lt=1)
    min_learning_rate: float = Field(6e-5, ge=0, lt=1)
    warmup_steps: int = Field(100, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0, lt=1)
    weight_decay: float = Field(0.1, ge=0, lt=1)
    grad_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")

    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the products; weights are fp32; auto: bf16 on a GPU that has it")
    residual: Literal["fp32", "bf16"] = Field("fp32", description="of the sums through blocks; bf16 with dtype=bf16")
    recompute: bool = Field(False, description="what lies in blocks, again in the backward: less memory, more time")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    compile: bool = Field(False, description="torch.compile the model")
    seed: int = Field(1337, ge=0, lt=2**31)
    eval_every: int = Field(250, ge=1)
    eval_tokens: int | None = Field(None, ge=1, description="of what is held out an evaluation reads; all unless given")
    save_every: int = Field(500, ge=1)
    sample_prompt: str | None = None
    sample_tokens: int = Field(200, ge=0)

    def __init__(self, **values):
        _check_names(values)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError("; ".join(map(_told, error.errors()))) from None

    @model_validator(mode="after")
    def _fits(self):
        if self.n_embd % self.n_head and self.init_from is None:  # which has sizes of its own
            raise ValueError(f"n_embd={self.n_embd} is no multiple of n_head={self.n_head}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}")
        return self

    def dump(self, path):
        """Writes the settings as JSON, from which `load` makes them again; a full disk leaves those of before."""
        partial = Path(path).with_name(f".{Path(path).name}.partial")
        partial.write_text(json.dumps(self.model_dump(), indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path, **changes):
        """The settings of a run's train.json, with changes."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: no settings of a run ({error})") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: no settings of a run (a JSON {type(values).__name__})")
        return cls(**{**values, **changes})


def _told(found):
    """A finding of pydantic's as a sentence."""
    name = ".".join(map(str, found["loc"]))
    if found["type"] == "missing":
        return f"{name} is missing; pass --{name}"
    return f"{name} is {found['input']!r}: {found['msg']}" if name else found["msg"].removeprefix("Value error, ")


def read_settings(*, preset=None, file=None, settings=(), **given):
    """A dict of settings: those given over key=value `settings` over the TOML `file` over the preset."""
    values = {}
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}, wanted {', '.join(PRESETS)}")
        values |= PRESETS[preset]
    if file is not None:
        try:
            values |= tomllib.loads(Path(file).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"{file}: no valid TOML ({error})") from None
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: wanted key=value")
        try:
            values[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[key.strip()] = text.strip()
    values |= {key: value for key, value in given.items() if value is not None}
    _check_names(values)
    return values


def _check_names(values):
    for key in values:
        if key not in TrainConfig.model_fields:
            near = difflib.get_close_matches(key, TrainConfig.model_fields, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"wanted {', '.join(TrainConfig.model_fields)}"
            raise ValueError(f"{key} is no setting of the trainer; {hint}")
