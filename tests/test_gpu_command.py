"""`python -m benchmarks.gpu` without a GPU: what fails, hangs or dies is named, and the rest still runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlm import dispatch
from fastlm.benchmarks.gpu import command as gpu
from fastlm.benchmarks.gpu import place as places
from fastlm.benchmarks.gpu import proofs, steps
from fastlm.dispatch.table import TABLE

ROOT = Path(__file__).parent.parent
GOOD = """print('@row {"what": "x", "us": 1}'); print('@row {"summary": "well"}'); print("a line")"""
PLANTS = {
    "a failed row": """print('@row {"failed": "no kernel image"}')""",
    "an exception": "raise RuntimeError('no kernel image')",
    "a crash": "import os; os.abort()",
    "a hang": "import time; print('began', flush=True); time.sleep(60)",
    "a hang of what it started": "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; "
                                 "time.sleep(60)']); print('began', flush=True)",
    "no JSON": "print('@row {')",
}


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Runs the command with steps that are scripts: (exit code, what it printed, gpu.json, gpu.log)."""
    scripts = dict.fromkeys((step.name for step in gpu.STEPS), GOOD)
    monkeypatch.setattr(gpu.Run, "commands", lambda run, name: [([sys.executable, "-c", scripts[name]], None)])
    monkeypatch.setattr(gpu, "STEPS", tuple(gpu.Step(step.name, 2, 0.2, step.beside) for step in gpu.STEPS))

    def call(*arguments, **planted):
        scripts.update(planted)
        code = gpu.main(["--dry", "--out", str(tmp_path / "out"), *map(str, arguments)])
        return (code, capsys.readouterr().out, json.loads((tmp_path / "out" / "gpu.json").read_text()),
                (tmp_path / "out" / "gpu.log").read_text())

    return call


def verdicts(found):
    return {row["step"]: row["verdict"] for row in found["steps"]}


def test_every_step_runs_and_is_recorded(call):
    code, printed, found, log = call()
    assert code == 0 and set(verdicts(found)) == {step.name for step in gpu.STEPS}
    assert set(verdicts(found).values()) == {"passed"}
    assert {row["step"] for row in found["rows"]} == set(verdicts(found)) and found["rows"][0]["us"] == 1
    assert "well" in printed and "smoke    | a line" in log and found["head"]["dry"]


@pytest.mark.parametrize("step", ["sanitize", "train"])
@pytest.mark.parametrize("plant", PLANTS)
def test_what_goes_wrong_is_named_and_the_rest_still_runs(call, step, plant):
    code, _, found, log = call("--minutes", 2, "smoke", "sanitize", "train", **{step: PLANTS[plant]})
    told = verdicts(found)
    survives = plant == "a hang of what it started"  # it ended itself; what it left behind is ended with it
    assert told.pop(step) == ("passed" if survives else "FAILED") and code == (0 if survives else 1)
    assert set(told.values()) == {"passed"} and len(told) == 4
    assert "began" in log or "hang" not in plant
    if plant == "a hang":
        assert next(row for row in found["steps"] if row["step"] == step)["summary"].startswith("ran past its limit")


def test_fewer_minutes_leave_out_the_later_steps(call):
    code, _, found, _ = call("--minutes", 0.03, train="import time; time.sleep(60)")
    told = verdicts(found)
    assert code == 1 and told["there"] == "passed" and told["rest"] == "left out"
    assert sum(row["seconds"] for row in found["steps"] if row["step"] not in ("warm", "sanitize")) < 5


def test_without_what_is_there_nothing_runs(call):
    code, _, found, _ = call(there="""print('@row {"failed": "no CUDA GPU"}')""")
    assert code == 2 and "smoke" not in verdicts(found)


@pytest.mark.parametrize("arguments, said", [
    (("--minutes", "0"), "--minutes is 0"), (("nonsense",), "no step 'nonsense'"),
    (("--wheels", "/nowhere"), "no folder"),
    (("--out", "/proc/nowhere"), "cannot be written"),
])
def test_wrong_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--dry", *arguments])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and said in told and "Traceback" not in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "there"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no CUDA GPU" in done.stdout


def test_every_step_has_a_command(tmp_path):
    with gpu.Run(tmp_path, seconds=60, dry=True) as run:
        for step in gpu.STEPS:
            assert run.commands(step.name)
            worker = run.commands(step.name)[0][0]
            assert "gpu.steps" not in " ".join(worker) or step.name in steps.STEPS


class Kernels:
    """A backend's functions of softmax_xent that raise, or give NaN."""

    def __init__(self, error=None):
        self.error = error

    def __getattr__(self, name):
        def run(*args):
            if self.error is not None:
                raise self.error
            from fastlm.backends import reference

            found = getattr(reference, name)(*args)
            return tuple(x * float("nan") for x in found) if isinstance(found, tuple) else found * float("nan")

        return run


@pytest.mark.parametrize("error", [RuntimeError("no kernel image"), ValueError("out of resources"), None], ids=str)
def test_the_smoke_test_fails_on_a_broken_kernel(error, capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "_load", lambda row, backend, load=dispatch._load: getattr(
        Kernels(error), row.name) if (row.family, backend) == ("softmax_xent", "torch") else load(row, backend))
    proofs.part(places.Place(dry=True), "softmax_xent")
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line[len(gpu.ROW):]) for line in lines if line.startswith(gpu.ROW)]
    failed = {row["backend"] for row in rows if "failed" in row}
    assert failed == {"torch"}


def test_no_torch_op_is_forgotten_by_the_smoke_test(capsys, monkeypatch):
    """What is called by the parts, on a CPU, covers the table (its interpreted Triton is a matter of minutes)."""
    usual = places.Place.backends
    monkeypatch.setattr(places.Place, "backends", lambda *args: [name for name in usual(*args) if name != "triton"])
    place, called = places.Place(dry=True), set()
    for name in proofs.SMOKE:
        proofs.part(place, name)
    for line in capsys.readouterr().out.splitlines():
        if line.startswith(gpu.ROW):
            called |= {tuple(pair) for pair in json.loads(line[len(gpu.ROW):]).get("called", ())}
    assert called == {(op, name) for op, row in TABLE.items() for name in place.backends(row.family)
                      if name in row.kernels}


@pytest.mark.slow
def test_the_rehearsal(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--minutes", "9", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    told = verdicts(json.loads((tmp_path / "gpu.json").read_text()))
    assert set(told) == {step.name for step in gpu.STEPS}
    assert {name for name, verdict in told.items() if verdict != "passed"} == {"launches", "sanitize"}
