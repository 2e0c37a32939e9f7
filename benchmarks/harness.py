"""The harness: every contender is checked against fp64, then all are timed in turn, and each figure gets its roof.

A bench file states its cases: operands, bytes and FLOPs, our op, and peers that compute the same results. Here they
are run, and become rows:

    of_roof   the seconds that the bytes or the FLOPs need at this machine's roof, over the median
    error     largest (or mean) error against fp64, over what the numerics policy allows

A row without figures says why: it was `refused` (by dispatch; a peer may refuse with whatever it raises), it `failed`
(a kernel of ours raised), or it is `wrong`. The last two are faults: the other rows are measured still.
"""

import ctypes
import dataclasses
import functools
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastlm import dispatch, ops
from fastlm.backends.machine import devices, machine_why_not
from fastlm.dispatch.forcing import use
from fastlm.dispatch.refusal import Refused, failure
from fastlm.dispatch.table import TABLE, backends_of
from fastlm.measure.clock import NOISY, Times, race, sets_beyond_cache
from fastlm.measure.files import write_json
from fastlm.measure.numerics import DTYPES, compare
from fastlm.measure.roofs import device_name

OPS = tuple(ops.FAMILIES)  # each with a file bench_<op>.py
PROGRAMS = ("generate", "train", "products")


@dataclass(frozen=True)
class Case:
    """One op at one shape: what it works on, what it costs, and who takes part.

    operands() gives random operands, another set each time; ours and every peer take them and return their results by
    name (a gradient's begins with d). check() gives the operands of the comparison with fp64, smaller ones where the
    truth of the whole would not fit.
    """

    op: str
    part: str  # "forward", "forward + backward"
    shape: dict[str, int]
    dtype: str
    bytes: int  # that must move
    flops: int
    memory: int  # bytes that operands, results and the check take
    operands: Callable
    ours: Callable
    peers: dict[str, Callable] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # peer → the sentence why it does not take part
    check: Callable | None = None
    traffic: str = "copy"  # or "read": the roof that the bytes have
    peak: bool = False  # the memory that a call takes is measured too
    passes = 2  # each in a process of its own: see `apart`

    def run(self, device, roofs, **options):
        """The rows of this case; see `measure`."""
        return measure(self, device, roofs, **options)

    @property
    def name(self):
        return f"{self.op} {self.part} {self.dtype} " + " ".join(f"{k}={v}" for k, v in self.shape.items())


def suite(wanted=None, *, device="cpu", shape=None, dtypes=None):
    """The cases of the wanted ops or programs, all ops unless given, at `shape` (letters → sizes) or the usual ones.

    Raises ValueError for an unknown op or dtype, or for a letter that an op does not have.
    """
    for op in wanted or ():
        if op not in OPS + PROGRAMS:
            raise ValueError(f"no op {op!r} to measure; there are {', '.join(OPS)}, and {', '.join(PROGRAMS)}")
    cases = []
    for op in wanted or OPS:
        module = bench_of(op)
        widths = widths_of(op)
        for dtype in dtypes or ():
            if dtype not in widths:
                raise ValueError(f"no dtype {dtype!r}, wanted {', '.join(widths)}")
        usual = module.SHAPES["cuda" if torch.device(device).type == "cuda" else "cpu"]
        for letter, size in (shape or {}).items():
            if letter not in usual[0]:
                raise ValueError(f"{op} has no size {letter!r}; it has {', '.join(usual[0])}")
            if size < 1:
                raise ValueError(f"{op}: size {letter} is {size}, wanted ≥ 1")
        shapes = [{**usual[0], **shape}] if shape else usual
        for sizes in shapes:
            narrow = [width for width in widths if width not in DTYPES and torch.device(device).type == "cpu"]
            usual_widths = [width for width in ("fp32", "bf16") if width in widths]
            for dtype in dtypes or (*usual_widths, *narrow):
                cases += module.cases(sizes, dtype, device)
    return cases


def bench_of(op):
    """The module bench_<op>."""
    return importlib.import_module(f".bench_{op}", __package__)


