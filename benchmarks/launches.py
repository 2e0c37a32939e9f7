"""What a launch of a Triton kernel asks of memory: its own loads and stores, counted where it runs interpreted.

Some of its programs run, at the launch's own sizes, over addresses that nothing lies at: a load gives zeros. What a
program asks for twice is counted twice, though the second may come from a cache.
"""

import contextlib
import functools
import inspect
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

SAMPLES = 16  # programs of a launch that run
APART = 44  # bits of an address within a tensor


def extent(tensor):
    """The bytes of a tensor that are there: what is expanded lies in memory once."""
    return functools.reduce(lambda n, pair: n * (pair[0] if pair[1] or not pair[0] else 1),
                            zip(tensor.shape, tensor.stride()), tensor.element_size())


@contextlib.contextmanager
def intercepted(tell):
    """While it is open, tell(kernel's name, {argument: (tensor, bytes loaded, bytes stored)}) stands for a launch."""
    from triton.runtime.interpreter import InterpretedFunction

    known = {}

    def run(kernel, *args, grid, warmup, **options):
        given = inspect.signature(kernel.fn).bind(*args, **{
            name: value for name, value in options.items() if name in kernel.arg_names}).arguments
        key = kernel.fn, grid, tuple(map(_sort, given.values()))
        if key not in known:
            known[key] = _counted(kernel, given, grid)
        tell(kernel.fn.__name__, {name: (given[name], *bytes) for name, bytes in known[key].items()})

    with mock.patch.object(InterpretedFunction, "run", run):
        yield


def _sort(value):
    """What a count depends on."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride()
    return type(value) if isinstance(value, float) else value


def _counted(kernel, given, grid):
    """{argument: (bytes loaded, bytes stored)} of a launch's tensors."""
    from triton.runtime import interpreter

    builder, handle, (programs,) = interpreter.interpreter_builder, interpreter.TensorHandle, grid
    count = min(programs, SAMPLES)
    sample = [(programs // count * i + i) % programs if programs > count else i for i in range(count)]
    names = [name for name, value in given.items() if isinstance(value, torch.Tensor)]
    bytes = np.zeros((2, len(names) + 1), dtype=np.int64)

    def note(kind, pointers, mask):
        at = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)].astype(np.int64) >> APART
        size = pointers.get_element_ty().primitive_bitwidth // 8
        bytes[kind] += np.bincount(at.ravel(), minlength=len(names) + 1) * size

    def load(pointers, mask, *_):
        note(0, pointers, mask)
        kind = pointers.get_element_ty()
        return handle(np.zeros(pointers.data.shape, dtype=interpreter._get_np_dtype(kind)), kind)

    def unknown(*_):
        raise NotImplementedError(f"{kernel.fn.__name__}: an atomic operation is not counted")

    args = {name: _Pointer(value, names.index(name) + 1) if name in names else value for name, value in given.items()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(
            builder, create=True, create_masked_load=load, create_atomic_rmw=unknown, create_atomic_cas=unknown,
            create_masked_store=lambda pointers, _, mask, *rest: note(1, pointers, mask),
            set_grid_dim=lambda *_: setattr(builder, "grid_dim", (programs, 1, 1)),
            set_grid_idx=lambda i, *_: setattr(builder, "grid_idx", (sample[i], 0, 0))))
        stack.enter_context(mock.patch.multiple(
            interpreter.GridExecutor, _init_args_hst=lambda self, args, options: (args, options),
            _restore_args_dev=lambda *_: None))
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(torch.utils._python_dispatch._disable_current_modes())
        interpreter.GridExecutor(kernel.rewrite(), kernel.arg_names, (count,))(**args)
    return {name: tuple(int(n) * programs // count for n in bytes[:, i]) for i, name in enumerate(names, 1)}


class _Pointer(SimpleNamespace):
    """Stands for a tensor among the arguments of an interpreted kernel."""

    def __init__(self, tensor, number):
        super().__init__(dtype=tensor.dtype, address=number << APART)

    def data_ptr(self):
        return self.address
