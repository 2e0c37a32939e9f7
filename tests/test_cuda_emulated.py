"""The CUDA kernels without a GPU: under sanitizers in several thread orders, mutated, and through nvcc."""

import re
import shutil

import pytest
import resources
from emulation.build import ROOT, sweep

CUDA = ROOT / "csrc" / "cuda"
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
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
    return next((order for order, number in ORDERS.items() if sweep(op, copy, order=number, altered=True).returncode),
                None)


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


@pytest.mark.slow
@pytest.mark.parametrize("sm", resources.ARCHITECTURES)
def test_nvcc_resources(sm):
    if (compiler := resources.nvcc_version()) is None:
        pytest.skip("nvcc is not here to compile the CUDA kernels")
    rows = list(resources.nvcc_rows(sm))
    assert {row["kernel"].split(".cu")[0] for row in rows} == set(OPS)
    for row in rows:
        assert 0 < row["registers"] <= REGISTERS[row["kernel"].split(".cu")[0]] and not row["spills"], row
        assert row["shared"] <= 48 * 1024 and not row["stack"], row
        if row["kernel"].startswith("softmax_xent") and sm == 90:  # four vectors on the way, and no thread waits
            assert row["loops"][0]["load16"] == 4 and not any(loop.get("barrier") for loop in row["loops"]), row
        if row["kernel"].startswith("decode_attention.cu decode_attention_split") and "true>" in row["kernel"]:
            assert row["loops"][0]["in_flight"] >= (8 if sm == 90 else 4), row  # four keys and their values
    if (kept := resources.golden(compiler)) is not None:
        told = list(resources.differences(rows, kept))
        assert not told, "\n".join([*told, "as intended? then run: python tests/resources.py --golden"])
