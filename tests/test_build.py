"""Installing: CUDA that was asked for is never left out in silence, and no compiler is no obstacle."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
TOOLS = ("python3", "bash", "sh", "env", "uname", "cat", "git")


def build(tmp_path, *, compilers=True, **environment):
    """(finished process, names in the wheel or None) of building a wheel from a copy of the sources."""
    sources = tmp_path / "sources"
    ignore = shutil.ignore_patterns(".git", "build", "__pycache__", "*.so", "runs", "results", ".venv*")
    shutil.copytree(ROOT, sources, ignore=ignore)
    variables = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CUDACXX", "CUDA_HOME")}
    if not compilers:
        tools = tmp_path / "tools"
        tools.mkdir()
        for name in TOOLS:
            if found := shutil.which(name):
                (tools / name).symlink_to(found)
        variables["PATH"] = str(tools)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(tmp_path / "wheel"), str(sources)],
        capture_output=True, text=True, env={**variables, **environment}, timeout=900,
    )
    wheels = list((tmp_path / "wheel").glob("*.whl")) if (tmp_path / "wheel").exists() else []
    return done, set(zipfile.ZipFile(wheels[0]).namelist()) if wheels else None


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


def test_cpu_kernels_alone(tmp_path):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler is here")
    done, names = build(tmp_path, CMAKE_ARGS="-DFASTLM_CUDA=OFF")
    assert done.returncode == 0, done.stderr[-3000:]
    assert sum(name.endswith(".so") for name in names) == 1
