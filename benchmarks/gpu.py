"""One command for a GPU: `python -m benchmarks.gpu` builds, proves and measures, in phases that go on where they ended.

    build           the package, with its CUDA kernels
    probe           fastlm check: every kernel against fp64 on the device
    tests           the whole test suite on the device
    sanitize        compute-sanitizer (memcheck, racecheck, initcheck) over the CUDA kernels
    bench-ops       every op beside its peers, and the matrix products alone
    bench-train     a training step beside transformers
    bench-generate  prefill and decode beside transformers

Each phase is a process of its own with a limit of eight minutes. What it found is written at once, to
benchmarks/results/<device>/<phase>.json; a phase that has passed at this commit is not run again unless it is named.
`--dry` runs the same on the CPU with tiny shapes. Without a GPU the exit code is 2, with a failed phase 1.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from fastlm.measure.files import slug, write_json

from . import harness

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 480  # seconds a phase
PHASES = ("build", "probe", "tests", "sanitize", "bench-ops", "bench-train", "bench-generate")
TINY = {
    "bench-ops": ["decode_attention", "--shape", "B=1,S=70"],
    "bench-train": ["train", "--shape", "B=1,T=8,L=1,H=2,C=32,V=97"],
    "bench-generate": ["generate", "--shape", "B=1,T=8,N=4,L=1,H=2,C=32,V=97"],
}


def main(
    phases: Annotated[list[str] | None, typer.Argument(help="Only these, even if they have passed.")] = None,
    dry: Annotated[bool, typer.Option("--dry", help="On the CPU, with tiny shapes.")] = False,
    results: Annotated[Path, typer.Option(help="The folder of the results.")] = ROOT / "benchmarks" / "results",
):
    """Build, prove and measure fastlm on this machine's GPU."""
    for phase in phases or ():
        if phase not in PHASES:
            raise typer.BadParameter(f"no phase {phase!r}; the phases are {', '.join(PHASES)}")
    device = _device(dry)
    if device is None:
        typer.echo("this machine has no CUDA GPU that torch can use; --dry runs the phases on the CPU", err=True)
        raise typer.Exit(2)
    folder = results / slug(device)
    commit = (harness.commit() or "unknown").rstrip("+")  # results that were just written change the tree
    for phase in phases or PHASES:
        if not phases and (former := _read(folder, phase)) and former["passed"] and former["commit"] == commit:
            typer.echo(f"{phase}: has passed at {commit}")
            continue
        typer.echo(f"{phase}: running, at most {LIMIT} s")
        found = run(phase, commands(phase, folder, dry=dry))
        found |= {"phase": phase, "commit": commit, "device": device, "date": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        write_json(folder / f"{phase}.json", found)
        typer.echo(f"{phase}: {_verdict(found)} in {found['seconds']:.0f} s")
    typer.echo("")
    missing = False
    for phase in PHASES:
        found = _read(folder, phase)
        told = "not run" if found is None else f"{_verdict(found):8} {found['seconds']:5.0f} s   {found['summary']}"
        typer.echo(f"{phase:15} {told}")
        missing |= found is not None and not found["passed"]
    raise typer.Exit(int(missing))


def commands(phase, folder, *, dry):
    """What a phase runs: a list of (command, whether it can run here: None or the sentence why not)."""
    fastlm = [sys.executable, "-m", "fastlm.cli"]
    device = ["--device", "cpu" if dry else "cuda"]
    if phase == "build":
        build = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "-e", str(ROOT)]
        has = "import fastlm._C as c; print('built for', c.cuda.architectures())"
        if dry:
            return [([sys.executable, "-c", "import fastlm; print('fastlm', fastlm.__version__)"], None)]
        return [(build, None), ([sys.executable, "-c", has], None)]
    if phase == "probe":
        return [([*fastlm, "check", *device, *(["--backend", "torch"] if dry else [])], None)]
    if phase == "tests":
        chosen = ["tests/test_measure.py"] if dry else []
        return [([sys.executable, "-m", "pytest", "-q", "-x" if dry else "--maxfail=50", *chosen], None)]
    if phase == "sanitize":
        tool = shutil.which("compute-sanitizer")
        why = "needs a GPU" if dry else None if tool else "compute-sanitizer is not on the PATH (it is part of CUDA)"
        return [([tool or "compute-sanitizer", "--tool", name, "--error-exitcode", "9", *fastlm, "check", *device,
                  "--backend", "cuda"], why) for name in ("memcheck", "racecheck", "initcheck")]
    target = ["--out", str(folder / f"{phase}-rows.json"), *device]
    if dry:
        return [([*fastlm, "bench", *TINY[phase], "--dtype", "fp32", "--seconds", "0.01", *target], None)]
    program = [*harness.OPS, "products"] if phase == "bench-ops" else [phase.removeprefix("bench-")]
    return [([*fastlm, "bench", *program, "--dtype", "bf16", "--seconds", "0.3", "--fresh-roofs", *target], None)]


def run(phase, commands, limit=LIMIT):
    """Runs a phase's commands, at most `limit` seconds in all; a dict of passed, seconds, summary and output."""
    started, output, passed, summary = time.perf_counter(), [], True, ""
    for command, why in commands:
        if why is not None:
            summary = f"left out: {why}"
            continue
        left = limit - (time.perf_counter() - started)
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  errors="replace", timeout=max(left, 1))
            text, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as late:
            text = late.stdout or ""
            text, code = text if isinstance(text, str) else text.decode(errors="replace"), 124
        except OSError as error:
            text, code = str(error), 127
        output.append(f"$ {' '.join(command[1:])}\n{text}")
        lines = [line for line in text.splitlines() if line.strip()]
        summary = "ran past its limit" if code == 124 else lines[-1].strip()[:100] if lines else ""
        if code:
            passed = False
            break
    return {"passed": passed, "seconds": round(time.perf_counter() - started, 1), "summary": summary,
            "output": "\n".join(output)[-20000:]}


def _verdict(found):
    return "passed" if found["passed"] else "FAILED"


def _device(dry):
    import torch

    if dry:
        return "dry-run"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _read(folder, phase):
    try:
        found = json.loads((folder / f"{phase}.json").read_text())
        return found if {"passed", "commit", "seconds", "summary"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):  # never run, or cut off: it runs again
        return None


if __name__ == "__main__":
    typer.run(main)
