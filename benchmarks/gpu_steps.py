"""What the steps of `python -m benchmarks.gpu` do, each in a process of its own: `... gpu_steps STEP [--dry]`.

A row goes out as a line "@row {json}": figures; or `failed`, a sentence; or `told`, a line for the table at the end.
Nothing here refuses for ours: what one of our kernels raises is a failed row, and the next one runs.
"""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastlm
from fastlm import dispatch, ops
from fastlm.certificate import CASES
from fastlm.generation import stream_tokens
from fastlm.measure.clock import Times, race
from fastlm.measure.files import cache_folder
from fastlm.measure.roofs import measure as measure_roofs
from fastlm.numerics import DTYPES, compare
from fastlm.training.config import TrainConfig
from fastlm.training.optimizer import AdamW
from fastlm.training.trainer import autocast

from . import bench_train, harness
from .gpu import ROW
from .programs import MODEL, plain_loss, weights

TINY = {"L": 1, "H": 2, "C": 32, "V": 97}
OFF = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)


def emit(**row):
    """A row, on the way to the record; NaN and infinity as text, which JSON lacks."""
    def plain(value):
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, dict):
            return {key: plain(some) for key, some in value.items()}
        return [plain(some) for some in value] if isinstance(value, (list, tuple)) else value

    print(ROW + json.dumps(plain(row)), flush=True)


@contextlib.contextmanager
def guarded(may_refuse=False, **what):
    """What raises inside is a failed row; with may_refuse, dispatch's own refusal is a refused one."""
    try:
        yield
    except Exception as error:
        if may_refuse and isinstance(error, dispatch.Refused):
            emit(**what, refused=str(error))
            return
        emit(**what, failed=f"{type(error).__name__}: {harness.refusal(error)}")
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises where the context is gone: then the step ends


