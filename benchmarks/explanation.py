"""Why a backend runs an op here: what `fastlm explain` prints."""

import importlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm import dispatch
from fastlm.dispatch.forcing import forced
from fastlm.dispatch.table import TABLE
from fastlm.measure import tuned
from fastlm.measure.numerics import DTYPES


def explanation(cases):
    """Lines on every torch op that cases call: the backend chosen, its launch, and why each other one is not."""
    for name, args in calls_of(cases).items():
        row = TABLE[name]
        chosen = dispatch.choice(row, *args)
        configurations = _configurations(row, args) if chosen == "triton" else []
        launch = f", launched with {', '.join(map(str, configurations))}" if configurations else ""
        yield f"[bold cyan]{name}[/] runs on [bold green]{chosen}[/]{launch}"
        wanted = forced(row.family)  # where it lacks this part of the op, another runs it
        for backend in dict.fromkeys((*([wanted] if wanted else ()), *row.kernels)):
            if backend != chosen:
                told = dispatch.why_not(name, backend, *args) or _behind(row, chosen, backend, args)
                yield f"  not {backend}: " + told.replace("[", "\\[")


def calls_of(cases, *, whole=False):
    """{torch op of ours: the arguments of its first call} that cases make, at their `whole` sizes or a check's."""
    torch.manual_seed(0)
    with _Calls() as calls:
        for case in cases:
            case.ours(*(case.operands if whole else case.check or case.operands)())
    return calls.seen


class _Calls(TorchDispatchMode):
    """The arguments of the first call of every torch op of ours."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastlm":
            self.seen.setdefault(func._opname, args)
        return func(*args, **(kwargs or {}))


def _configurations(row, args):
    """What the `_config` of a Triton kernel's module answers during a call, in the order of its launches."""
    module, asked = importlib.import_module(row.kernels["triton"]), []
    original = getattr(module, "_config", None)

    def asking(*arguments):
        asked.append(original(*arguments))
        return asked[-1]

    if original is not None:
        module._config = asking
        try:
            getattr(torch.ops.fastlm, row.name)(*args)
        finally:
            module._config = original
    return asked


def _behind(row, chosen, backend, args):
    """Why a backend that could run is not chosen."""
    if forced(row.family) == chosen:
        return "another is forced"
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point())
    for tuned_row in (row for row in tuned.tables(tensor.device) if "order" in row):
        us = tuned_row["us"]
        same = (tuned_row["op"], DTYPES[tuned_row["dtype"]]) == (row.family, tensor.dtype)
        if same and {chosen, backend} <= us.keys():
            return f"fastlm tune measured {us[backend]:,.0f} µs on this kind of device, {chosen} {us[chosen]:,.0f} µs"
    return f"it stands behind {chosen} in the usual order; fastlm tune measures them on this device"
