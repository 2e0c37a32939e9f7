"""What is timed, ours beside its peers: a training step, decoding, ops, products, launches."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import torch

from fastlm.dispatch.forcing import use
from fastlm.generation import stream_tokens
from fastlm.measure.clock import Times, race
from fastlm.measure.files import cache_folder
from fastlm.measure.roofs import measure as measure_roofs

from .. import bench_train, harness
from ..programs import plain_loss, weights
from .place import emit, guarded

# name → the backends that are forced, by op; "*": for every op that has it
SETTINGS = {"fastlm": {}, "fastlm, Triton's attention": {"attention": "triton"}, "fastlm, cublasLt": {},
            "fastlm, compiled": {}, "fastlm, torch": {"*": "torch"}}
STOCK = ("stock, compiled", "stock")
CAPTURED = ("fastlm", "fastlm, Triton's attention")  # their steps are timed as CUDA graphs too


class Contender:
    """A training step of GPT-2 124M in bf16 over fp32 masters: ours under a setting of backends, or stock PyTorch.

    Stock: nanoGPT's architecture with 50304 columns, cuDNN's attention, F.cross_entropy, fused AdamW.
    """

    def __init__(self, place, name):
        shape = place.sizes(B=32, T=1024)
        stock = name in STOCK
        vocabulary = shape["V"] if not stock else -(-shape["V"] // 64) * 64
        model, ids = place.model(shape, positions=shape["T"], vocabulary=vocabulary), place.tokens(shape, more=1)
        tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        self.last = None
        plain = torch.compile(plain_loss) if name == STOCK[0] else plain_loss
        ours = torch.compile(model.loss) if name == "fastlm, compiled" else model.loss

        def loss_of():
            loss = plain(model, tokens, targets) if stock else ours(tokens, targets)
            self.last = loss.detach()
            return loss

        self.step = (bench_train._step if stock else bench_train._our_step)(model, loss_of, "bf16", place.device)


@contextlib.contextmanager
def _setting(place, name):
    """The context of a contender: its backends forced, its library of products, or stock's attention pinned."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with contextlib.ExitStack() as stack:
        if name not in STOCK:
            forced = dict(SETTINGS[name])
            stack.enter_context(use(forced.pop("*", None), **forced))
        elif place.device == "cuda":
            stack.enter_context(sdpa_kernel(SDPBackend.CUDNN_ATTENTION))
        if name.endswith("cublasLt") and place.device == "cuda":
            stack.enter_context(_cublaslt())
        yield


def train(place):
    """Tokens a second of each contender, in turn; then what the step of ours and of stock consists of."""
    settings = [name for name, forced in SETTINGS.items() if set(forced.values()) <= set(place.backends())]
    runs, shape = {}, place.sizes(B=32, T=1024)
    order = [settings[0], STOCK[0], *settings[1:], STOCK[1]]
    for name in order:
        if len(runs) > 1 and not place.leaves(45 if "compiled" in name else 15, contender=name):
            continue
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
            if name in (*CAPTURED, STOCK[0]):
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
    told = (f"{name:18} {taken.median * 1e3:8.2f} ms ± {100 * taken.spread:.0f} %  {B * T / taken.median:9.0f} tokens/s"
            f"  {flops / taken.median * 1e-12:6.1f} TFLOP/s  host {more['host_ms']:.1f} ms"
            f"  peak {more['peak_gib'] or 0:.1f} GiB  loss {more['first']:.5f}")
    emit(contender=name, shape=shape, dtype="bf16", median_us=taken.median * 1e6, spread=taken.spread,
         samples_us=[round(some * 1e6, 1) for some in taken.samples], tokens_per_s=B * T / taken.median,
         tflop_per_s=flops / taken.median * 1e-12, told=told, **more)


def _kernels(place, call, steps, top=45, **what):
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


