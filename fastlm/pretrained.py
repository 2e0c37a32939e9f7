"""Loads and saves GPT-2 in Hugging Face's own format: config.json, model.safetensors, tokenizer files."""

import json
import os
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fastlm.config import GPT2Config
from fastlm.data.disk import advice, cause
from fastlm.described import HEAD, WTE, described
from fastlm.quantised import GROUP, KINDS, dequantise, head_kind, matrices, quantise

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
                   "added_tokens.json")


def load(cls, name, *, device=None, dtype=torch.float32):
    """A `cls` with the weights of directory or hub id `name`, in evaluation mode.

    Reads config.json and model.safetensors (or the shards that model.safetensors.index.json lists). A head of its own
    stays one, whatever the config says; where that says otherwise a warning tells. Raises ValueError naming the file
    and the cause for anything missing, corrupt, or of another shape. Quantised weights come as the numbers they stand
    for, in fp32, and `quantised` tells their kind.
    """
    directory = find(name)
    config = GPT2Config.load(directory / "config.json")
    held, kind = _held(directory)
    if config.tie_word_embeddings and HEAD in held:
        held.setdefault(WTE, held[HEAD])
    own = HEAD in held and held[HEAD] != held.get(WTE)  # one tensor for both is a tied head
    with torch.device("meta"):
        model = cls(config.model_copy(update={"tie_word_embeddings": config.tie_word_embeddings and not own}))
        _shape_head(model, held, kind)
    model.to_empty(device=device or "cpu")
    if model.config.tie_word_embeddings:
        model.tie_weights()
    wanted = dict(model.named_parameters())  # a tied lm_head.weight is transformer.wte.weight and listed once
    if missing := sorted(set(wanted) - set(held)):
        raise ValueError(f"{directory}: no weights for {', '.join(missing[:4])} ({len(missing)} missing)")
    _fill(wanted, held, kind)
    if own and config.tie_word_embeddings:
        if torch.equal(model.lm_head.weight, model.transformer.wte.weight):
            model.config = config
            model.tie_weights()
        else:
            warnings.warn(f"{directory}: lm_head.weight differs from transformer.wte.weight, though config.json does "
                          "not say tie_word_embeddings=false: the head is loaded as one of its own", stacklevel=3)
    model.quantised = kind
    return model.to(torch.float32 if model.quantised else dtype).eval()


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
        raise ValueError(f"{directory}: has no model.safetensors{_instead(directory)}")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: no valid index of weights ({error})") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: names {name!r}, wanted a .safetensors file in the same directory")
    return [directory / name for name in sorted(names)]


def _instead(directory):
    """What a directory without safetensors has in its place, and the line that converts it; it is never read here."""
    for pattern, option, with_what in OTHERS:
        if found := sorted(directory.glob(pattern)):
            told = f", but {found[0].name}, which is not read here"
            if option is None:
                return f"{told}; pass the model that it was made from"
            return (
                f"{told}. If you trust it, convert it once, where {with_what} is: python -c \"from transformers import "
                f"GPT2LMHeadModel; GPT2LMHeadModel.from_pretrained('{directory}'{option})"
                f".save_pretrained('{directory}')\""
            )
    return "; pass a directory that has"


# Weights in other formats: (files, an option of transformers' from_pretrained, what reads them).
OTHERS = [
    ("pytorch_model*.bin*", "", "transformers"), ("tf_model.h5", ", from_tf=True", "transformers 4 with tensorflow"),
    ("flax_model.msgpack", ", from_flax=True", "transformers 4 with flax"), ("*.gguf", None, None),
    ("*.ckpt*", None, None), ("*.onnx", None, None), ("*.pt", None, None), ("*.pth", None, None),
]


def _held(directory):
    """({name: (file, key)} of the weights that a directory holds, their kind); several names may have one tensor."""
    held, kinds = {}, set()
    for path in _weight_files(directory):
        with _opened(path) as file:
            metadata = file.metadata() or {}
            kind = metadata.get("fastlm_quantised")
            if kind not in (None, *KINDS):
                raise ValueError(f"{path}: weights are {kind!r}, wanted {' or '.join(KINDS)}")
            kinds.add(kind)
            for key in file.keys():
                name = _name(key)
                if not (kind and key.endswith("_scale") or name.endswith((".attn.bias", ".attn.masked_bias"))):
                    held[name] = path, key  # the latter are causal masks, which old checkpoints carry
            for key, kept in metadata.items():  # safetensors.torch.save_model tells so which names share a tensor
                if _name(kept) in held:
                    held.setdefault(_name(key), held[_name(kept)])
    if len(kinds) > 1:
        raise ValueError(f"{directory}: its files are of several kinds of weights ({', '.join(map(str, kinds))})")
    return held, *kinds


def _name(key):
    return key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"


