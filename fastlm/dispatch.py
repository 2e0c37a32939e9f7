"""Which function runs an op: one table, one choice, one reason.

A row of the table is one torch op: its schema, and for each backend the module in which a function of the op's name
lives, imported when it is first needed. The choice is made once per call signature: the forced backend, or the
first that can run the call, of what `fastlm tune` measured on the device, fastest first, and then of the row's order.
A forced backend that cannot run raises its sentence, as `Refused`. Nothing else refuses: whatever a kernel raises once
it was chosen is a failure, and the tools that measure and check report it as one.
"""

import functools
import importlib
import os
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from fastlm.backends.machine import BACKENDS, devices, machine_why_not
from fastlm.measure import tuned

_library = torch.library.Library("fastlm", "DEF")

TABLE: dict[str, "Row"] = {}  # by torch op, e.g. softmax_xent_fwd
_forced: dict[str, str] = {}  # family or torch op → backend; "*" stands for every family that has it
_calls: Counter | None = None  # (op, backend) → calls, while `record` is on


class Refused(RuntimeError):
    """A sentence why a backend does not run a call: raised here, before any kernel is called, and nowhere else."""


def failure(error):
    """What an exception that is no refusal says in a line: its first, behind the name of its class.

    Triton's begin with a place in the source and a colon, and end with what is wrong there.
    """
    first, *rest = str(error).strip().splitlines() or [""]
    told = f"{first} {rest[-1]}" if rest and first.endswith(":") else first
    name = "" if type(error) is RuntimeError and told else type(error).__name__
    return ": ".join(part for part in (name, told[:200]) if part)


@dataclass(frozen=True)
class Row:
    """One torch op of a family (softmax_xent has softmax_xent_fwd and softmax_xent_bwd)."""

    name: str
    family: str
    kernels: dict[str, str]  # backend → "module" or "module:object" that holds a function called `name`
    order: dict[str, tuple[str, ...] | Callable]  # device type → backends, best first, or a function (*args) → such
    key: Callable  # (*args) → what the choice depends on, hashable
    limits: Callable  # (backend, *args) → None or the sentence why that backend cannot serve the call
    chosen: dict = field(default_factory=dict)  # key → function


def define(schema, *, family, kernels, order, key, limits, fake):
    """torch.ops.fastlm.<name>, a new row of the table; `fake` gives the outputs' shapes and dtypes."""
    name = schema.split("(")[0]
    row = TABLE[name] = Row(name, family, kernels, order, key, limits)

    def run(*args):
        function = row.chosen.get(row.key(*args))
        return (function or _resolve(row, *args))(*args)

    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlm::{name}", fake, lib=_library)
    return getattr(torch.ops.fastlm, name).default


def why_not(name, backend, *args):
    """None where `backend` can run torch op `name` on `args`, else a sentence. Without args: on this machine at all."""
    row = TABLE[name]
    if backend not in row.kernels:
        return f"{name} has no {backend} kernel; it has {', '.join(row.kernels)}"
    if (reason := machine_why_not(backend)) is not None:
        return reason
    if not args:
        return None
    device = next(arg for arg in args if isinstance(arg, torch.Tensor)).device.type
    if device not in devices(backend):
        return f"the {backend} kernels take tensors on {' or '.join(devices(backend))}, got {device}"
    return row.limits(backend, *args)


def forced(family):
    """The backend that `use` or FASTLM_BACKEND forces for an op family, or None."""
    _read_environment()
    backend = _forced.get(family, _forced.get("*"))
    return backend if backend in backends_of(family) else None


def backends_of(family):
    """The backends that at least one of the family's torch ops has."""
    return {name: None for row in TABLE.values() if row.family == family for name in row.kernels}


def _resolve(row, *args):
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{row.name} is first called under CUDA graph capture; run it once before capturing")
    function = row.chosen[row.key(*args)] = _load(row, choice(row, *args))
    return function


