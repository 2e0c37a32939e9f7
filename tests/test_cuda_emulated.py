"""The CUDA kernels without a GPU: under sanitizers in several thread orders, mutated, and through nvcc."""

import re
import shutil
import subprocess

import pytest
from emulation.build import ROOT, sweep

CUDA = ROOT / "csrc" / "cuda"
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
ARCHITECTURES = {"80": "sm_80", "90a": "sm_90a", "100": "sm_100", "120": "sm_120"}

OPS = sorted(path.stem for path in CUDA.glob("*.cu"))

# A multiprocessor has 65536: two blocks of 512 threads, two of 128, two of 128, twelve of 128.
REGISTERS = {"softmax_xent": 64, "attention": 255, "decode_attention": 255, "cache_append": 42}

# Barriers, and every comparison that keeps an index inside its array: what stands there, and what it becomes.
BARRIER = r"__syncthreads\(\);", ""
WAIT = r"(?<= )wait_for_copies\(\);", ""
BOUNDS = [
    (r"(?<=[a-z] )< (V|head|vectors|op\.H \* op\.D)(?=;)", r"<= 3 + \1"),
    (r"min\((elements_to_boundary\(x\)), V\)", r"\1"),
    (r"\b(?:y < 0 \|\| y >= (?:op\.)?V|s >= op\.S|t >= op\.T|column >= op\.D|d >= op\.D|position < 0)\b", "false"),
    (r"\b(?:first \+ row < rows|d(?: \+ j)? < (?:op\.)?D)\b", "true"),
    (r"(?<=if \()(?:s < end|t < queries)(?=\))", "true"),
]


def mutants():
    """(name, op, text) of every copy of a kernel file with one barrier, wait or bound taken out."""
    for op in OPS:
        text = (CUDA / f"{op}.cu").read_text()
        for pattern, new in (BARRIER, WAIT, *BOUNDS):
            for match in re.finditer(pattern, text):
                line = text.count("\n", 0, match.start()) + 1
                altered = text[: match.start()] + match.expand(new) + text[match.end() :]
                yield f"{op}.cu:{line} {match.group()!r}", op, altered


MUTANTS = list(mutants())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("op", OPS)
def test_sanitizers(op, order):
    done = sweep(op, order=ORDERS[order])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("op", OPS)
def test_sanitizers_at_whole_sizes(op, order):
    done = sweep(op, order=ORDERS[order], whole=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def caught(tmp_path, op, text):
    """The first thread order in which an altered kernel fails the sweep, or None."""
    copy = tmp_path / "cuda"
    shutil.copytree(CUDA, copy)
    (copy / f"{op}.cu").write_text(text)
    return next((order for order, number in ORDERS.items() if sweep(op, copy, order=number).returncode), None)


def test_a_missing_barrier_is_caught(tmp_path):
    name, op, text = next(mutant for mutant in MUTANTS if "softmax" in mutant[0] and "sync" in mutant[0])
    assert caught(tmp_path, op, text), f"{name} taken out, and no order showed it"


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=[name for name, _, _ in MUTANTS])
def test_every_barrier_and_bound_is_needed(mutant, tmp_path):
    name, op, text = mutant
    assert caught(tmp_path, op, text), f"{name} taken out, and no order showed it"


def test_there_is_something_to_mutate():
    for op in OPS:
        source = (CUDA / f"{op}.cu").read_text()
        mine = [name for name, its, _ in MUTANTS if its == op]
        assert sum("sync" in name for name in mine) == source.count("__syncthreads();")
        assert sum("wait" in name for name in mine) == source.count("wait_for_copies();")
        assert sum("sync" not in name and "wait" not in name for name in mine) >= 2


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
        stacks = [int(number) for number in re.findall(r"(\d+) bytes stack frame", done.stderr)]
        assert len(registers) == len(kernels) > 0 and not any(spills + stacks), done.stderr
        assert max(registers) <= REGISTERS[path.stem], registers
        assert max(shared, default=0) <= 48 * 1024, shared
        with capsys.disabled():
            print(f"\n{path.name} {ARCHITECTURES[architecture]}: {len(kernels)} kernels, registers {registers}, "
                  f"shared {shared} bytes, no spills", end=" ")