def widths_of(op):
    """The dtypes that an op is measured in: name → torch's."""
    return getattr(bench_of(op), "WIDTHS", DTYPES)


def model_suite(config, B, T, *, device="cpu", dtypes=None):
    """The cases of a model's training step (B, T) and of decoding, ours alone, without peers."""
    cases = []
    for op in OPS:
        known = [dtype for dtype in dtypes or () if dtype in widths_of(op)]
        for shape in bench_of(op).of_model(config, B, T) if known or not dtypes else ():
            cases += suite([op], device=device, shape=shape, dtypes=known)
    return [dataclasses.replace(case, peers={}, absent={}) for case in cases]


def fastest(rows):
    """A row for every op and dtype: its backends in the order of their times, a geometric mean over the cases.

    A backend that refused a case, failed or was wrong is left out.
    """
    found = []
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in rows):
        ours = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype) and row["ours"]]
        shapes = {(row["part"], *row["shape"].items()): row["shape"] for row in ours}
        taken = {}
        for row in ours:
            taken.setdefault(row["contender"].removeprefix("fastlm "), []).append(row.get("median_us"))
        us = {name: statistics.geometric_mean(times) for name, times in taken.items()
              if None not in times and len(times) == len(shapes)}
        found.append({"op": op, "dtype": dtype, "order": sorted(us, key=us.get), "us": us,
                      "shapes": list(shapes.values())})
    return found


def contenders(case, device):
    """name → function of the operands: ours, as "fastlm <backend>", on every backend that runs natively, and peers."""
    interpreted = {"triton"} if os.environ.get("TRITON_INTERPRET") == "1" else set()
    names = [name for name in backends_of(case.op) if name not in {"reference"} | interpreted
             and device in devices(name) and machine_why_not(name) is None]
    return {**{f"fastlm {name}": _forcing(case, name) for name in names}, **case.peers}


def _forcing(case, backend):
    def run(*operands):
        return case.ours(*operands)

    run.backend = backend
    return run


def measure(case, device, roofs, *, seconds=1.0, cold=True):
    """Rows (dicts) of a case: a row of each contender, with its figures, or with the sentence why there are none.

    cold: operands go in a circle longer than the cache. A row of ours of which other backends ran a part has `ran`,
    torch op → backend. Raises ValueError where the case does not fit into memory, before anything is allocated.
    """
    plan(case, device)
    try:
        torch.manual_seed(0)
        operands = (case.check or case.operands)()
        truth, composed = _reference(case, [_double(x) for x in operands]), _reference(case, _copies(operands))
    except Exception as error:
        return [failed_row(case, error, cold=cold)]
    rows, racing = {}, {}
    for name, function in contenders(case, device).items():
        row = rows[name] = row_of(case, case.part, name, ours=hasattr(function, "backend"), cold=cold)
        try:
            with _use(case, function), dispatch.record() as ran:
                row["error"] = max(_ratio(got, composed[what], truth[what], what[0] == "d")
                                   for what, got in function(*_copies(operands)).items())
        except Exception as error:
            row |= told(error, ours=row["ours"])
            continue
        if row["ours"] and any(backend != function.backend for _, backend in ran):
            row["ran"] = dict(ran.keys())
        if not row["error"] <= 1 and row["ours"]:
            row["wrong"] = True  # a wrong kernel has no speed
            continue
        racing[name] = function
    del operands, truth, composed
    try:
        sets = [case.operands()]
        if cold:
            size = sum(x.nbytes for x in sets[0] if isinstance(x, torch.Tensor))
            sets += [case.operands() for _ in range(min(sets_beyond_cache(size, device), 64) - 1)]
    except Exception as error:
        return [*rows.values(), failed_row(case, error, cold=cold)]
    chosen, failed = None, {}
    try:
        chosen = _chosen(case, sets[0])
    except Exception as error:
        rows["fastlm"] = failed_row(case, error, cold=cold)
    calls = {name: [functools.partial(function, *operands) for operands in sets] for name, function in racing.items()}
    if case.peak:
        for name, some in list(calls.items()):
            try:
                with _use(case, racing[name]):
                    some[0]()  # what is compiled or made once takes memory only now
                    peak = peak_bytes(some[0], device)
            except Exception as error:
                failed[name] = error
                del calls[name]
                continue
            rows[name]["peak_mib"] = None if peak is None else round(peak / 2**20)
    with use(**{case.op: None}):  # undone at the end
        times = race(calls, device=device, seconds=seconds, before=lambda name: _use(case, racing[name]), failed=failed)
    for name, error in failed.items():
        rows[name] |= told(error, ours=rows[name]["ours"])
    floor = roofs.floor(bytes=case.bytes, flops=case.flops, dtype=case.dtype, traffic=case.traffic)
    for name, taken in times.items():
        rows[name] |= figures(taken, floor) | {
            "gb_per_s": case.bytes / taken.median * 1e-9, "tflop_per_s": case.flops / taken.median * 1e-12,
            "chosen": name == f"fastlm {chosen}",
        }
    return [*rows.values(), *absent_rows(case, case.part, case.absent, cold=cold)]