class Place:
    """Where a step runs: the GPU, or, rehearsed, the CPU with tiny shapes."""

    def __init__(self, dry):
        self.dry, self.device = dry, "cpu" if dry else "cuda"

    def backends(self, family=None):
        """Ours that take tensors here."""
        names = dispatch.BACKENDS if family is None else dispatch.backends_of(family)
        return [name for name in names if name != "reference" and dispatch.machine_why_not(name) is None
                and self.device in dispatch.devices(name)]

    def sizes(self, **sizes):
        """A GPT-2's sizes and others: 124M's, or tiny ones."""
        return {**sizes, **MODEL} if not self.dry else {**{key: min(size, 8) for key, size in sizes.items()}, **TINY}

    def sync(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def free(self):
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


# ---- there, warm


def there(place):
    """Versions, device and what was built; without a GPU a sentence and exit code 1."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "numpy", "liger_kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if not place.dry and not torch.cuda.is_available():
        emit(failed="this machine has no CUDA GPU that torch can use; --dry rehearses the steps on the CPU")
        return
    if not place.dry:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name, "capability": list(torch.cuda.get_device_capability()), "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(), "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1), "l2_mib": properties.L2_cache_size // 2**20,
        }
    import fastlm._C as _C

    found |= {"built": _C.cuda.architectures() if hasattr(_C, "cuda") else None, "cpus": os.cpu_count()}
    emit(head=found, summary=", ".join(f"{key} {value}" for key, value in found.items())[:300])
    for name in ("cuda", "triton") if not place.dry else ():
        if (reason := dispatch.machine_why_not(name)) is not None:
            emit(backend=name, failed=reason)


def warm(place):
    """Compiles stock PyTorch's step and the ops' compiled peers, whose code the compilers keep on disk."""
    if not place.dry and shutil.which("nvcc"):
        with guarded(what="launches.cu"):
            launches_program()
    for name in (STOCK[0], "fastlm, compiled"):
        with guarded(what=f"the step of {name}"), _setting(place, name):
            contender = Contender(place, name)
            contender.step()
            place.sync()
            del contender
        place.free()
        emit(summary=f"{name} compiled")
    for case in wanted_cases(place):
        if (peer := case.peers.get("torch.compile")) is not None:
            with guarded(what=f"the compiled {case.op}"):
                peer(*case.operands())
                place.free()
    emit(summary="stock's step, ours and the ops' peers compiled")


# ---- smoke


def _softmax_xent_over(random, to):
    x, y = to(random(24, 1031)).requires_grad_(), torch.arange(24) * 43 % 1031
    y[3] = -100
    ops.softmax_xent(x.view_as(x), y.to(x.device), reduction="sum", overwrite=True).backward()
    return {"dx": x.grad}


def _attention_apart(random, to):
    q, k, v, do = (to(random(2, 65, 2, 64)) for _ in range(4))
    for operand in (q, k, v):
        operand.requires_grad_()
    o = ops.attention(q, k, v)
    o.backward(do)
    return {"o": o.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def _linear_xent_rows(random, to):
    h, w, y = to(random(24, 32)).requires_grad_(), to(random(131, 32)).requires_grad_(), torch.arange(24) * 43 % 131
    loss = ops.linear_xent(h, w, y.to(h.device), reduction="none")
    loss.sum().backward()
    return {"loss": loss.detach(), "dh": h.grad, "dw": w.grad}


# name → (family, case)
SMOKE = {name: (name, case) for name, case in CASES.items()} | {
    "softmax_xent over": ("softmax_xent", _softmax_xent_over), "attention apart": ("attention", _attention_apart),
    "linear_xent rows": ("linear_xent", _linear_xent_rows),
}
CAPTURES = ("captured training step", "captured decoding")


def smoke(place):
    """Every part in a process of its own, several at a time; then that no torch op of the table was forgotten."""
    def part(name):
        command = [sys.executable, "-m", "fastlm.benchmarks.gpu_steps", "part", name, *(["--dry"] if place.dry else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        return name, done.returncode, done.stdout

    called, count = set(), 0
    workers = 1 if place.dry else min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        for name, code, text in pool.map(part, [*SMOKE, *CAPTURES]):
            for line in text.splitlines():
                if not line.startswith(ROW):
                    print(f"{name}: {line}", flush=True)
                    continue
                row = json.loads(line[len(ROW):])
                if "called" in row:
                    called |= {tuple(pair) for pair in row["called"]}
                else:
                    emit(**row)
                    count += 1
            if code:
                emit(part=name, failed=f"its process ended with exit code {code}")
    forgotten = [(op, name) for op, row in dispatch.TABLE.items() for name in place.backends(row.family)
                 if name in row.kernels and (op, name) not in called]
    for op, name in forgotten:
        emit(op=op, backend=name, failed="no part of the smoke test has run it")
    emit(summary=f"{count} comparisons, {len(called)} of {len(called) + len(forgotten)} torch ops × backends were run")


def part(place, name):
    """A part of the smoke test: a family's case on every backend in every dtype, against fp64."""
    if name in CAPTURES:
        if place.dry:
            return emit(part=name, told=f"{name}: needs a GPU")
        with guarded(part=name):
            (_captured_training if name == CAPTURES[0] else _captured_decoding)(place)
        return None
    family, case = SMOKE[name]
    called = set()
    for dtype, backend in itertools.product(DTYPES, place.backends(family)):
        row = {"part": name, "backend": backend, "dtype": dtype}
        with guarded(may_refuse=dtype != "bf16", **row):
            with dispatch.record() as calls:
                got = _case(place, family, case, backend, DTYPES[dtype], dtype)
            ran = {(op, used) for op, used in calls if dispatch.TABLE[op].family == family}
            called |= {pair for pair in ran if dtype == "bf16" or family in ("adamw", "grad_norm")}
            if ours := sorted(op for op, used in ran if used != backend and backend in dispatch.TABLE[op].kernels):
                emit(**row, failed=f"{', '.join(ours)} ran elsewhere")
            truth = _case(place, family, case, "reference", torch.float64, dtype)
            composed = _case(place, family, case, "reference", DTYPES[dtype], dtype)
            for what, value in got.items():
                ratio = _ratio(value, composed[what], truth[what], what)
                emit(**row, what=what, ratio=ratio, ran=sorted(f"{op} {used}" for op, used in ran),
                     **({} if ratio <= 1 else {"failed": f"{what}: {ratio:.3g} of the error allowed"}))
    emit(called=sorted(called))
    return None


def _case(place, family, case, backend, computed, dtype):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPES[dtype])

    with dispatch.use(**{family: backend}):
        return case(random, lambda x: x.to(place.device, computed))


