"""`fastlm doctor`: an answer in every cell, what was built, and the line that mends what is amiss."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import fastlm
from fastlm.backends import machine
from fastlm.cli import app
from fastlm.cli import doctor as doctor_module
from fastlm.cli.doctor import examine
from fastlm.dispatch.table import TABLE
from fastlm.measure import roofs

SOME = roofs.Roofs(copy=20e9, read=25e9, products={"fp32": 1e11}, launch=1e-6, taken=0.0)
ROOT = Path(__file__).parent.parent
compiled = pytest.mark.skipif(machine.machine_why_not("cpu") is not None, reason="the compiled kernels were not built")


def run(*command, **environment):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "TRITON_INTERPRET": "0", **environment})


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """No roofs are known, measuring them takes no time, and no op is examined."""
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path))
    monkeypatch.setattr(roofs, "measure", lambda device: SOME)
    monkeypatch.setattr(doctor_module, "_samples", lambda device: {})


def test_every_cell_has_an_answer(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path))
    found = examine()
    for families in found["devices"].values():
        assert set(families) == {row.family for row in TABLE.values()}
        for row in families.values():
            assert row["backends"][row["chosen"]] == "runs"
            assert all(cell == "runs" or len(cell.split()) >= 4 for cell in row["backends"].values()), row


def test_roofs_are_measured_on_demand_alone(quick, monkeypatch):
    assert examine()["roofs"]["cpu"] is None
    assert "not measured yet: fastlm doctor --roofs, 20 s at most" in CliRunner().invoke(app, ["doctor"]).output
    assert examine(measure=True)["roofs"]["cpu"]["read"] == 25e9
    monkeypatch.setattr(roofs, "measure", None)
    assert examine()["roofs"]["cpu"]["read"] == 25e9  # known by now
    assert "read 25 GB/s" in CliRunner().invoke(app, ["doctor"]).output


# ---- what was built, and the line that mends


@pytest.mark.parametrize("architectures, capability, runs", [
    ("80-real, 90a-real, 100-real, 120", (8, 0), True),
    ("80-real, 90a-real, 100-real, 120", (8, 9), True),  # a later minor
    ("80-real, 90a-real, 100-real, 120", (9, 0), True),
    ("80-real, 90a-real, 100-real, 120", (10, 3), True),
    ("80-real, 90a-real, 100-real, 120", (11, 0), False),  # older than the PTX
    ("80-real, 90a-real, 100-real, 120", (12, 1), True),
    ("80-real, 90a-real, 100-real, 120", (13, 0), True),  # by the PTX
    ("80-real, 90a-real, 100-real, 120-real", (13, 0), False),
    ("86-real", (8, 0), False),
    ("86-real", (8, 6), True),
    ("90a-real", (9, 0), True),
    ("90a", (10, 0), False),  # PTX for itself alone
    ("100f-real", (10, 3), True),
    ("100f", (12, 0), False),
    ("80-virtual", (9, 0), True),
])
def test_code_for_a_gpu(architectures, capability, runs):
    told = machine._no_code(architectures, capability)
    assert (told is None) == runs
    if not runs:
        assert f"built for {architectures}, and this GPU is sm_{capability[0]}{capability[1]}" in told
        assert "FASTLM_TARGETS=all pip install -e ." in told


def test_a_gpu_that_is_too_old_has_no_line_that_mends():
    told = machine._no_code("80-real, 120", (7, 5))
    assert told == "the CUDA kernels need a GPU of sm_80 or newer, and this is sm_75"


def test_cuda_kernels_need_a_gpu_then_a_build_then_code_for_it(quick, monkeypatch):
    parts = {"cpu": SimpleNamespace(isas=lambda: "generic", isa=lambda: "generic", widest_isa=lambda: "generic")}
    monkeypatch.setattr(machine, "_native", lambda: None)
    monkeypatch.setitem(machine.BACKENDS, "cpu", (("cpu",), lambda: None))
    monkeypatch.setattr(fastlm, "_C", SimpleNamespace(**parts), raising=False)
    monkeypatch.setattr(machine, "_no_gpu", lambda: "no GPU")
    assert machine.machine_why_not("cuda") == "no GPU"
    monkeypatch.setattr(machine, "_no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    why = machine.machine_why_not("cuda")
    assert "was built without CUDA" in why and machine.ALL in why and why in doctor_module._mend()
    monkeypatch.setattr(fastlm, "_C", SimpleNamespace(**parts, cuda=SimpleNamespace(architectures=lambda: "80-real")))
    why = machine.machine_why_not("cuda")
    assert "built for 80-real, and this GPU is sm_90" in why and why in doctor_module._mend()
    monkeypatch.setattr(fastlm, "_C", SimpleNamespace(**parts, cuda=SimpleNamespace(architectures=lambda: "90a-real")))
    assert machine.machine_why_not("cuda") is None and doctor_module._mend() == []
    assert doctor_module._built() == {"cpu": "built for generic; runs on generic", "cuda": "built for 90a-real"}


@compiled
def test_a_cpu_with_more_than_was_built(quick, monkeypatch):
    assert doctor_module._mend() == []
    monkeypatch.setattr(fastlm._C.cpu, "isas", lambda: "generic")
    monkeypatch.setattr(fastlm._C.cpu, "widest_isa", lambda: "avx2")
    told = "this CPU has avx2, and the CPU kernels were built for generic: FASTLM_TARGETS=all pip install -e ."
    assert told in CliRunner().invoke(app, ["doctor"]).output


@compiled
def test_an_instruction_set_asked_for_in_vain(tmp_path):
    """No cell fails, for no kernel did; the setting is wrong: exit code 2."""
    done = run("-c", "from fastlm.cli import main; main()", "doctor", FASTLM_CPU_ISA="mmx", FASTLM_CACHE=str(tmp_path))
    assert done.returncode == 2 and "runs, chosen" not in done.stdout and "FAILED" not in done.stdout
    assert "to mend: FASTLM_CPU_ISA is 'mmx', wanted avx512bf16, avx512, avx2 or generic" in done.stdout
    assert "none runs" in done.stdout


# ---- torch


@pytest.mark.parametrize("version, tested", [
    ("2.9.1", False), ("2.10.0", True), ("2.13.0+cpu", True), ("2.15.1", True), ("2.16.0a0", False), ("3.0", False),
])
def test_releases_of_torch(version, tested, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    told = machine.untested_torch()
    assert (told is None) == tested
    if not tested:
        assert told.startswith(f"fastlm is tested with torch 2.10 to 2.15, and this is {version}: pip install 'torch>=")
        assert told in doctor_module._mend()


def test_releases_are_those_of_pyproject():
    told = (ROOT / "pyproject.toml").read_text()
    (low, lowest), (high, highest) = machine.TESTED
    assert f'"torch>={low}.{lowest},<{high}.{highest + 1}"' in told


def test_an_untested_torch_warns_once():
    code = ("import torch; torch.__version__ = '9.0'; import fastlm; fastlm.use, fastlm.GPT2\n"
            "import fastlm.backends.machine")
    done = run("-c", code)
    assert done.returncode == 0 and done.stderr.count("and this is 9.0") == 1


# ---- OpenMP


@compiled
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("modules", ["torch, fastlm._C", "fastlm._C, torch", "fastlm.backends.native"])
def test_one_openmp_runtime_is_mapped(modules):
    """Two would keep two teams of threads, which get in each other's way."""
    done = run("-c", f"import {modules}\nimport torch; torch.ones(9).sum()\n"
                     "paths = {line.split()[-1] for line in open('/proc/self/maps') if '/' in line}\n"
                     "print(*sorted(path for path in paths if path.rpartition('/')[2].startswith("
                     "('libgomp', 'libomp', 'libiomp'))))")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1, done.stdout
