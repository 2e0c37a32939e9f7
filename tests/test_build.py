"""Installing: what is built where; CUDA that was asked for is never left out in silence; no compiler is no obstacle,
and a wheel runs where there is none."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
TOOLS = ("python3", "bash", "sh", "env", "uname", "cat", "git")
ASKED = ("CC", "CXX", "CUDACXX", "CUDA_HOME", "CUDAARCHS", "CMAKE_ARGS", "FASTLM_TARGETS")


def pip(tmp_path, *command, compilers=True, **environment):
    """The finished process of a pip command on a copy of the sources; PATH first is a folder of stand-ins."""
    sources, tools = tmp_path / "sources", tmp_path / "tools"
    ignore = shutil.ignore_patterns(".git", "build", "__pycache__", "*.so", "runs", "results", ".venv*")
    shutil.copytree(ROOT, sources, ignore=ignore)
    tools.mkdir(exist_ok=True)
    variables = {name: value for name, value in os.environ.items() if name not in ASKED}
    if not compilers:
        for name in TOOLS:
            if found := shutil.which(name):
                (tools / name).symlink_to(found)
    variables["PATH"] = os.pathsep.join([str(tools), *([variables["PATH"]] if compilers else [])])
    return subprocess.run([sys.executable, "-m", "pip", *map(str, command), str(sources)], capture_output=True,
                          text=True, env={**variables, **environment}, timeout=900)


def build(tmp_path, **options):
    """(finished process, names in the wheel or None) of building a wheel from a copy of the sources."""
    done = pip(tmp_path, "wheel", "-v", "--no-deps", "-w", tmp_path / "wheel", **options)
    wheels = list((tmp_path / "wheel").glob("*.whl")) if (tmp_path / "wheel").exists() else []
    return done, set(zipfile.ZipFile(wheels[0]).namelist()) if wheels else None


def configured(tmp_path, *command, gpus="", **environment):
    """(CPU instruction sets, CUDA architectures) that pip would build; nothing is compiled. nvidia-smi tells `gpus`."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "nvidia-smi").write_text(f"#!/bin/sh\necho '{gpus}'\n")
    (tmp_path / "tools" / "nvidia-smi").chmod(0o755)
    done = pip(tmp_path, command[0], "-v", "--no-deps", *command[1:], SKBUILD_BUILD_TARGETS="help", **environment)
    assert done.returncode  # what was not built cannot be installed
    told = done.stdout + done.stderr
    found = [re.search(rf"fastlm: {half} kernels for (\S+)", told) for half in ("CPU", "CUDA")]
    assert found[0], told[-3000:]
    return tuple(match and match[1] for match in found)


def wheel(tmp_path):
    return "wheel", "-w", tmp_path / "wheel"


def editable(tmp_path):
    return "install", "--prefix", tmp_path / "prefix", "-e"


def widest():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512bf16" if "avx512_bf16" in flags else "avx512" if "avx512dq" in flags else "avx2"


ALL = "generic;avx2;avx512;avx512bf16", "80-real;90a-real;100-real;120"
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64")
nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here")


@x86
@nvcc
@pytest.mark.parametrize("command, options, cpu, cuda", [
    (wheel, {}, *ALL),
    (editable, {}, None, None),  # no GPU: no CUDA
    (editable, {"gpus": "9.0\n7.5\n12.0\n9.0"}, None, "90a-real;120-real"),  # 7.5 is too old for the kernels
    (editable, {"CMAKE_ARGS": "-DCMAKE_CUDA_ARCHITECTURES=80-real;90a-real"}, None, "80-real;90a-real"),
    (editable, {"FASTLM_TARGETS": "all"}, *ALL),
], ids=lambda value: getattr(value, "__name__", None))
def test_targets(tmp_path, command, options, cpu, cuda):
    assert configured(tmp_path, *command(tmp_path), **options) == (cpu or f"generic;{widest()}", cuda)