@contextmanager
def _opened(path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: no valid safetensors file ({error})") from None


def shape_head(model, directory):
    """Gives a model's head the bias and the rows that are among the weights of a directory."""
    _shape_head(model, *_held(Path(directory)))


def _shape_head(model, held, kind):
    """Gives a model the bias and the rows, at least as many as its tokens, that the head of its files has."""
    (V, C), bias = model.lm_head.weight.shape, "lm_head.bias" in held
    if not model.config.tie_word_embeddings and HEAD in held:
        path, key = held[HEAD]
        with _opened(path) as file:
            shape = file.get_slice(key).get_shape()
        V = max(V, shape[1 if kind else 0]) if len(shape) == 2 else V
    if bias or V != model.config.vocab_size:
        weight = model.lm_head.weight
        model.lm_head = nn.Linear(C, V, bias=bias)
        if V == len(weight):
            model.lm_head.weight = weight


def _fill(wanted, held, kind):
    """Copies the tensors that files hold into the parameters `wanted`."""
    by_path = {}
    for name, (path, key) in held.items():
        by_path.setdefault(path, []).append((name, key))
    for path, names in by_path.items():
        with _opened(path) as file:
            for name, key in names:
                if name not in wanted:
                    if name == HEAD:
                        continue  # a tied one
                    raise ValueError(f"{path}: has a tensor {key}, which GPT-2 has not")
                tensor = file.get_tensor(key)
                if kind and not tensor.is_floating_point():
                    tensor = _dequantised(file, key, tensor, wanted[name].shape, path)
                if tensor.shape != wanted[name].shape:
                    raise ValueError(
                        f"{path}: {key} has shape {tuple(tensor.shape)}, but config.json makes it "
                        f"{tuple(wanted[name].shape)}"
                    )
                if not tensor.is_floating_point():
                    raise ValueError(f"{path}: {key} is {tensor.dtype}, wanted a floating-point tensor")
                with torch.no_grad():
                    wanted[name].copy_(tensor)


def _dequantised(file, key, q, shape, path):
    """The weight of `shape` that a quantised tensor of a file stands for: int8, or uint8 with two int4 a byte."""
    transposed = key.endswith(("wte.weight", HEAD))
    K, N = reversed(shape) if transposed else shape
    if q.dtype == torch.uint8 and q.shape == ((K + 1) // 2, N):
        q = torch.stack([q & 15, q >> 4], 1).flatten(0, 1)[:K].to(torch.int8) - 8
    if f"{key}_scale" not in file.keys():
        raise ValueError(f"{path}: {key} has no {key}_scale")
    scale = file.get_tensor(f"{key}_scale")
    if q.dtype != torch.int8 or q.shape != (K, N) or scale.dtype != torch.float32 or scale.shape not in (
        (N,), (-(-K // GROUP), N)
    ):
        raise ValueError(
            f"{path}: {key} is {q.dtype} {tuple(q.shape)} with scales {scale.dtype} {tuple(scale.shape)}, but "
            f"config.json makes it ({K}, {N})"
        )
    weight = dequantise(q, scale)
    return weight.T if transposed else weight


def save(model, directory, *, tokenizer=None):
    """Writes the model in fp32 beside its config and tokenizer; every file is complete or absent.

    Raises ValueError, before anything is written, for a model of which the files would not say what it is.
    """
    config, weights = described(model)
    _write(weights, {"format": "pt"}, config, directory, tokenizer)


def save_quantised(model, directory, *, tokenizer=None, notes=None):
    """Writes a quantised model as what it is: int8 (K, N), or two int4 of neighbouring k a byte, and <name>_scale.

    notes: text → text, for the file's metadata.
    """
    config, weights = described(model)
    for name, (weight, transposed) in matrices(model).items():
        kind = head_kind(model.quantised) if transposed else model.quantised
        q, scale = quantise(weight.T if transposed else weight, kind)
        if kind == "int4":
            q = F.pad(q, (0, 0, 0, len(q) % 2)).add(8).to(torch.uint8)
            q = q[0::2] | q[1::2] << 4
        weights |= {name: q.contiguous(), f"{name}_scale": scale.contiguous()}
    _write(weights, {"format": "pt", "fastlm_quantised": model.quantised, **(notes or {})}, config, directory,
           tokenizer)


def _write(weights, metadata, config, directory, tokenizer):
    directory = Path(directory)
    staging = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
        save_file(weights, staging / "model.safetensors", metadata=metadata)
        (staging / "config.json").write_text(json.dumps(config.dump(), indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(staging, max_length=config.n_positions)
        for path in sorted(staging.iterdir()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, directory / path.name)
    except (OSError, SafetensorError) as error:
        raise RuntimeError(
            f"{directory}: the model could not be written ({cause(error)}); {advice(error, 'pass another directory')}"
        ) from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
