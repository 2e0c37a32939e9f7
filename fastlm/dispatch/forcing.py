"""Which backends are forced: by `use`, or from the start by FASTLM_BACKEND."""

import os

from fastlm.backends.machine import BACKENDS, machine_why_not
from fastlm.dispatch.refusal import Refused
from fastlm.dispatch.table import TABLE, backends_of, forget

_read = False  # the environment
_forced: dict[str, str] = {}  # family or torch op → backend; "*" stands for every family that has it


def forced(family, part=None):
    """The backend that is forced for an op family, or for `part` of it, a torch op; None where none is."""
    _read_environment()
    backend = _forced.get(family, _forced.get("*"))
    return _forced.get(part, backend if backend in backends_of(family) else None)


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
        forget()


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
    forget()


def _read_environment():
    """Takes FASTLM_BACKEND, `triton` or `attention=cuda,softmax_xent=triton`, the first time it matters."""
    global _read
    if _read:
        return
    text = os.environ.get("FASTLM_BACKEND", "").strip()
    if not text:
        _read = True
        return
    pairs = [part.partition("=") for part in text.split(",")] if "=" in text else [("*", "=", text)]
    if bad := [part for part, equals, _ in pairs if not equals]:
        raise ValueError(f"FASTLM_BACKEND: got {bad[0]!r}, wanted a backend, or op=backend,op=backend")
    _force({op.strip(): backend.strip() for op, _, backend in pairs}, "FASTLM_BACKEND")
    _read = True