def warm(place):
    """Compiles stock PyTorch's step and the ops' compiled peers, whose code the compilers keep on disk."""
    if not place.dry and shutil.which("nvcc"):
        with guarded(what="launches.cu"):
            launches_program()
    _warm_step(place, STOCK[0])
    for case in wanted_cases(place):
        if (peer := case.peers.get("torch.compile")) is not None:
            with guarded(what=f"the compiled {case.op}"):
                peer(*case.operands())
                place.free()
    _warm_step(place, "fastlm, compiled")
    emit(summary="stock's step, the ops' peers and our step compiled")


def _warm_step(place, name):
    with guarded(what=f"the step of {name}"), _setting(place, name):
        Contender(place, name).step()
        place.sync()
    place.free()


# ---- decode


def decode(place):
    """Microseconds between tokens: B = 1 and 64, a prompt of 512, by every backend; what a step consists of."""
    for B in (1, 64):
        shape = place.sizes(B=B, T=512, N=96)
        model, tokens = place.model(shape, positions=1024).bfloat16().eval(), place.tokens(shape)
        for name in (None, *place.backends()):
            label = "fastlm" if name is None else f"fastlm, {name}"
            with guarded(contender=label, shape=shape), use(name):
                gaps, last = [], None
                for _ in stream_tokens(model, tokens, max_new_tokens=shape["N"], temperature=0, stop_at=None):
                    now = time.perf_counter()
                    gaps += [] if last is None else [now - last]
                    last = now
                gaps = gaps[len(gaps) // 4:]  # the first ones capture
                middle = statistics.median(gaps)
                rate = shape["B"] / middle
                emit(contender=label, shape=shape, dtype="bf16", median_us=middle * 1e6, tokens_per_s=rate,
                     spread=Times(tuple(gaps)).spread, samples_us=[round(gap * 1e6, 1) for gap in gaps],
                     told=f"{label:16} B = {shape['B']:3}  {middle * 1e6:8.1f} µs a step  {rate:9.0f} tokens/s")
                if name is None:
                    def run(model=model, tokens=tokens, n=shape["N"]):
                        model.generate(tokens, max_new_tokens=n, temperature=0, stop_at=None)

                    with guarded(contender=label, shape=shape, what="profile"):
                        _kernels(place, run, 1, contender=label, B=shape["B"], tokens=shape["N"])
    emit(summary="decoding measured")


# ---- ops, products, launches


SMALL = {"N": 64, "V": 97, "C": 32, "B": 2, "T": 16, "S": 70, "H": 2, "D": 16}


def wanted_cases(place):
    """The cases that decide, with the peers that count."""
    for op, (sizes, peers) in ((name, case) for name in harness.OPS for case in harness.bench_of(name).DECISIVE):
        sizes = {letter: min(size, SMALL[letter]) for letter, size in sizes.items()} if place.dry else sizes
        dtype = ["fp32" if place.dry or "bf16" not in harness.widths_of(op) else "bf16"]
        for case in harness.suite([op], device=place.device, shape=sizes, dtypes=dtype):
            chosen = {name: peer for name, peer in case.peers.items() if name in peers}
            yield dataclasses.replace(case, peers=chosen, absent={})


def measured_ops(place):
    """Each op on every backend beside its peers, after the comparison with fp64, as shares of measured roofs."""
    roofs = measure_roofs(place.device, seconds=0.02 if place.dry else 0.15,
                          **({"bytes": 2**20, "size": 64} if place.dry else {}))
    emit(roofs=dataclasses.asdict(roofs), told=f"roofs: {roofs}")
    for case in wanted_cases(place):
        if not place.leaves(10, op=case.op, part=case.part, shape=case.shape):
            continue
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
    emit(summary="ops measured")


def products(place):
    """The products of a training step: the head's by length of a row and chunk, sums in fp32, a layer's."""
    for N, V in ((16, 97), (16, 128)) if place.dry else ((16384, 50257), (16384, 50304), (4096, 50304), (32768, 50304)):
        _head_products(place, N, 32 if place.dry else 768, V)
        place.free()
    C = 32 if place.dry else 768
    for K, M in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)):
        _layer_products(place, 16 if place.dry else 32768, K, M)
    emit(summary="products measured")


