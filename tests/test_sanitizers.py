"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set, torch loaded."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_build import ROOT, build

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
TESTS = ("attention", "decode_attention", "cache_append", "softmax_xent", "bias_gelu", "layer_norm",
         "linear_xent", "gpt2_blocks", "adamw", "grad_norm", "engine")
OVERREAD = """
import sanitized, sys, torch, fastlm.native
x, y, out = torch.randn(3, 64), torch.zeros(3, dtype=torch.int64), torch.empty(2, 3)
fastlm.native._C.cpu.softmax_xent_fwd(
    threads=1, dtype=0, loss=out[0].data_ptr(), lse=out[1].data_ptr(), x=x.data_ptr(), stride_xn=64,
    y=y.data_ptr(), N=3, V=int(sys.argv[1]), ignore=-100,
)
print("survived")
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment in which fastlm._C is a sanitized one and the sanitizers' libraries come before torch's."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not here to build the CPU kernels with sanitizers")
    folder = tmp_path_factory.mktemp("sanitized")
    done, names = build(folder, CMAKE_ARGS="-DFASTLM_CUDA=OFF", CXX="g++", CXXFLAGS=FLAGS)
    assert done.returncode == 0, done.stderr[-3000:]
    library = next(name for name in names if name.endswith(".so"))
    zipfile.ZipFile(next((folder / "wheel").glob("*.whl"))).extract(library, folder)
    preloaded = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return {
        **os.environ, "LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0",
        "FASTLM_SANITIZED": str(folder / library), "PYTHONPATH": str(HERE),
    }


def run(environment, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900
    )


def test_an_overread_is_found(environment):
    assert "survived" in run(environment, "-c", OVERREAD, "64").stdout
    done = run(environment, "-c", OVERREAD, "65")
    assert "heap-buffer-overflow" in done.stderr and "survived" not in done.stdout


@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "generic"])
def test_cpu_kernels(environment, isa):
    tests = [str(HERE / f"test_{name}.py") for name in TESTS]
    options = ("-q", "-x", "-p", "sanitized", "-p", "no:cacheprovider", "-k", "cpu or engine and not lower")
    done = run({**environment, "FASTLM_CPU_ISA": isa}, "-m", "pytest", *options, *tests)
    if "which this CPU does not have" in done.stdout + done.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-6000:]
