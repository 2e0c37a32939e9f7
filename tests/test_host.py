"""The host never waits for a GPU within a step: proved on fake tensors, without one."""

import json
import subprocess
import sys
from pathlib import Path

import compiled
import pytest
import torch
from conftest import GPU

HERE, TORCH = Path(__file__).parent, Path(torch.__file__).parent
if GPU or torch.version.cuda is not None:
    pytest.skip("needs a torch without CUDA, whose missing guard is stood in for", allow_module_level=True)


@pytest.fixture(scope="module")
def found():
    source = HERE / "fake_gpu_guard.cpp"
    command = [compiled.compiler(), "-std=c++20", "-shared", "-fPIC", f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}",
               source, "-lc10"]
    library = compiled.kept(f"guard-{torch.__version__}.so", command, [source])
    done = subprocess.run([sys.executable, HERE / "fake_gpu.py", library], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("part", ["plain loss", "plain logits", "dropout loss", "dropout logits", "update", "prompt",
                                  "decode"])
def test_nothing_is_waited_for(found, part, dtype):
    assert found[f"{part} {dtype}"] == []


@pytest.mark.parametrize("part", ["a number that is read", "a copy to the host", "a copy to the device"])
def test_what_waits_is_found(found, part):
    assert found[f"{part} fp32"] and found[f"{part} bf16"]