def _ratio(got, composed, truth, what):
    try:
        return compare(got.cpu(), composed.cpu(), truth.cpu().double(), backward=what[0] == "d").ratio
    except AssertionError:  # NaN or infinity out of place
        return math.inf


def _small_model(device):
    torch.manual_seed(0)
    config = fastlm.GPT2Config(vocab_size=1031, n_positions=256, n_embd=128, n_layer=2, n_head=2, bos_token_id=None,
                               eos_token_id=None, **OFF)
    return fastlm.GPT2(config).to(device)


def _captured_training(place):
    """A step replayed as a CUDA graph gives the loss of the eager one."""
    losses = {}
    for captured in (False, True):
        model = _small_model(place.device).train()
        optimizer = AdamW(model, TrainConfig(data="", out="", grad_clip=1.0))
        ids = torch.randint(1031, (4, 129), generator=torch.Generator().manual_seed(1)).to(place.device)
        tokens, targets, loss = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None

        def step(model=model, optimizer=optimizer, tokens=tokens, targets=targets):
            with autocast("bf16", place.device):
                loss = model.loss(tokens, targets)
            loss.backward()
            optimizer.step(*optimizer.gradients(), learning_rate=1e-3)
            optimizer.zero_grad()
            return loss.detach()

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                loss = step()
        torch.cuda.synchronize()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                loss = step()
            graph.replay()
        else:
            loss = step()
        losses[captured] = float(loss)
    far = abs(losses[True] - losses[False]) / losses[False]
    emit(part=CAPTURES[0], eager=losses[False], captured=losses[True],
         **({} if far < 1e-2 else {"failed": f"the replayed loss is {losses[True]}, the eager one {losses[False]}"}))


