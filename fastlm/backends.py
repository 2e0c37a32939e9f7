"""The backends an op can run on, and whether this machine has them."""

import functools
import importlib.util
import os

import torch


@functools.cache
def _native():
    """None where the compiled module loads, else the sentence why not."""
    if importlib.util.find_spec("fastlm._C") is None:
        return "the compiled kernels were not built: install a C++ compiler and reinstall fastlm"
    try:
        import fastlm._C  # noqa: F401
    except ImportError as error:
        return f"the compiled kernels do not load ({error}): reinstall fastlm"
    return None


@functools.cache
def _no_gpu():
    return None if torch.cuda.is_available() else "this machine has no CUDA GPU that torch can use"


def _cuda():
    if (reason := _native()) is not None:
        return reason
    import fastlm._C as _C

    if not hasattr(_C, "cuda"):
        return "fastlm was built without CUDA: install the CUDA toolkit (nvcc) and reinstall fastlm"
    return _no_gpu()


@functools.cache
def _triton():
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return _no_gpu()


def _always():
    return None


# name → (device types of the tensors it takes, the sentence why this machine cannot, or None)
BACKENDS = {
    "cuda": (("cuda",), _cuda),
    "triton": (("cuda",), _triton),
    "cpu": (("cpu",), _native),
    "torch": (("cpu", "cuda", "meta", "mps", "xpu"), _always),
    "reference": (("cpu", "cuda", "meta", "mps", "xpu"), _always),
}


def devices(backend):
    """Device types of the tensors that `backend` takes; interpreted Triton takes those on the CPU."""
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return ("cpu",)
    return BACKENDS[backend][0]


def machine_why_not(backend):
    """None where this machine can run `backend`, else a sentence."""
    return BACKENDS[backend][1]()
