"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set, torch loaded."""

import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import compiled
import pytest
from compiled import ROOT

from fastlm.ops import FAMILIES

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
ISAS = compiled.table().ladder(platform.machine())  # {instruction set: flags}
TESTS = (*FAMILIES, "engine")
OVERREAD = """
import sanitized, sys, torch
from fastlm.backends import native
x, y, out = torch.randn(3, 64), torch.zeros(3, dtype=torch.int64), torch.empty(2, 3)
native.cpu._run("softmax_xent_fwd", x.device, loss=out[0], lse=out[1], x=x, y=y, N=3, V=int(sys.argv[1]), ignore=-100,
                dtype=x.dtype)
print("survived")
"""


@pytest.fixture(scope="module")
def library():
    """A function: the path of fastlm._C with sanitizers, for an instruction set."""
    import pybind11

    include = [f"-I{path}" for path in (ROOT / "csrc", compiled.declared(), pybind11.get_include(),
                                       sysconfig.get_path("include"))]
    common = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fopenmp", "-fno-math-errno", *SANITIZE, *include]
    chosen = [ROOT / "csrc" / "bindings.cpp", ROOT / "csrc" / "cpu" / "isa.cpp"]
    kernels = [path for path in sorted((ROOT / "csrc" / "cpu").rglob("*.cpp")) if path not in chosen]
    headers = sorted((ROOT / "csrc").rglob("*.h"))

    def of(isa):
        isas = dict.fromkeys(("generic", isa))
        have = "-DFASTLM_BUILT=" + " ".join(f"X({name})" for name in isas)
        parts = compiled.objects(dict.fromkeys(chosen, [*common, have]), headers)
        for name in isas:
            flags = [*common, f"-DFASTLM_ISA={name}", *ISAS[name]]
            parts += compiled.objects(dict.fromkeys(kernels, flags), headers)
        return compiled.linked("_C.so", ["-shared", "-fopenmp", *SANITIZE], parts)

    return of


@pytest.fixture(scope="module")
def environment():
    """The environment in which the sanitizers' libraries come before torch's, and several threads run."""
    preloaded = [
        subprocess.run([compiled.compiler(), f"-print-file-name={name}"], check=True, capture_output=True,
                       text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    return {**inherited, "LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(HERE)}


def run(environment, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900
    )


def test_an_overread_is_found(library, environment):
    environment = {**environment, "FASTLM_SANITIZED": str(library("generic")), "FASTLM_CPU_ISA": "generic"}
    assert "survived" in run(environment, "-c", OVERREAD, "64").stdout
    done = run(environment, "-c", OVERREAD, "65")
    assert "heap-buffer-overflow" in done.stderr and "survived" not in done.stdout


@pytest.mark.parametrize("isa", ISAS)
def test_cpu_kernels(library, environment, isa):
    asked = {**os.environ, "FASTLM_CPU_ISA": isa}
    if "which this CPU does not have" in run(asked, "-c", "import fastlm._C as _C; _C.cpu.isa()").stderr:
        pytest.skip(f"this CPU has no {isa}")
    tests = [str(HERE / f"test_{name}.py") for name in TESTS]
    pass_with(library, environment, isa, "-k", "cpu or engine and not lower", *tests)


def test_changed_models(library, environment):
    """200 of them, on the widest instruction set."""
    widest = pytest.importorskip("fastlm._C").cpu.widest_isa()
    first = "test_changed_models.py::test_many_changed_models[0]"
    pass_with(library, environment, widest, "-m", "slow", str(HERE / first))


def pass_with(library, environment, isa, *arguments):
    """Runs tests on kernels with sanitizers, and holds them to pass."""
    options = "-q", "-x", "-p", "sanitized", "-p", "no:cacheprovider"
    environment = {**environment, "FASTLM_SANITIZED": str(library(isa)), "FASTLM_CPU_ISA": isa}
    done = run(environment, "-m", "pytest", *options, *arguments)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-6000:]
