"""`python -m benchmarks.gpu`, as far as it goes without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from fastlm.benchmarks import gpu

ROOT = Path(__file__).parent.parent


@pytest.fixture
def call(monkeypatch):
    """The command with phases that only print; `call.failing` names those that fail."""
    app, ran = typer.Typer(), []
    app.command()(gpu.main)

    def commands(phase, folder, *, dry):
        ran.append(phase)
        code = f"print('{phase} said'); raise SystemExit({int(phase in call.failing)})"
        return [([sys.executable, "-c", code], None)]

    def call(*arguments):
        ran.clear()
        return CliRunner().invoke(app, [*map(str, arguments)]), list(ran)

    call.failing = set()
    monkeypatch.setattr(gpu, "commands", commands)
    return call


def test_phases_go_on_where_they_ended(call, tmp_path):
    call.failing = {"tests"}
    done, ran = call("--dry", "--results", tmp_path)
    assert done.exit_code == 1 and ran == list(gpu.PHASES) and "tests: FAILED" in done.output
    assert json.loads((tmp_path / "dry-run" / "probe.json").read_text())["summary"] == "probe said"
    call.failing = set()
    (tmp_path / "dry-run" / "probe.json").write_text("{")  # cut off while it was written
    done, ran = call("--dry", "--results", tmp_path)
    assert done.exit_code == 0 and ran == ["probe", "tests"]
    assert call("--dry", "--results", tmp_path, "build")[1] == ["build"]  # named: it runs again
    done, ran = call("--dry", "--results", tmp_path, "nonsense")
    assert done.exit_code == 2 and not ran


def test_a_phase_that_hangs_or_cannot_run():
    hanging = [([sys.executable, "-c", "import time; print('began', flush=True); time.sleep(60)"], None)]
    found = gpu.run("x", hanging, limit=2)
    assert not found["passed"] and found["summary"] == "ran past its limit" and "began" in found["output"]
    found = gpu.run("x", [(["no-such-program"], "it is absent")])
    assert found["passed"] and found["summary"] == "left out: it is absent"
    assert not gpu.run("x", [(["no-such-program"], None)])["passed"]


def test_every_phase_has_commands(tmp_path):
    for dry in (True, False):
        assert all(gpu.commands(phase, tmp_path, dry=dry) for phase in gpu.PHASES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no CUDA GPU" in done.stderr


@pytest.mark.slow
def test_the_dry_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{phase:15} passed" in done.stdout for phase in gpu.PHASES)