def _captured_decoding(place):
    """Generation with its captured step writes what the uncaptured model would, by every backend."""
    model = _small_model(place.device).eval()
    tokens = torch.randint(1031, (3, 20), generator=torch.Generator().manual_seed(1)).to(place.device)
    with torch.no_grad():
        row = tokens
        for _ in range(24):
            row = torch.cat([row, model(row)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    for name in (None, *place.backends()):
        with guarded(may_refuse=True, part=CAPTURES[1], backend=name), dispatch.use(name):
            got = torch.stack(model.generate(tokens, max_new_tokens=24, temperature=0, stop_at=None))
            same = bool((got.to(row.device) == row).all())
            emit(part=CAPTURES[1], backend=name,
                 **({"same": True} if same else {"failed": "captured decoding writes other tokens than the model"}))


# ---- train


# name → the backend that is forced
SETTINGS = {"fastlm": None, "fastlm, triton": "triton", "fastlm, compiled": None, "fastlm, torch": "torch"}
STOCK = ("stock, compiled", "stock")
CAPTURED = ("fastlm", "fastlm, triton")  # their steps are timed as CUDA graphs too


class Contender:
    """A training step of GPT-2 124M in bf16 over fp32 masters: ours under a setting of backends, or stock PyTorch.

    Stock: nanoGPT's architecture with 50304 columns, cuDNN's attention, F.cross_entropy, fused AdamW.
    """

    def __init__(self, place, name):
        shape = place.sizes(B=32, T=1024)
        stock = name in STOCK
        vocabulary = shape["V"] if not stock else -(-shape["V"] // 64) * 64
        torch.manual_seed(0)
        config = fastlm.GPT2Config(vocab_size=vocabulary, n_positions=shape["T"], n_embd=shape["C"],
                                   n_layer=shape["L"], n_head=shape["H"], bos_token_id=None, eos_token_id=None, **OFF)
        model = fastlm.GPT2(config).to(place.device)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(shape["V"], (shape["B"], shape["T"] + 1), generator=generator).to(place.device)
        tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        self.last = None
        plain = torch.compile(plain_loss) if name == STOCK[0] else plain_loss
        ours = torch.compile(model.loss) if name == "fastlm, compiled" else model.loss

        def loss_of():
            loss = plain(model, tokens, targets) if stock else ours(tokens, targets)
            self.last = loss.detach()
            return loss

        self.step = (bench_train._step if stock else bench_train._our_step)(model, loss_of, "bf16", place.device)


def _setting(place, name):
    """The context in which a contender runs: its backends forced, or stock's attention pinned."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if name not in STOCK:
        return dispatch.use(SETTINGS[name])
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if place.device == "cuda" else contextlib.nullcontext()


def train(place):
    """Tokens a second of each contender, in turn; then what the step of ours and of stock consists of."""
    settings = [name for name, backend in SETTINGS.items() if backend in (None, *place.backends())]
    runs, shape = {}, place.sizes(B=32, T=1024)
    order = [settings[0], STOCK[0], *settings[1:], STOCK[1]]
    for name in order:
        with guarded(contender=name), _setting(place, name):
            place.free()
            if place.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            contender = Contender(place, name)
            contender.step()
            first = float(contender.last)
            contender.step()
            place.sync()
            begun = time.perf_counter() - started
            started = time.perf_counter()
            contender.step()
            host = time.perf_counter() - started
            place.sync()
            peak = torch.cuda.max_memory_allocated() / 2**30 if place.device == "cuda" else None
            seconds = 0.02 if place.dry else 1.0
            taken = race({name: [contender.step]}, device=place.device, seconds=seconds, rounds=(3, 12))[name]
            runs[name] = taken
            _train_row(name, shape, taken, first=first, host_ms=host * 1e3, peak_gib=peak, begun_s=begun)
            if name in (settings[0], STOCK[0], "fastlm, triton"):
                with guarded(contender=name, what="profile"):
                    _kernels(place, contender.step, 2, contender=name)
            if name in CAPTURED and not place.dry:
                with guarded(contender=name, what="captured"):
                    replay = _captured(contender.step)
                    taken = race({name: [replay]}, device=place.device, seconds=0.6, rounds=(3, 8))[name]
                    _train_row(f"{name}, captured", shape, taken, first=first, host_ms=0.0, peak_gib=peak)
            del contender
    if settings[0] in runs and STOCK[0] in runs:
        ratio = runs[STOCK[0]].median / runs[settings[0]].median
        emit(summary=f"{settings[0]} {ratio:.2f} × {STOCK[0]}")


def _captured(step):
    """The replay of a step as a CUDA graph, once it has run."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def _train_row(name, shape, taken, **more):
    B, T, L, C = (shape[letter] for letter in "BTLC")
    flops = 6 * B * T * (weights(shape) + L * C * T)
    told = (f"{name:18} {taken.median * 1e3:8.2f} ms ± {100 * taken.spread:.0f} %  {B * T / taken.median:9.0f} tokens/s  "
            f"{flops / taken.median * 1e-12:6.1f} TFLOP/s  host {more['host_ms']:.1f} ms  peak {more['peak_gib']} GiB  "
            f"loss {more['first']:.5f}")
    emit(contender=name, shape=shape, dtype="bf16", median_us=taken.median * 1e6, spread=taken.spread,
         samples_us=[round(some * 1e6, 1) for some in taken.samples], tokens_per_s=B * T / taken.median,
         tflop_per_s=flops / taken.median * 1e-12, told=told, **more)


def _kernels(place, call, steps, top=25, **what):
    """Rows of the longest kernels of a call, and how many there are."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if place.device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        for _ in range(steps):
            call()
        place.sync()
    found = {}
    for event in seen.events():
        if place.device == "cuda" and "CUDA" not in str(event.device_type):
            continue
        taken = event.device_time_total if place.device == "cuda" else event.self_cpu_time_total
        calls, us = found.get(event.name, (0, 0.0))
        found[event.name] = calls + 1, us + taken
    rows = sorted(found.items(), key=lambda item: -item[1][1])
    total = sum(us for _, us in found.values()) / steps
    count = sum(calls for calls, _ in found.values()) / steps
    emit(**what, kernels=count, kernels_us=total, told=f"{what}: {count:.0f} kernels, {total * 1e-3:.3f} ms")
    for name, (calls, us) in rows[:top]:
        emit(**what, kernel=name[:160], calls=calls / steps, us=us / steps)


# ---- decode


def decode(place):
    """Microseconds between tokens: B = 1 and 64, a prompt of 512, by every backend; what a step consists of."""
    for B in (1, 64):
        shape = place.sizes(B=B, T=512, N=96)
        torch.manual_seed(0)
        config = fastlm.GPT2Config(vocab_size=shape["V"], n_positions=1024, n_embd=shape["C"], n_layer=shape["L"],
                                   n_head=shape["H"], bos_token_id=None, eos_token_id=None, **OFF)
        model = fastlm.GPT2(config).to(place.device, torch.bfloat16).eval()
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(shape["V"], (shape["B"], shape["T"]), generator=generator).to(place.device)
        for name in (None, *place.backends()):
            label = "fastlm" if name is None else f"fastlm, {name}"
            with guarded(contender=label, shape=shape), dispatch.use(name):
                gaps, last = [], None
                for _ in stream_tokens(model, tokens, max_new_tokens=shape["N"], temperature=0, stop_at=None):
                    now = time.perf_counter()
                    gaps += [] if last is None else [now - last]
                    last = now
                gaps = gaps[len(gaps) // 4:]  # the first ones capture
                middle = statistics.median(gaps)
                emit(contender=label, shape=shape, dtype="bf16", median_us=middle * 1e6, spread=Times(tuple(gaps)).spread,
                     tokens_per_s=shape["B"] / middle,
                     told=f"{label:16} B = {shape['B']:3}  {middle * 1e6:8.1f} µs a step  {shape['B'] / middle:9.0f} tokens/s")
                if name is None:
                    def run(model=model, tokens=tokens, n=shape["N"]):
                        model.generate(tokens, max_new_tokens=n, temperature=0, stop_at=None)

                    with guarded(contender=label, shape=shape, what="profile"):
                        _kernels(place, run, 1, contender=label, B=shape["B"], tokens=shape["N"])


# ---- ops and products


WANTED = (  # (op, sizes, peers)
    ("linear_xent", {"N": 32768, "C": 768, "V": 50257}, ("torch.compile", "F.linear_cross_entropy")),
    ("softmax_xent", {"N": 16384, "V": 50257}, ("torch.compile", "Liger")),
    ("softmax_xent", {"N": 16384, "V": 50304}, ()),
    ("attention", {"B": 32, "T": 1024, "H": 12, "D": 64}, ("cuDNN", "FlashAttention-2")),
    ("attention", {"B": 8, "T": 4096, "H": 12, "D": 64}, ("cuDNN", "FlashAttention-2")),
    ("attention", {"B": 16, "T": 1024, "H": 16, "D": 128}, ("cuDNN", "FlashAttention-2")),
    ("layer_norm", {"N": 32768, "C": 768}, ("torch.compile",)),
    ("bias_gelu", {"N": 32768, "C": 3072}, ("torch.compile",)),
    ("adamw", {"N": 124_439_808}, ("torch.compile",)),
    ("grad_norm", {"N": 124_439_808}, ()),
    ("decode_attention", {"B": 1, "S": 1024, "H": 12, "D": 64}, ("SDPA",)),
    ("decode_attention", {"B": 64, "S": 512, "H": 12, "D": 64}, ("SDPA",)),
    ("decode_attention", {"B": 256, "S": 512, "H": 12, "D": 64}, ("SDPA",)),
    ("cache_append", {"B": 64, "T": 1, "H": 12, "D": 64}, ()),
)
SMALL = {"N": 64, "V": 97, "C": 32, "B": 2, "T": 16, "S": 70, "H": 2, "D": 16}


def wanted_cases(place):
    """The cases that decide, with the peers that count."""
    for op, sizes, peers in WANTED:
        sizes = {letter: min(size, SMALL[letter]) for letter, size in sizes.items()} if place.dry else sizes
        dtype = ["fp32" if place.dry or op in ("adamw", "grad_norm") else "bf16"]
        for case in harness.suite([op], device=place.device, shape=sizes, dtypes=dtype):
            chosen = {name: peer for name, peer in case.peers.items() if name in peers}
            yield dataclasses.replace(case, peers=chosen, absent={})


def measured_ops(place):
    """Each op on every backend beside its peers, after the comparison with fp64, as shares of measured roofs."""
    roofs = measure_roofs(place.device, seconds=0.02 if place.dry else 0.15,
                          **({"bytes": 2**20, "size": 64} if place.dry else {}))
    emit(roofs=dataclasses.asdict(roofs), told=f"roofs: {roofs}")
    for case in wanted_cases(place):
        with guarded(op=case.op, part=case.part, shape=case.shape):
            rows = case.run(place.device, roofs, seconds=0.01 if place.dry else 0.12)
            place.free()
            told = []
            for row in rows:
                wrong = row.get("failed") or (row["ours"] and row.get("wrong") and f"wrong: {row['error']:.3g} of the "
                                              "error allowed") or (row["ours"] and row.get("refused"))
                emit(**row, **({"failed": wrong} if wrong and "failed" not in row else {}))
                us = f"{row['median_us']:.1f} µs {100 * row['of_roof']:.0f} %" if "median_us" in row else "–"
                told.append(f"{row['contender']} {us}{' *' if row.get('chosen') else ''}")
            sizes = " ".join(f"{letter}={size}" for letter, size in case.shape.items())
            emit(told=f"{case.op} {case.part} {sizes}: {' | '.join(told)}")


def products(place):
    """The products of a training step: the head's by length of a row and chunk, sums in fp32, a layer's."""
    dtype = torch.float32 if place.dry else torch.bfloat16
    make = functools.partial(torch.randn, device=place.device, dtype=dtype)
    C = 32 if place.dry else 768

    def one(what, flops, call, **more):
        with guarded(what=what, **more):
            taken = race({what: [call]}, device=place.device, seconds=0.01 if place.dry else 0.06)[what]
            rate = flops / taken.median * 1e-12
            emit(what=what, **more, median_us=taken.median * 1e6, spread=taken.spread, tflop_per_s=rate,
                 told=f"{what} {more}: {taken.median * 1e6:.1f} µs {rate:.1f} TFLOP/s")

    for N, V in ((16, 97), (16, 128)) if place.dry else ((16384, 50257), (16384, 50304), (4096, 50304), (32768, 50304)):
        h, w, x = make(N, C), make(V, C), make(N, V)
        flops, out = 2 * N * C * V, torch.empty(N, V, device=place.device, dtype=dtype)
        dh, dw = torch.empty_like(h), torch.empty_like(w)
        one("head: logits", flops, lambda: torch.mm(h, w.t(), out=out), N=N, V=V)
        one("head: dh", flops, lambda: torch.mm(x, w, out=dh), N=N, V=V)
        one("head: dw", flops, lambda: torch.mm(x.t(), h, out=dw), N=N, V=V)
        if not place.dry:
            wide = torch.zeros(V, C, device=place.device)
            one("head: dw, fp32 out", flops, lambda: torch.mm(x.t(), h, out_dtype=torch.float32), N=N, V=V)
            one("head: dw, fp32 addmm", flops, lambda: torch.addmm(wide, x.t(), h, out_dtype=torch.float32), N=N, V=V)
            one("head: dw, fp32 addmm out=", flops,
                lambda: torch.addmm(wide, x.t(), h, out_dtype=torch.float32, out=wide), N=N, V=V)
        del h, w, x, out, dh, dw
        place.free()
    N = 16 if place.dry else 32768
    for K, M in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)):
        x, w, b, dy = make(N, K), make(K, M), make(M), make(N, M)
        flops = 2 * N * K * M
        one("layer: addmm", flops, lambda: torch.addmm(b, x, w), K=K, M=M)
        one("layer: mm", flops, lambda: torch.mm(x, w), K=K, M=M)
        one("layer: dx", flops, lambda: torch.mm(dy, w.t()), K=K, M=M)
        one("layer: dw", flops, lambda: torch.mm(x.t(), dy), K=K, M=M)
        if not place.dry:
            one("layer: dw, fp32 out", flops, lambda: torch.mm(x.t(), dy, out_dtype=torch.float32), K=K, M=M)
        one("layer: column sums", N * M, lambda: dy.sum(0, dtype=torch.float32), K=K, M=M)


# ---- launches, sanitize


def launches(place):
    """launches.cu, compiled for this GPU and run: its rows."""
    best = {}
    with subprocess.Popen([launches_program()], stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout:
            try:
                row = json.loads(line)
            except ValueError:
                print(line, end="")
                continue
            emit(**row)
            key = tuple(row.get(name) for name in ("what", "variant", "ahead", "depth"))
            if "median_us" in row and row["median_us"] < best.get(key, row)["median_us"] + 1e-9:
                best[key] = row
    for row in best.values():
        emit(told=json.dumps({name: value for name, value in row.items() if name not in ("unit", "min_us", "max_us")}))
    if running.returncode:
        emit(failed=f"launches ended with exit code {running.returncode}")


def launches_program():
    """The path of launches.cu compiled for this GPU, in the user's cache."""
    source, architecture = Path(__file__).with_name("launches.cu"), "".join(map(str, torch.cuda.get_device_capability()))
    special = "a" if architecture in ("90", "100", "120") else ""
    target = f"arch=compute_{architecture}{special},code=sm_{architecture}{special}"
    program = cache_folder() / f"launches-{architecture}-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        partial = f"{program}.{os.getpid()}"
        subprocess.run(["nvcc", "-O3", "-std=c++17", "-gencode", target, "-cudart", "static", "-o", partial, str(source)],
                       check=True)
        os.replace(partial, program)
    return str(program)


def sanitize(place):
    """The CUDA kernels at small shapes, for compute-sanitizer to watch."""
    for name, (family, case) in SMOKE.items():
        if "cuda" in dispatch.backends_of(family):
            for dtype in ("bf16", "fp32"):
                with contextlib.suppress(dispatch.Refused):
                    _case(place, family, case, "cuda", DTYPES[dtype], dtype)
                    torch.cuda.synchronize()
                    print(f"{name} {dtype}", flush=True)


# ---- tune, peers


CONFIGS = {  # BLOCK_T, BLOCK_S, num_warps, num_stages
    "fwd": ((128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3),
            (64, 64, 4, 3), (64, 128, 4, 3), (128, 32, 4, 4)),
    "keys": ((64, 128, 8, 2), (64, 128, 8, 3), (64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (32, 128, 8, 2),
             (128, 128, 8, 2), (32, 64, 4, 3), (128, 64, 4, 2)),
    "queries": ((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2),
                (128, 128, 8, 2), (128, 32, 8, 3), (64, 32, 4, 3)),
}


def tune(place):
    """Triton's attention at B = 32, T = 1024, D = 64 in every launch configuration, compiled by several processes."""
    if place.dry:
        return emit(told="needs a GPU")
    names = list(itertools.product(CONFIGS, (True, False)))
    workers = [subprocess.Popen([sys.executable, "-m", "fastlm.benchmarks.gpu_steps", "compile", name, str(int(described))])
               for name, described in names]
    for worker in workers:
        worker.wait()
    for name, described in names:
        _attention_configs(name, described, timed=True)
    return None


def compile(place, name, described):
    _attention_configs(name, bool(int(described)), timed=False)


def _attention_configs(name, described, *, timed):
    from fastlm.kernels import attention as module

    usual, describable, launch = module._config, module._describable, module._launch
    B, T, H, D = 32, 1024, 12, 64
    torch.manual_seed(0)
    qkv = torch.randn(B, T, 3, H, D, device="cuda", dtype=torch.bfloat16)
    do = torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16)
    arguments = (1, D**-0.5, 0.0, None)
    o, lse = module.attention_qkv_fwd(qkv, *arguments)
    expected = o if name == "fwd" else module.attention_qkv_bwd(do, qkv, o, lse, *arguments)

    def only(kernel, label, *rest):
        return launch(kernel, label, *rest) if label in (name, "fwd") else None

    best = None
    for config in CONFIGS[name]:
        row = {"kernel": name, "tma": described, "config": list(config)}
        module._config = lambda kernel, *rest, config=config: config if kernel == name else usual(kernel, *rest)
        module._describable = lambda *_: described
        try:
            if name == "fwd":
                def call():
                    return module.attention_qkv_fwd(qkv, *arguments)[0]
            else:
                def call():
                    return module.attention_qkv_bwd(do, qkv, o, lse, *arguments)
            got = call()
            torch.cuda.synchronize()
            if not timed:
                continue
            far = float((got.float() - expected.float()).norm() / expected.float().norm())
            module._launch = only  # delta is launched beside: its time is in all alike
            taken = race({name: [call]}, device="cuda", seconds=0.03)[name]
            best = min(best or (math.inf, None), (taken.median, config))
            emit(**row, median_us=taken.median * 1e6, far=far,
                 **({"failed": f"far from the usual result: {far:.3g}"} if not far < 1e-2 else {}))
        except Exception as error:
            if timed:
                emit(**row, refused=f"{type(error).__name__}: {harness.refusal(error)}")
        finally:
            module._config, module._describable, module._launch = usual, describable, launch
    if timed and best:
        emit(told=f"attention {name}{' tma' * described}: best {best[1]} {best[0] * 1e6:.1f} µs, usual "
                  f"{usual(name, D, 2, False, described, torch.cuda.get_device_capability())}")


def peers(place):
    """transformers at B = 1, a prompt of 512: static cache and torch.compile, and ours by the same clock."""
    from .bench_generate import _CACHES, _theirs
    from .programs import pair

    shape = place.sizes(B=1, T=512, N=64)
    ours, theirs = pair(shape, shape["T"] + shape["N"], place.device)
    dtype = torch.float32 if place.dry else torch.bfloat16
    ours, theirs = ours.to(dtype).eval(), theirs.to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(shape["V"], (shape["B"], shape["T"]), generator=generator).to(place.device)
    writers = {"fastlm": lambda n: ours.generate(tokens, max_new_tokens=n, temperature=0, stop_at=None)}
    for name, options in _CACHES.items():
        if name == "transformers, compiled" or place.dry:
            writers[name] = _theirs(theirs, tokens, **({} if place.dry else options))
    for name, write in writers.items():
        with guarded(contender=name):
            write(shape["N"]), write(1)
            taken = {}
            for n in (1, shape["N"]):
                samples = []
                for _ in range(3):
                    place.sync()
                    started = time.perf_counter()
                    write(n)
                    place.sync()
                    samples.append(time.perf_counter() - started)
                taken[n] = statistics.median(samples)
            each = (taken[shape["N"]] - taken[1]) / (shape["N"] - 1)
            emit(contender=name, shape=shape, median_us=each * 1e6,
                 told=f"{name:24} B = 1: {each * 1e6:8.1f} µs a token (whole calls), first {taken[1] * 1e3:.1f} ms")


STEPS = {"there": there, "warm": warm, "smoke": smoke, "part": part, "train": train, "decode": decode,
         "ops": measured_ops, "products": products, "launches": launches, "sanitize": sanitize, "tune": tune,
         "compile": compile, "peers": peers}


if __name__ == "__main__":
    name, *rest = [argument for argument in sys.argv[1:] if argument != "--dry"]
    STEPS[name](Place("--dry" in sys.argv), *rest)