def choice(row, *args):
    """The backend that runs a call; Refused with the reasons where none can."""
    backend = forced(row.family)  # reads the environment, if nobody has
    backend = _forced.get(row.name, backend)
    if backend in row.kernels:  # a backend may have a family's forward and leave its backward to others
        if (reason := why_not(row.name, backend, *args)) is not None:
            raise Refused(f"{row.name} cannot run on backend {backend!r}: {reason}")
        return backend
    reasons = {}
    for backend in _candidates(row, *args):
        reasons[backend] = why_not(row.name, backend, *args)
        if reasons[backend] is None:
            return backend
    told = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
    raise Refused(f"no backend can run {row.name}: {told}")


def _candidates(row, *args):
    """The backends that are asked for a call when none is forced, in turn: as tuned on the device, then as usual."""
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point())
    usual = row.order.get(tensor.device.type, ("torch", "reference"))
    usual = usual(*args) if callable(usual) else usual
    fastest = tuned.order(row.family, tensor.dtype, tensor.device) if tensor.device.type in ("cpu", "cuda") else ()
    return list(dict.fromkeys(name for name in (*fastest, *usual) if name in row.kernels))


def _load(row, backend):
    module, _, holder = row.kernels[backend].partition(":")
    module = importlib.import_module(module)
    function = getattr(getattr(module, holder) if holder else module, row.name)
    if _calls is None:
        return function

    def counted(*args):
        _calls[row.name, backend] += 1
        return function(*args)

    return counted


def _forget():
    for row in TABLE.values():
        row.chosen.clear()


class use:
    """Forces a backend: `use("triton")` for every op that has it, `use(attention="cuda")` for one.

    A backend that lacks a part of an op leaves it to the others: `cuda` has no backward of attention.
    `use(attention="cuda", attention_qkv_bwd="torch")` forces that part, a torch op, too. Takes effect at once; as a
    context manager it is undone at the end. None lifts a force. Raises ValueError for an unknown backend or op,
    `Refused` (a RuntimeError) with the reason where this machine cannot run the backend. The setting holds for the
    whole process (the backward pass runs in threads of its own).
    """

    def __init__(self, backend=None, /, **by_op):
        _read_environment()
        self._former = dict(_forced)
        _force(by_op if by_op and backend is None else {"*": backend, **by_op})

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        _forced.clear()
        _forced.update(self._former)
        _forget()


def _force(wanted, said="use"):
    families = {row.family for row in TABLE.values()}
    for op, name in wanted.items():
        if op != "*" and op not in families and op not in TABLE:
            raise ValueError(f"{said}: no op {op!r}; the ops are {', '.join(sorted(families))}")
        if name is None:
            continue
        if name not in BACKENDS:
            raise ValueError(f"{said}: no backend {name!r}; the backends are {', '.join(BACKENDS)}")
        has = () if op == "*" else backends_of(op) if op in families else TABLE[op].kernels
        if op != "*" and name not in has:
            raise ValueError(f"{said}: {op} has no {name} kernel; it has {', '.join(has)}")
        if (reason := machine_why_not(name)) is not None:
            raise Refused(f"{said}: backend {name!r} cannot run here: {reason}")
    for op, name in wanted.items():
        _forced.pop(op, None) if name is None else _forced.update({op: name})
    _forget()


@functools.cache
def _read_environment():
    """Takes FASTLM_BACKEND, `triton` or `attention=cuda,softmax_xent=triton`, the first time a choice is made."""
    text = os.environ.get("FASTLM_BACKEND", "").strip()
    if not text:
        return
    pairs = [part.partition("=") for part in text.split(",")] if "=" in text else [("*", "=", text)]
    if bad := [part for part, equals, _ in pairs if not equals]:
        raise ValueError(f"FASTLM_BACKEND: got {bad[0]!r}, wanted a backend, or op=backend,op=backend")
    _force({op.strip(): backend.strip() for op, _, backend in pairs}, "FASTLM_BACKEND")


@contextmanager
def record():
    """Counts calls while it is open: yields a Counter of (torch op, backend)."""
    global _calls
    former, calls = _calls, Counter()
    _calls = calls
    _forget()
    try:
        yield calls
    finally:
        _calls = former
        if former is not None:  # a record within another counts for both
            former.update(calls)
        _forget()
