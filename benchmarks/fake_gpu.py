"""A GPU that is not there: tensors of device cuda without numbers, forward and backward, for what counts and watches.

    with fake_gpu():                                 tensors of device cuda are torch's fake tensors
        with autograd_of(model.parameters()): ...    and loss.backward() runs

Python and autocast take them for tensors of an H200. All else of C++, whose guards and streams a torch without CUDA
lacks, takes them for meta tensors. Autocast asks for the device of operands, and excludes its key meanwhile; within
that the autograd engine asks too, but for the device of results, which do not require a gradient yet, and once that of
leaves, which it is made to ask for before (`autograd_of`).
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm import dispatch
from fastlm.backends import machine
from fastlm.dispatch.table import forget
from fastlm.measure import tuned

CAPABILITY, MULTIPROCESSORS, NAME = (9, 0), 132, "fake GPU"
_engine = SimpleNamespace(asks=False, runs=False)  # whether none but the autograd engine asks for devices


def in_backward():
    """Whether a backward runs."""
    return _engine.runs


def _device_of(args):
    tensor, = args
    own = tensor.device.type != "cuda" or not _engine.asks and _in_autocast() and _is_operand(tensor)
    return tensor.device if own else torch.device("meta")


def _in_autocast():
    """Whether an operation that autocast knows runs, above what autograd and modes make of it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    torch.autocast_increment_nesting()
    return (torch.autocast_decrement_nesting() > 0 and excluded.has(torch._C.DispatchKey.AutocastCUDA)
            and not excluded.has(torch._C.DispatchKey.AutogradOther))


def _is_operand(tensor):
    """Whether it has what the autograd engine would only now give it, where it records a result."""
    recorded = tensor.requires_grad and (tensor.grad_fn is not None or not tensor._is_view())
    return recorded or not torch.is_grad_enabled()


def _backward(*args, run=torch.autograd.graph._engine_run_backward, **options):
    with mock.patch.multiple(_engine, asks=True, runs=True):
        return run(*args, **options)


class _FromMeta(TorchDispatchMode):
    """Has on the GPU what C++ makes on device meta."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(kwargs.get("device"), "type", None) == "meta":
            kwargs["device"] = torch.device("cuda", 0)
        return function(*args, **kwargs)


@contextlib.contextmanager
def fake_gpu(capability=CAPABILITY):
    """While it is open, torch has a GPU of a compute capability whose tensors have no numbers."""
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS, name=NAME)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(
            torch.cuda, is_available=lambda: True, get_device_capability=lambda *_: capability,
            get_device_properties=lambda *_: properties, get_device_name=lambda *_: NAME,
            is_bf16_supported=lambda *_: True, is_current_stream_capturing=lambda: False,
            device_of=lambda _: contextlib.nullcontext()))
        stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(mock.patch.dict(
            machine.BACKENDS, {name: (("cuda",), lambda: None) for name in ("cuda", "triton")}))
        stack.enter_context(mock.patch.object(dispatch, "devices", lambda backend: machine.BACKENDS[backend][0]))
        stack.enter_context(mock.patch.dict(
            fake_tensor._DISPATCH_META_HANDLERS, {torch.ops.prim.device.default: _device_of}))
        stack.enter_context(mock.patch.multiple(
            fake_tensor.FakeTensor, create=True, data_ptr=lambda _: 0,
            is_cuda=property(lambda tensor: tensor.device.type == "cuda")))
        stack.enter_context(mock.patch.object(fake_tensor.FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", lambda *_: None))
        stack.enter_context(mock.patch("torch.autograd._engine_run_backward", _backward))
        for clear in forget, tuned._name.cache_clear:
            stack.callback(clear)
            clear()
        stack.enter_context(fake_tensor.FakeTensorMode())
        stack.enter_context(_FromMeta())
        yield


@contextlib.contextmanager
def autograd_of(parameters):
    """While it is open, autocast takes these leaves and a backward reaches them."""
    with mock.patch.object(_engine, "asks", True):
        kept = [parameter.view_as(parameter).grad_fn.next_functions for parameter in parameters]
    yield
    del kept