@pytest.mark.parametrize("environment, told", [
    ({"FASTLM_TARGETS": "nonsense"}, "fastlm: FASTLM_TARGETS is nonsense, wanted native or all"),
    pytest.param({"CMAKE_ARGS": "-DCMAKE_CUDA_ARCHITECTURES=999-real"},
                 "fastlm: nvcc does not know the architecture 999-real", marks=nvcc),
    pytest.param({"CUDAARCHS": "75"}, "fastlm: CMAKE_CUDA_ARCHITECTURES has 75, but the kernels need 80 or newer",
                 marks=nvcc),
])
def test_targets_that_do_not_exist(tmp_path, environment, told):
    done, names = build(tmp_path, **environment)
    assert done.returncode and names is None
    assert told in " ".join((done.stdout + done.stderr).split())  # CMake breaks lines


@pytest.mark.parametrize("environment", [{"CUDACXX": "/bin/false"}, {"CUDA_HOME": "/nowhere"}], ids=str)
def test_cuda_that_was_asked_for_and_is_broken_is_an_error(tmp_path, environment):
    done, names = build(tmp_path, **environment)
    assert done.returncode and names is None
    assert "fastlm: CUDA was asked for" in done.stdout + done.stderr


def test_without_a_compiler_the_pure_package_installs(tmp_path):
    done, names = build(tmp_path, compilers=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "fastlm: no C++ compiler found" in done.stdout + done.stderr
    assert {"fastlm/__init__.py", "fastlm/kernels/softmax_xent.py"} <= names
    assert not any(name.endswith(".so") for name in names)
    # It runs from where it was unpacked, on PyTorch's kernels, and says what is missing.
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(next((tmp_path / "wheel").glob("*.whl"))).extractall(unpacked)
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
        f"sys.path.insert(0, {str(unpacked)!r})\n"
        "import torch, fastlm\n"
        f"assert fastlm.__file__.startswith({str(unpacked)!r}), fastlm.__file__\n"
        "config = fastlm.GPT2Config(vocab_size=17, n_positions=8, n_embd=16, n_layer=1, n_head=2)\n"
        "model, tokens = fastlm.GPT2(config), torch.zeros(2, 8, dtype=torch.int64)\n"
        "model(tokens, tokens)[1].backward()\n"
        "model.generate([tokens[0, :3]], max_new_tokens=3)\n"
        "try: fastlm.use('cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "the compiled kernels were not built: install a C++ compiler and reinstall fastlm" in ran.stdout


FIRST_STEPS = """
import torch, fastlm._C as _C, fastlm
from fastlm.cli import main
print(fastlm.__file__, _C.cpu.isas(), sep="\\n")
text = "def f(x):\\n    return x + 1\\n" * 300
open("text.py", "w").write(text)
import sys
sys.argv[1:] = ["train", "--data", "text.py", "--out", "run", "--preset", "small", "--set", "steps=3", "--set",
                "eval_every=3", "--set", "save_every=3", "--set", "warmup_steps=1"]
main()
"""


def test_a_wheel_takes_every_instruction_set_and_runs_where_no_compiler_is(tmp_path):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler is here")
    done, names = build(tmp_path, CMAKE_ARGS="-DFASTLM_CUDA=OFF")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fastlm: building for FASTLM_TARGETS=all" in done.stdout + done.stderr
    assert sum(name.endswith(".so") for name in names) == 1
    assert not any("gomp" in name for name in names)  # torch's serves

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    (path,) = (tmp_path / "wheel").glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", path], check=True)
    (packages,) = (environment / "lib").glob("python*/site-packages")
    (packages / "torch.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # this environment's, which come after
    variables = {"PATH": str(environment / "bin"), "HOME": str(tmp_path), "FASTLM_CACHE": str(tmp_path / "cache")}
    ran = subprocess.run([python, "-c", FIRST_STEPS], capture_output=True, text=True, cwd=tmp_path, env=variables,
                         timeout=600)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    file, isas = ran.stdout.splitlines()[:2]
    assert file.startswith(str(packages)) and (tmp_path / "run" / "model.safetensors").exists()
    assert isas == ("generic, avx2, avx512, avx512bf16" if platform.machine() == "x86_64" else "generic")
