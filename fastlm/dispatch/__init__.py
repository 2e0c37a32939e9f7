"""Which function runs an op: one choice, one reason.

The choice among the backends of a row (table.py) is made once per call signature: the forced one (forcing.py), or the
first that can run the call, of what `fastlm tune` measured on the device, fastest first, and then of the row's order;
its module is imported then. A forced backend that cannot run raises its sentence, as `Refused`. Nothing else refuses:
whatever a kernel raises once it was chosen is a failure, and the tools that measure and check report it as one.
"""

import importlib
from collections import Counter
from contextlib import contextmanager

import torch
from torch import is_grad_enabled
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _is_torch_function_mode_enabled,
    _len_torch_dispatch_stack,
)
from torch.autograd import _profiler_enabled
from torch.compiler import is_compiling

from fastlm.backends.machine import devices, machine_why_not
from fastlm.dispatch import samples
from fastlm.dispatch.forcing import forced
from fastlm.dispatch.refusal import Refused
from fastlm.dispatch.table import TABLE, Row, forget
from fastlm.measure import tuned

_library = torch.library.Library("fastlm", "DEF")
_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, torch.dtype}  # arguments
_calls: Counter | None = None  # (op, backend) → calls, while `record` is on


def define(schema, *, family, kernels, order, key, limits, fake):
    """torch.ops.fastlm.<name>, a new row of the table; `fake` gives the outputs' shapes and dtypes.

    What comes back calls it, and where nobody looks on passes torch's dispatcher over, an eighth of a small call.
    """
    name = schema.split("(")[0]
    row = TABLE[name] = Row(name, family, kernels, order, key, limits)

    def run(*args):
        function = row.chosen.get(row.key(*args))
        return (function or _resolve(row, *args))(*args)

    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlm::{name}", fake, lib=_library)
    op = getattr(torch.ops.fastlm, name).default
    samples.batch(op, _library)

    def call(*args):
        return run(*args) if _unseen(args) else op(*args)

    return op if op._schema.is_mutable else call


def _unseen(args):
    """Whether an op is the same without torch's dispatcher: nothing traces, records or profiles it, or wraps args."""
    return not (is_compiling() or is_grad_enabled() or _len_torch_dispatch_stack() or _is_torch_function_mode_enabled()
                or _are_functorch_transforms_active() or _get_tracing_state() is not None or _profiler_enabled()
                ) and _PLAIN.issuperset(map(type, args))


def left_to_inductor(family, x):
    """Whether an op of pointwise parts is better given to torch.compile as those, to be fused with its neighbours: on a
    GPU, where no backend is forced."""
    return is_compiling() and is_gpu(x) and forced(family) is None


def is_gpu(x):
    return x.device.type == "cuda"


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


def choice(row, *args):
    """The backend that runs a call; Refused with the reasons where none can."""
    backend = forced(row.family, row.name)
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


def _resolve(row, *args):
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{row.name} is first called under CUDA graph capture; run it once before capturing")
    function = row.chosen[row.key(*args)] = _load(row, choice(row, *args))
    return function


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


@contextmanager
def record():
    """Counts calls while it is open: yields a Counter of (torch op, backend)."""
    global _calls
    former, calls = _calls, Counter()
    _calls = calls
    forget()
    try:
        yield calls
    finally:
        _calls = former
        if former is not None:  # a record within another counts for both
            former.update(calls)
        forget()
