"""The run behind `fastlm profile`: a training step or a generation, profiled, with its parts as named ranges.

    train       step → embedding, h.0 → h.0.ln_1, h.0.attn, ..., ln_f, loss, backward, optimizer
    generate    step → prefill, decode, decode, ... → embedding, h.0, ..., ln_f, lm_head, draw

Hooks open and close the ranges while the profile lasts: in torch's profiler and, where there is CUDA, as NVTX
for Nsight. No decode step is captured as a CUDA graph here: a replayed kernel has neither a part nor a shape. And a
model that is watched runs the parts of its blocks, where training in fp32 on a CPU else calls gpt2_blocks.
"""

import math
import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from fastlm.config import GPT2Config
from fastlm.generation.cache import KVCache
from fastlm.generation.sampling import choose
from fastlm.generation.step import Step
from fastlm.gpt2 import GPT2
from fastlm.measure.numerics import DTYPES
from fastlm.ops import linear_xent
from fastlm.training.config import TrainConfig
from fastlm.training.optimizer import AdamW
from fastlm.training.step import autocast

from . import harness
from .profile_trace import load

PROGRAMS = ("train", "generate")
LETTERS = {"L": "n_layer", "H": "n_head", "C": "n_embd", "V": "vocab_size"}


@dataclass(frozen=True)
class Plan:
    """A profile that can be run: everything asked for was checked."""

    program: str
    shape: dict[str, int]  # letters → sizes
    dtype: str
    device: str
    steps: int
    model: Path | None
    out: Path | None  # None: ranges only, no trace


@dataclass(frozen=True)
class Profile:
    """What a run gave; seconds (of a step) and tokens per second have the profiler's overhead within."""

    seconds: float
    tokens_per_s: float
    parameters: int
    trace: dict | None


def plan(program, *, model=None, shape=None, dtype="fp32", device="cpu", steps=3, out="profile.json"):
    """A Plan. Raises ValueError, before anything is allocated, for what is wrong or does not fit into memory.

    model: a directory in Hugging Face's format, a random GPT-2 else; shape: letters → sizes in place of the
    usual (B, T, for generation N, and L, H, C, V unless a model says them); out: None for ranges only.
    """
    if program not in PROGRAMS:
        raise ValueError(f"no program {program!r} to profile, wanted {' or '.join(PROGRAMS)}")
    if dtype not in ("fp32", "bf16"):
        raise ValueError(f"--dtype is {dtype!r}, wanted fp32 or bf16")
    if steps < 1:
        raise ValueError(f"--steps is {steps}, wanted 1 or more")
    out = None if out is None else Path(out)
    if out is not None:
        if not out.name.endswith((".json", ".json.gz")) or out.is_dir():
            raise ValueError(f"--out is {out}, wanted a file that ends with .json or .json.gz")
        if not out.parent.is_dir():
            raise ValueError(f"--out is {out}, but there is no folder {out.parent}; make it first")
    sizes, positions = dict(shape or {}), None
    if model is not None:
        if not (model / "config.json").is_file():
            raise ValueError(f"--model is {model}, wanted a directory with config.json and model.safetensors")
        if given := sorted(LETTERS.keys() & sizes.keys()):
            raise ValueError(f"--shape gives {', '.join(given)}, but --model says that; leave it out")
        config = GPT2Config.load(model / "config.json")
        sizes |= {letter: getattr(config, name) for letter, name in LETTERS.items()}
        positions = config.n_positions
    case = harness.suite([program], device=device, shape=sizes or None, dtypes=[dtype])[0]
    length = case.shape["T"] + case.shape.get("N", 0)
    if positions is not None and length > positions:
        raise ValueError(f"--shape makes {length} tokens a sequence, but {model} has n_positions={positions}")
    harness.plan(case, device)
    return Plan(program, case.shape, dtype, device, steps, model, out)


