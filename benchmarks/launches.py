"""What a launch of a Triton kernel asks of memory: its own loads and stores, counted where it runs interpreted.

Some of its programs run, at the launch's own sizes, over addresses where nothing lies: a load gives zeros. What a
program asks for twice is counted twice, though it may come from a cache the second time.
"""

import contextlib
import inspect
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

SAMPLES = 8  # programs of a launch that run
APART = 44  # bits of an address within a tensor


def extent(tensor):
    """The bytes of a tensor that are there: what is expanded lies in memory once."""
    return tensor.element_size() * math.prod(
        size for size, stride in zip(tensor.shape, tensor.stride()) if stride or not size)


@contextlib.contextmanager
def intercepted(tell):
    """While it is open, tell(kernel's name, {argument: (tensor, bytes loaded, bytes stored)}) stands for a launch."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    known = {}

    def run(kernel, *args, grid, warmup, **options):
        options = {name: value for name, value in options.items() if name in kernel.arg_names}
        given = inspect.signature(kernel.fn).bind(*args, **options).arguments
        key = kernel.fn, grid, tuple(map(_kind, given.values()))
        if key not in known:
            known[key] = _counted(kernel, given, grid)
        tell(kernel.fn.__name__, {name: (given[name], *found) for name, found in known[key].items()})

    def refuse(kernel, *args, **options):
        raise RuntimeError(f"{kernel.fn.__name__} is not interpreted: set TRITON_INTERPRET=1 before it is imported")

    with mock.patch.object(InterpretedFunction, "run", run), mock.patch.object(JITFunction, "run", refuse):
        yield


def _kind(value):
    """What of an argument a count depends on."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride()
    return type(value) if isinstance(value, float) else value


def _counted(kernel, given, grid):
    """{argument: (bytes loaded, bytes stored)} of a launch's tensors."""
    from triton.runtime import interpreter

    builder, handle, (programs,) = interpreter.interpreter_builder, interpreter.TensorHandle, grid
    count = min(programs, SAMPLES)
    apart = programs // count + (2 if count < programs else 0)  # where tiles of a head are neighbours, not all the same
    sample = [apart * i % programs for i in range(count)]
    names = [name for name, value in given.items() if isinstance(value, torch.Tensor)]
    found = np.zeros((2, len(names)), dtype=np.int64)

    def note(way, pointers, mask):
        at = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)].astype(np.int64) >> APART
        size = pointers.get_element_ty().primitive_bitwidth // 8
        found[way] += np.bincount(at.ravel() - 1, minlength=len(names)) * size

    def load(pointers, mask, *_):
        note(0, pointers, mask)
        kind = pointers.get_element_ty()
        return handle(np.zeros(pointers.data.shape, dtype=interpreter._get_np_dtype(kind)), kind)

    def unknown(*_):
        raise NotImplementedError(f"{kernel.fn.__name__}: atomic operations are not counted")

    stand_ins = {name: _Pointer(given[name].dtype, number << APART) for number, name in enumerate(names, 1)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(
            builder, create_masked_load=load, create_atomic_rmw=unknown, create_atomic_cas=unknown,
            create_masked_store=lambda pointers, value, mask, *_: note(1, pointers, mask),
            set_grid_dim=lambda *_: setattr(builder, "grid_dim", (programs, 1, 1)),
            set_grid_idx=lambda i, *_: setattr(builder, "grid_idx", (sample[i], 0, 0))))
        stack.enter_context(mock.patch.multiple(
            interpreter.GridExecutor, _init_args_hst=lambda self, args, options: (args, options),
            _restore_args_dev=lambda *_: None))
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(_disable_current_modes())
        interpreter.GridExecutor(kernel.rewrite(), kernel.arg_names, (count,))(**(given | stand_ins))
    return {name: tuple(int(n) * programs // count for n in found[:, i]) for i, name in enumerate(names)}


class _Pointer(SimpleNamespace):
    """Stands for a tensor among the arguments of an interpreted kernel."""

    def __init__(self, dtype, address):
        super().__init__(dtype=dtype, data_ptr=lambda: address)
