"""The CUDA kernels without a GPU: under sanitizers in several thread orders, mutated, and through nvcc."""

import re
import shutil
import subprocess

import pytest
from emulation.build import ROOT, sweep

CUDA = ROOT / "csrc" / "cuda"
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
ARCHITECTURES = {"80": "sm_80", "90a": "sm_90a", "100": "sm_100", "120": "sm_120"}

# A barrier, and every comparison that keeps an index inside its array: where it stands, and what it becomes.
BARRIER = re.compile(r"__syncthreads\(\);")
BOUND = re.compile(
    r"(?<=[a-z] )< (?:V|head|vectors)(?=;)"
    r"|y < 0 \|\| y >= (?:op\.)?V\b"
    r"|min\((elements_to_boundary\(x\)), V\)"
)


def mutants():
    """(name, file, text) of every copy of a kernel file with one barrier or bound taken out."""
    for path in sorted(CUDA.glob("*.cu")):
        text = path.read_text()
        for match in sorted([*BARRIER.finditer(text), *BOUND.finditer(text)], key=lambda found: found.start()):
            old = match.group()
            if old.startswith("<"):
                new = old.replace("<", "<= 3 +")
            elif old.startswith("min"):
                new = match.group(1)
            else:
                new = "" if "sync" in old else "false"
            line = text.count("\n", 0, match.start()) + 1
            yield f"{path.name}:{line} {old!r}", path.name, text[: match.start()] + new + text[match.end() :]


MUTANTS = list(mutants())


@pytest.mark.parametrize("order", ORDERS)
def test_sanitizers(order):
    done = sweep(order=ORDERS[order])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_sanitizers_at_the_whole_vocabulary(order):
    done = sweep(order=ORDERS[order], whole=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def caught(tmp_path, name, text):
    """The first thread order in which an altered kernel fails the sweep, or None."""
    copy = tmp_path / "cuda"
    shutil.copytree(CUDA, copy)
    (copy / name).write_text(text)
    return next((order for order, number in ORDERS.items() if sweep(copy, order=number).returncode), None)


def test_a_missing_barrier_is_caught(tmp_path):
    name, file, text = next(mutant for mutant in MUTANTS if "sync" in mutant[0])
    assert caught(tmp_path, file, text), f"{name} taken out, and no order showed it"


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=[name for name, _, _ in MUTANTS])
def test_every_barrier_and_bound_is_needed(mutant, tmp_path):
    name, file, text = mutant
    assert caught(tmp_path, file, text), f"{name} taken out, and no order showed it"


def test_there_is_something_to_mutate():
    assert sum("sync" in name for name, _, _ in MUTANTS) == sum(
        path.read_text().count("__syncthreads();") for path in CUDA.glob("*.cu*")
    )
    assert len(MUTANTS) >= 10


@pytest.mark.parametrize("architecture", [
    pytest.param(name, marks=[] if name == "90a" else pytest.mark.slow) for name in ARCHITECTURES
])
def test_nvcc_resources(architecture, tmp_path, capsys):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not here to compile the CUDA kernels")
    for path in sorted(CUDA.glob("*.cu")):
        gencode = f"arch=compute_{architecture},code={ARCHITECTURES[architecture]}"
        done = subprocess.run(
            [nvcc, "-std=c++20", "-O3", "-gencode", gencode, "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", "-c", str(path),
             "-o", str(tmp_path / "kernel.o")], capture_output=True, text=True, timeout=300,
        )
        assert done.returncode == 0, done.stderr
        kernels = re.findall(r"for '(\S+)' for", done.stderr.replace("\n", " ")) or re.findall(
            r"Compiling entry function '(\S+)'", done.stderr
        )
        spills = [int(number) for number in re.findall(r"(\d+) bytes spill", done.stderr)]
        registers = [int(number) for number in re.findall(r"Used (\d+) registers", done.stderr)]
        shared = [int(number) for number in re.findall(r"(\d+) bytes smem", done.stderr)]
        assert len(registers) == len(kernels) > 0 and not any(spills), done.stderr
        assert max(registers) <= 64, registers  # 65536 / (2 blocks of 512 threads)
        assert max(shared, default=0) <= 1024, shared
        with capsys.disabled():
            print(f"\n{path.name} {ARCHITECTURES[architecture]}: {len(kernels)} kernels, registers {registers}, "
                  f"shared {shared} bytes, no spills", end=" ")
