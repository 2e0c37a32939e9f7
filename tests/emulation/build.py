"""Compiles the CUDA kernels for the CPU: as a Python module, and as a program that sweeps them under sanitizers."""

import importlib.machinery
import importlib.util
import os
import platform
import subprocess
import sysconfig
from pathlib import Path

import compiled
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CUDA = ROOT / "csrc" / "cuda"
COMMON = ["-std=c++20", "-fno-strict-aliasing", "-DFASTLM_EMULATED", "-x", "c++"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def _build(name, sources, link, cuda=CUDA):
    """The path of {source: flags} compiled and linked; `cuda` is the folder of .cu files: a test can alter a copy."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the CUDA kernels are compiled for the CPU on x86-64, which this is not")
    headers = [*sorted(cuda.glob("*.cuh")), *sorted(HERE.glob("*.h")), *sorted((ROOT / "csrc").glob("*.h"))]
    # The altered copy comes first: csrc/cuda is not on the path.
    include = [f"-I{cuda}", f"-I{HERE}", f"-I{ROOT / 'csrc'}", f"-I{compiled.declared()}"]
    parts = {source: [*COMMON, *flags, *include] for source, flags in sources.items()}
    return compiled.linked(name, link, compiled.objects(parts, headers, [cuda]))


def emulated_module():
    """The Python module whose `cuda` runs the CUDA kernels on CPU tensors."""
    import pybind11

    name = "fastlm_emulated" + importlib.machinery.EXTENSION_SUFFIXES[0]
    flags = ["-O2", "-fPIC", "-fvisibility=hidden"]
    own = ["-DEMU_MODULE=fastlm_emulated", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    sources = {HERE / "module.cpp": flags + own} | {path: flags for path in sorted(CUDA.glob("*.cu"))}
    path = _build(name, sources, ["-shared"])
    spec = importlib.util.spec_from_file_location("fastlm_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sweep(op, cuda=CUDA, *, order=0, whole=False, altered=False):
    """Runs the sanitized sweep of an op, its kernels in folder `cuda`; the finished process.

    Of altered kernels, which are compiled for this once, it is enough to know that something is wrong.
    """
    flags = ["-O0"] if altered else ["-O1", "-g1"]
    sources = {HERE / f"sweep_{op}.cpp": ["-O1", "-g1", *SANITIZE], cuda / f"{op}.cu": [*flags, *SANITIZE]}
    program = _build(f"sweep-{op}", sources, SANITIZE, cuda)
    environment = {**os.environ, "EMU_ORDER": str(order), "ASAN_OPTIONS": "detect_leaks=0"}
    environment |= {"EMU_FIRST": "1"} if altered else {}
    arguments = [str(program), *(["whole"] if whole else [])]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=600)