def run(plan, model=None):
    """The Profile of a Plan, after a step to warm up. The trace is written whole or not at all.

    Raises RuntimeError where the last step of training has a loss or gradients that are not finite.
    model: what `model_of` gave, for callers to whom a directory that does not load is another error than a step.
    """
    model, ranges = model_of(plan) if model is None else model, Ranges(nvtx=plan.device == "cuda")
    step = {"train": _training, "generate": _generation}[plan.program](model, plan, ranges)
    ranges.off = True  # so that a profiler that filters by range does not see the warm-up
    step()
    ranges.off = False
    _wait(plan.device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (plan.device == "cuda")
    profiler = None if plan.out is None else torch.profiler.profile(activities=activities, record_shapes=True)
    with ranges.on(model), profiler or nullcontext():
        seconds, found = _timed(step, plan, ranges)
    for name, value in (found or {}).items():
        if not math.isfinite(value):
            raise RuntimeError(f"{name} is {float(value)} after {plan.steps + 1} steps")
    trace = None if profiler is None else _export(profiler, plan.out)
    tokens = plan.shape["B"] * plan.shape["N" if plan.program == "generate" else "T"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Profile(seconds, tokens / seconds, parameters, trace)


def _timed(step, plan, ranges):
    """(seconds of a step, what the last returned)."""
    started = time.perf_counter()
    for _ in range(plan.steps):
        with ranges("step"):
            found = step()
    _wait(plan.device)
    return (time.perf_counter() - started) / plan.steps, found


def _wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def _export(profiler, out):
    """Writes the trace whole or not at all, and reads it."""
    partial = out.with_name(f".{os.getpid()}.{out.name}")  # torch compresses what ends with .gz
    try:
        profiler.export_chrome_trace(str(partial))
        trace = load(partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return trace


class Ranges:
    """Named ranges that nest: `with ranges("loss")`, and a model's modules while `on(model)` is open."""

    def __init__(self, *, nvtx):
        self.off, self._nvtx, self._open = False, nvtx, []

    @contextmanager
    def __call__(self, name):
        depth = len(self._open)
        self._push(name)
        try:
            yield
        finally:
            self._close(depth)

    @contextmanager
    def on(self, model):
        """Hooks on the modules, gone at the end, as are ranges that an error left open."""
        handles, depth = [], len(self._open)
        try:
            for module, name in _named(model):
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._push(name)))
                handles.append(module.register_forward_hook(lambda *_: self._close(len(self._open) - 1)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._close(depth)

    def _push(self, name):
        if self.off:
            self._open.append(())
            return
        record = record_function(name)
        record.__enter__()
        closing = [lambda: record.__exit__(None, None, None)]
        if self._nvtx and name == "backward":  # autograd has a thread of its own: a range of the process
            number = torch.cuda.nvtx.range_start(name)
            closing.append(lambda: torch.cuda.nvtx.range_end(number))
        elif self._nvtx:
            torch.cuda.nvtx.range_push(name)
            closing.append(torch.cuda.nvtx.range_pop)
        self._open.append(closing)

    def _close(self, depth):
        while len(self._open) > depth:
            for close in reversed(self._open.pop()):
                close()


def _named(model):
    """(module, name of its range) of every part of a GPT2."""
    parts = model.transformer
    yield parts["wte"], "embedding"
    yield parts["wpe"], "embedding"
    for layer, block in enumerate(parts["h"]):
        yield block, f"h.{layer}"
        for name in ("ln_1", "attn", "ln_2", "mlp"):
            yield getattr(block, name), f"h.{layer}.{name}"
    yield parts["ln_f"], "ln_f"
    yield model.lm_head, "lm_head"


def model_of(plan):
    """The model of a Plan; ValueError where its directory holds none."""
    if plan.model is not None:
        return GPT2.from_pretrained(plan.model, device=plan.device)
    torch.manual_seed(0)
    off = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    sizes = {name: plan.shape[letter] for letter, name in LETTERS.items()}
    positions = plan.shape["T"] + plan.shape.get("N", 0)
    config = GPT2Config(n_positions=positions, bos_token_id=None, eos_token_id=None, **sizes, **off)
    return GPT2(config).to(plan.device)


def _tokens(plan, T):
    ids = torch.randint(plan.shape["V"], (plan.shape["B"], T), generator=torch.Generator().manual_seed(1))
    return ids.to(plan.device)


def _training(model, plan, ranges):
    """Forward, loss, backward, clipping, AdamW; bf16 is autocast over fp32 weights. It returns what must be finite."""
    model.train()
    optimizer = AdamW(model, TrainConfig(data="", out="", grad_clip=1.0))
    ids = _tokens(plan, plan.shape["T"] + 1)
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].reshape(-1)

    def step():
        with autocast(plan.dtype, plan.device):
            hidden = model.hidden(tokens, sparse=model.adds_few_rows(tokens))  # as model.loss does it
            with ranges("loss"):
                loss = linear_xent(hidden.view(-1, hidden.shape[-1]), model.lm_head.weight, targets)
        with ranges("backward"):
            loss.backward()
        with ranges("optimizer"):
            gradients = optimizer.gradients()
            optimizer.step(*gradients, learning_rate=1e-6)
            optimizer.zero_grad()
        return {"the loss": loss.detach(), "the gradient's norm": gradients[1]}

    return step


def _generation(model, plan, ranges):
    """A prompt of T tokens and N greedy ones for B sequences, as in `stream_tokens` but without its graph."""
    B, T, N = (plan.shape[letter] for letter in "BTN")
    model, tokens = model.to(DTYPES[plan.dtype]).eval(), _tokens(plan, T)
    counts = torch.full((B,), T, dtype=torch.int32, device=plan.device)
    uniform = torch.zeros(B, N, dtype=torch.float64, device=plan.device)

    def draw(logits, uniform):
        with ranges("draw"):
            return choose(logits, 0, None, None, uniform)

    @torch.inference_mode()
    def step():
        cache = KVCache(model.config, B, T + N, device=plan.device, dtype=model.dtype)
        decode = Step(model, cache, draw, uniform, None, captured=False)
        with ranges("prefill"):
            hidden = model.hidden(tokens, positions=cache.begin(counts, T), cache=cache)  # (B, T, C)
            cache.end()
            decode.first(model.lm_head(hidden[:, -1]), [N] * B)
        for _ in range(N - 1):
            with ranges("decode"):
                decode()

    return step
