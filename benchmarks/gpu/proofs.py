"""What must hold before anything is timed: what is there, every op on every backend, captured steps, the sanitizer."""

import contextlib
import itertools
import json
import math
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version

import torch

from fastlm import dispatch, ops
from fastlm.backends.machine import machine_why_not
from fastlm.dispatch.forcing import use
from fastlm.dispatch.refusal import Refused
from fastlm.dispatch.table import TABLE, backends_of
from fastlm.measure.certificate import CASES
from fastlm.measure.numerics import DTYPES, compare
from fastlm.training.config import TrainConfig
from fastlm.training.optimizer import AdamW
from fastlm.training.step import autocast

from .. import harness
from .command import ROW
from .place import emit, guarded


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
            "device": properties.name, "capability": list(torch.cuda.get_device_capability()),
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
            "multiprocessors": properties.multi_processor_count, "l2_mib": properties.L2_cache_size // 2**20,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    import fastlm._C as _C

    found |= {"built": _C.cuda.architectures() if hasattr(_C, "cuda") else None, "cpus": os.cpu_count()}
    emit(head=found, summary=", ".join(f"{key} {value}" for key, value in found.items())[:300])
    for name in ("cuda", "triton") if not place.dry else ():
        if (reason := machine_why_not(name)) is not None:
            emit(backend=name, failed=reason)


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
SMALL = {"V": 1031, "C": 128, "L": 2, "H": 2}  # a model
CAPTURES = ("captured training step", "captured decoding")


def smoke(place):
    """Every part in a process of its own, several at a time; then that no torch op of the table was forgotten."""
    def part(name):
        command = [sys.executable, "-m", "fastlm.benchmarks.gpu.steps", "part", name, *(["--dry"] if place.dry else [])]
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
    forgotten = [(op, name) for op, row in TABLE.items() for name in place.backends(row.family)
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
            ran = {(op, used) for op, used in calls if TABLE[op].family == family}
            called |= {pair for pair in ran if dtype == "bf16" or "bf16" not in harness.widths_of(family)}
            if ours := sorted(op for op, used in ran if used != backend and backend in TABLE[op].kernels):
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

    with use(**{family: backend}):
        return case(random, lambda x: x.to(place.device, computed))


def _ratio(got, composed, truth, what):
    try:
        return compare(got.cpu(), composed.cpu(), truth.cpu().double(), backward=what[0] == "d").ratio
    except AssertionError:  # NaN or infinity out of place
        return math.inf


def _captured_training(place):
    """A step replayed as a CUDA graph gives the loss of the eager one."""
    losses = {}
    for captured in (False, True):
        model = place.model(SMALL, positions=256).train()
        optimizer = AdamW(model, TrainConfig(data="", out="", grad_clip=1.0))
        ids = place.tokens({**SMALL, "B": 4, "T": 128}, more=1)
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
    model = place.model(SMALL, positions=256).eval()
    tokens = place.tokens({**SMALL, "B": 3, "T": 20})
    with torch.no_grad():
        row = tokens
        for _ in range(24):
            row = torch.cat([row, model(row)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    for name in (None, *place.backends()):
        with guarded(may_refuse=True, part=CAPTURES[1], backend=name), use(name):
            got = torch.stack(model.generate(tokens, max_new_tokens=24, temperature=0, stop_at=None))
            same = bool((got.to(row.device) == row).all())
            emit(part=CAPTURES[1], backend=name,
                 **({"same": True} if same else {"failed": "captured decoding writes other tokens than the model"}))


def sanitize(place):
    """The CUDA kernels at small shapes, for compute-sanitizer to watch.

    linear_xent's are softmax_xent's, and the racecheck does not survive the library's products around them.
    """
    for name, (family, case) in SMOKE.items():
        if "cuda" in backends_of(family) and family != "linear_xent":
            for dtype in ("bf16", "fp32"):
                with contextlib.suppress(Refused):
                    _case(place, family, case, "cuda", DTYPES[dtype], dtype)
                    torch.cuda.synchronize()
                    print(f"{name} {dtype}", flush=True)
    emit(summary="every CUDA kernel ran")
