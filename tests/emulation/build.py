"""Compiles the CUDA kernels for the CPU: as a Python module, and as a program that sweeps them under sanitizers.

Builds are kept by the hash of everything that went into them, in the system's temporary directory.
"""

import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COMMON = ["-std=c++20", "-fno-strict-aliasing", "-DFASTLM_EMULATED", "-x", "c++"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def _compile(name, sources, flags, cuda):
    """The path of sources compiled together; `cuda` is the folder of .cu files, so that a test can alter a copy."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the CUDA kernels are compiled for the CPU by g++ on x86-64, which is not here")
    inputs = [*sources, *sorted(cuda.glob("*.cuh")), *sorted(HERE.glob("*.h")), *sorted((ROOT / "csrc").glob("*.h"))]
    content = b"".join(path.read_bytes() for path in inputs) + " ".join(flags).encode()
    target = Path(tempfile.gettempdir()) / "fastlm-emulation" / hashlib.sha256(content).hexdigest()[:24] / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{os.getpid()}-{name}")
        # The altered copy comes first: csrc/cuda is not on the path.
        include = [f"-I{cuda}", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
        subprocess.run(
            [compiler, *COMMON, *flags, *include, *map(str, sources), "-o", str(partial)],
            check=True, capture_output=True, text=True,
        )
        os.replace(partial, target)
    return target


def emulated_module():
    """The Python module whose `cuda` runs the CUDA kernels on CPU tensors."""
    import pybind11

    name = "fastlm_emulated" + importlib.machinery.EXTENSION_SUFFIXES[0]
    flags = [
        "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-DEMU_MODULE=fastlm_emulated",
        f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}",
    ]
    cuda = ROOT / "csrc" / "cuda"
    path = _compile(name, [HERE / "module.cpp", *sorted(cuda.glob("*.cu"))], flags, cuda)
    spec = importlib.util.spec_from_file_location("fastlm_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sweep(op, cuda=ROOT / "csrc" / "cuda", *, order=0, whole=False):
    """Runs the sanitized sweep of an op, its kernels in folder `cuda`; the finished process."""
    program = _compile(f"sweep-{op}", [HERE / f"sweep_{op}.cpp", cuda / f"{op}.cu"], SANITIZE, cuda)
    environment = {**os.environ, "EMU_ORDER": str(order), "ASAN_OPTIONS": "detect_leaks=0"}
    arguments = [str(program), *(["whole"] if whole else [])]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=600)