def told(error, *, ours):
    """What a row says of an exception: a peer refuses with any, ours with what dispatch raised."""
    if not ours or isinstance(error, Refused):
        return {"refused": refusal(error)}
    return {"failed": failure(error)}


def failed_row(case, error, *, cold):
    """The row of a case, or of dispatch's choice in it, that raised outside of a contender."""
    return row_of(case, getattr(case, "part", "all"), "fastlm", ours=True, cold=cold) | told(error, ours=True)


def attempt(measure, case, *args, cold=True, **options):
    """The rows that measure(case, ...) returns, or that it failed. ValueError is the caller's: bad input."""
    try:
        return measure(case, *args, cold=cold, **options)
    except ValueError:
        raise
    except Exception as error:
        return [failed_row(case, error, cold=cold)]


def faults(rows):
    """A sentence for every row of ours that failed or is wrong, and every case in which nothing of ours was timed."""
    found, cases = [], {}
    for row in rows:
        name = " ".join((row["op"], row["part"], row["dtype"], *(f"{k}={v}" for k, v in row["shape"].items())))
        if row["ours"]:
            cases.setdefault(name, []).append(row)
        if row.get("wrong"):
            found.append(f"{name}: {row['contender']} is WRONG: {row['error']:.2f} of the allowed error")
        elif "failed" in row:
            found.append(f"{name}: {row['contender']} FAILED: {row['failed']}")
    for name, ours in cases.items():
        if all("refused" in row for row in ours):
            found.append(f"{name}: nothing of ours was measured: {ours[0]['contender']}: {ours[0]['refused']}")
    return found


def title(row):
    """A contender's name, and what ran it where other backends did: fastlm cuda+torch; fastlm torch, for cuda."""
    own, ran = row["contender"].removeprefix("fastlm "), dict.fromkeys(row.get("ran", {}).values())
    if not ran:
        return row["contender"]
    others = "+".join(name for name in ran if name != own)
    return f"fastlm {own}+{others}" if own in ran else f"fastlm {others}, for {own}"


def row_of(case, part, contender, *, ours, cold):
    """A row without figures yet."""
    return {"op": case.op, "part": part, "dtype": case.dtype, "shape": case.shape, "cold": cold,
            "contender": contender, "ours": ours}


def absent_rows(case, part, absent, *, cold):
    """The rows of peers (name → why) that do not take part."""
    return [row_of(case, part, name, ours=False, cold=cold) | {"refused": why} for name, why in absent.items()]


def merge(rows, again):
    """The rows of a case from both of its passes: all samples, and a spread that covers what lay between the two.

    What refused, failed or was wrong in one of them has no figures; what only one has is taken from it.
    """
    def by_contender(some):
        return {(row.get("part"), row["contender"]): row for row in some}

    first, second = by_contender(rows), by_contender(again)
    return [_merged(first[key], second[key]) if key in first and key in second else first.get(key) or second[key]
            for key in {**first, **second}]


