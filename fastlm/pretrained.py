"""Loads and saves GPT-2 in Hugging Face's own format: config.json, model.safetensors, tokenizer files."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastlm.config import GPT2Config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")


def load(cls, name, *, device=None, dtype=torch.float32):
    """A `cls` with the weights of directory or hub id `name`, in evaluation mode.

    Reads config.json and model.safetensors (or the shards that model.safetensors.index.json lists). Raises
    ValueError naming the file and the cause for anything missing, corrupt, or of another shape.
    """
    directory = find(name)
    config = GPT2Config.load(directory / "config.json")
    with torch.device("meta"):
        model = cls(config)
    model.to_empty(device=device or "cpu")
    model.tie_weights()
    wanted = dict(model.named_parameters())  # lm_head.weight is transformer.wte.weight and listed once
    missing = set(wanted)
    for path in _weight_files(directory):
        missing -= _fill(wanted, path)
    if missing:
        raise ValueError(f"{directory}: no weights for {', '.join(sorted(missing)[:4])} ({len(missing)} missing)")
    return model.to(dtype).eval()


def find(name):
    """The local directory of a model: itself, or a hub id fetched. Raises ValueError saying how to pass a directory."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path}: has no config.json; a model directory has config.json and model.safetensors")
        return path
    if path.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise ValueError(f"{name}: is no directory; pass one with config.json and model.safetensors")
    hint = f"pass a directory with config.json and model.safetensors instead of {str(name)!r}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{name}: no such directory, and huggingface_hub is not installed; {hint}") from None
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds; each means that the model did not come
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name}: no such directory, and the hub did not give it ({cause}); {hint}") from None


def _weight_files(directory):
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"{directory}: has no model.safetensors")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: no valid index of weights ({error})") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: names {name!r}, wanted a .safetensors file in the same directory")
    return [directory / name for name in sorted(names)]


def _fill(wanted, path):
    """Copies the tensors of one file into the parameters `wanted`; the names that were filled."""
    filled = set()
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                name = key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"
                if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
                    continue  # the tied head, and the causal mask that old checkpoints carry
                if name not in wanted:
                    raise ValueError(f"{path}: has a tensor {key}, which GPT-2 has not")
                tensor = file.get_tensor(key)
                if tensor.shape != wanted[name].shape:
                    raise ValueError(
                        f"{path}: {key} has shape {tuple(tensor.shape)}, but config.json makes it "
                        f"{tuple(wanted[name].shape)}"
                    )
                if not tensor.is_floating_point():
                    raise ValueError(f"{path}: {key} is {tensor.dtype}, wanted a floating-point tensor")
                with torch.no_grad():
                    wanted[name].copy_(tensor)
                filled.add(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: no valid safetensors file ({error})") from None
    return filled


def save(model, directory, *, tokenizer=None):
    """Writes the model in fp32 beside its config and tokenizer; every file is complete or absent."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        name: parameter.detach().to("cpu", torch.float32).contiguous() for name, parameter in model.named_parameters()
    }
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
        (staging / "config.json").write_text(json.dumps(model.config.dump(), indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(staging)
        for path in sorted(staging.iterdir()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, directory / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