def _head_products(place, N, C, V):
    h, w, x = (_random(place, *shape) for shape in ((N, C), (V, C), (N, V)))
    out, dh, dw = torch.empty_like(x), torch.empty_like(h), torch.empty_like(w)
    calls = {
        "logits": lambda: torch.mm(h, w.t(), out=out), "dh": lambda: torch.mm(x, w, out=dh),
        "dw": lambda: torch.mm(x.t(), h, out=dw),
    }
    if not place.dry:
        wide, options = torch.zeros(V, C, device=place.device), {"out_dtype": torch.float32}
        calls |= {
            "dw, fp32 out": lambda: torch.mm(x.t(), h, **options),
            "dw, fp32 addmm": lambda: torch.addmm(wide, x.t(), h, **options),
            "dw, fp32 addmm out=": lambda: torch.addmm(wide, x.t(), h, **options, out=wide),
        }
    for name, call in calls.items():
        _product(place, f"head: {name}", call, 2 * N * C * V, N=N, V=V)


def _layer_products(place, N, K, M):
    x, w, b, dy = (_random(place, *shape) for shape in ((N, K), (K, M), (M,), (N, M)))
    calls = {"addmm": lambda: torch.addmm(b, x, w), "mm": lambda: torch.mm(x, w), "dx": lambda: torch.mm(dy, w.t()),
             "dw": lambda: torch.mm(x.t(), dy)}
    for name, call in calls.items():
        _product(place, f"layer: {name}", call, 2 * N * K * M, K=K, M=M)
    _product(place, "layer: column sums", lambda: dy.sum(0, dtype=torch.float32), N * M, K=K, M=M)
    if not place.dry:
        wide = lambda: torch.mm(x.t(), dy, out_dtype=torch.float32)  # noqa: E731
        _product(place, "layer: dw, fp32 out", wide, 2 * N * K * M, K=K, M=M)
        with _cublaslt():
            for name, call in calls.items():
                _product(place, f"layer: {name}, cublasLt", call, 2 * N * K * M, K=K, M=M)


def _random(place, *shape):
    return torch.randn(shape, device=place.device, dtype=torch.float32 if place.dry else torch.bfloat16)


def _product(place, what, call, flops, **sizes):
    with guarded(what=what, **sizes):
        taken = race({what: [call]}, device=place.device, seconds=0.01 if place.dry else 0.06)[what]
        rate = flops / taken.median * 1e-12
        told = " ".join(f"{letter}={size}" for letter, size in sizes.items())
        emit(what=what, **sizes, median_us=taken.median * 1e6, spread=taken.spread, tflop_per_s=rate,
             told=f"{what} {told}: {taken.median * 1e6:.1f} µs {rate:.1f} TFLOP/s")


@contextlib.contextmanager
def _cublaslt():
    """PyTorch's plain products by cublasLt, whose heuristics are others."""
    former = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(former)


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
    source = Path(__file__).with_name("launches.cu")
    architecture = "".join(map(str, torch.cuda.get_device_capability()))
    special = "a" if architecture in ("90", "100", "120") else ""
    target = f"arch=compute_{architecture}{special},code=sm_{architecture}{special}"
    program = cache_folder() / f"launches-{architecture}-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        partial = f"{program}.{os.getpid()}"
        options = ["-O3", "-std=c++17", "-gencode", target, "-cudart", "static"]
        subprocess.run(["nvcc", *options, "-o", partial, str(source)], check=True)
        os.replace(partial, program)
    return str(program)


# ---- transformers


def peers(place):
    """transformers at B = 1, a prompt of 512: static cache and torch.compile, and ours by the same clock."""
    from ..bench_generate import _CACHES, _theirs
    from ..programs import pair

    shape = place.sizes(B=1, T=512, N=64)
    ours, theirs = pair(shape, shape["T"] + shape["N"], place.device)
    dtype = torch.float32 if place.dry else torch.bfloat16
    ours, theirs = ours.to(dtype).eval(), theirs.to(dtype).eval()
    tokens = place.tokens(shape)
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