def _merged(first, second):
    kept = ("wrong", "refused", "failed", *(("error",) if "wrong" in second else ()))
    row = {**first, **{key: second[key] for key in kept if key in second}}
    if "median_us" in first and "median_us" in second:
        samples = first["samples_us"] + second["samples_us"]
        both = Times(tuple(samples))
        spread = max(both.spread, abs(first["median_us"] - second["median_us"]) / both.median)
        return row | {"median_us": both.median, "samples_us": samples, "spread": spread, "noisy": spread > NOISY} | {
            rate: first[rate] * first["median_us"] / both.median for rate in ("of_roof", "gb_per_s", "tflop_per_s")}
    return {key: value for key, value in row.items() if key not in FIGURES}


FIGURES = ("median_us", "spread", "noisy", "of_roof", "samples_us", "gb_per_s", "tflop_per_s")


def figures(times, floor):
    """What Times tell, beside the seconds that the roof allows."""
    return {"median_us": times.median * 1e6, "spread": times.spread, "noisy": times.noisy,
            "of_roof": floor / times.median, "samples_us": [round(sample * 1e6, 3) for sample in times.samples]}


def head(device):
    """What a reader must know of a run: device, versions, commit, date, load."""
    packages = {}
    for name in ("torch", "triton", "transformers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "device": device_name(device), "kind": torch.device(device).type, "threads": torch.get_num_threads(),
        "python": platform.python_version(), **packages, "fastlm": version("fastlm"), "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "load": round(os.getloadavg()[0], 2),
    }


def commit():
    """The commit of the checkout this file lies in, with + where files were changed; None outside of one."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    if name.returncode:
        return None
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


def write(path, head, roofs, rows):
    """Writes a results file whole or not at all."""
    write_json(path, {"head": head, "roofs": roofs, "rows": rows})


def read(path):
    """A results file as a dict of head, roofs and rows; ValueError where it is none."""
    try:
        found = json.loads(Path(path).read_text())
        good = isinstance(found, dict) and {"head", "roofs", "rows"} <= found.keys() and all(
            isinstance(row, dict) and {"op", "part", "dtype", "shape", "contender"} <= row.keys()
            for row in found["rows"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no results file: {error}; measure again with fastlm bench --out") from None
    if not good:
        raise ValueError(f"{path} is no results file: it lacks head, roofs or rows; measure again")
    return found


def plan(case, device):
    """Raises ValueError where a case does not fit into the memory that is free."""
    free = free_memory(device)
    if case.memory > free:
        raise ValueError(
            f"{case.name} needs about {case.memory / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; "
            "choose smaller sizes with --shape"
        )


def fitting(cases, device, asked):
    """(the cases that fit into memory, sentences on the others); asked: for each, so that one too large raises."""
    fit, told = [], []
    for case in cases:
        try:
            plan(case, device)
            fit.append(case)
        except ValueError as error:
            if asked:
                raise
            told.append(str(error))
    return fit, told


def peak_bytes(call, device):
    """The most memory that a call takes beyond what is held before it; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is the system's again, so that taking it counts
        before = _resident("VmRSS")
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # the high-water mark begins here
        call()
        return max(_resident("VmHWM") - before, 0)
    except (OSError, AttributeError, StopIteration):
        return None


def _resident(what):
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(what))


def free_memory(device):
    """Bytes that may still be allocated on a device."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later is free too
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


# ---- the parts of `measure`


def _reference(case, operands):
    with use(**{case.op: "reference"}):
        return {name: value.detach() for name, value in case.ours(*operands).items()}


def _double(x):
    if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
        return x
    return x.detach().to(torch.float64, copy=True).requires_grad_(x.requires_grad)


def _copies(operands):
    """What may be written to; the next contender is given the same numbers."""
    return [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in operands]


def _use(case, function):
    return use(**{case.op: getattr(function, "backend", None)})


def _chosen(case, operands):
    """The backend that dispatch chooses."""
    with dispatch.record() as calls:
        case.ours(*operands)
    return next(backend for (name, backend) in calls if TABLE[name].family == case.op)


def _ratio(got, composed, truth, backward):
    try:
        return compare(got.detach(), composed, truth, backward=backward).ratio
    except AssertionError:  # NaN or infinity out of place
        return math.inf


def refusal(error):
    """The first line of what a contender raised."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
