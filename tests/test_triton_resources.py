"""What the Triton kernels use on GPUs that are not here: no spills, shared memory that fits, 64-bit rows, inner loops
that wait for little; and what they are predicted to take.
"""

import json
import math
import os
import subprocess
import sys

import pytest
import resources

from fastlm.benchmarks import machine_code

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("architecture, dtypes", [
    pytest.param(90, ("bf16",)), *(pytest.param(name, ("bf16", "fp16", "fp32"), marks=pytest.mark.slow)
                                   for name in resources.ARCHITECTURES)
])
def test_budgets(architecture, dtypes):
    rows = resources.report_elsewhere([architecture], dtypes)
    assert {row["dtype"] for row in rows} == set(dtypes) and len(rows) >= 25 * len(dtypes)
    optimizer = {"adamw", "grad_norm_partial", "grad_norm_merge"} if "fp32" not in dtypes else set()  # fp32 alone
    assert {row["kernel"].split()[0] for row in rows} == set(resources.LIMITS) - optimizer
    for row in rows:
        assert row["shared"] <= machine_code.SHARED[architecture] * 1024, row
        assert row["narrow_rows"] == 0, row
        products = row["kernel"].startswith(("attention_fwd", "attention_bwd", "decode_attention_split"))
        if products and row["dtype"] == "fp32":  # whole products in fp32 spill, whatever the tile
            continue
        assert row["spills"] == 0, row
        assert row["occupancy"] >= (0.12 if products else 0.25 if row["kernel"].endswith("odd") else 0.5), row
        assert row["wide_loads"] > 0 or any(word in row["kernel"] for word in ("tma", "merge", "odd")), row
        if architecture == 90 and products and "decode" not in row["kernel"]:
            assert row["wgmma"] > 0 and (row["tma"] > 0) == ("tma" in row["kernel"]), row
            # ptxas may make every product wait for the one before, and says so to nobody.
            assert row["wgmma_waits"] < row["wgmma"] / 2, row
        inner_loop_budgets(row, architecture)
    kept = resources.golden(resources.triton_version())
    if kept is not None:  # for this very Triton: another one compiles differently
        told = list(resources.differences(rows, kept))
        assert not told, "\n".join([*told, "as intended? then run: python tests/resources.py --golden"])


STREAMS = "softmax_xent", "bias_gelu_bwd", "column_sums", "grad_norm_partial"  # they walk over rows, or a row


def inner_loop_budgets(row, architecture):
    kernel, odd = row["kernel"], row["kernel"].endswith("odd")
    for loop in row["loops"]:
        assert not loop.get("spill"), row
        if kernel.startswith("attention_bwd") or kernel.startswith("attention_fwd"):
            assert loop["tensor"], row
            if architecture == 90 and "drop" not in kernel:
                assert loop["barrier"] <= 4 and loop["in_flight"] >= 4, row  # a tile ahead
        if not kernel.startswith(STREAMS):
            continue
        assert not loop.get("barrier") and not loop.get("shuffle"), row  # what threads share comes after the loop
        widths = {int(key.removeprefix(kind)) for key in loop for kind in ("load", "store") if key.startswith(kind)}
        assert odd or widths == {16}, row
        if architecture == 90:  # 4.3 TB/s and 0.6 µs of latency are 20 KB a multiprocessor
            assert loop["in_flight"] * max(widths) * row["occupancy"] * 2048 > 20e3, row
        if kernel.startswith("softmax_xent"):  # of an exponential: less the origin, by log2 e, and where it goes
            assert loop["fp32"] <= 3 * loop["exp"], row


def test_a_difference_to_the_golden_rows_is_told():
    row = {"kernel": "k D=64", "dtype": "bf16", "sm": 90, "registers": 40, "spills": 0, "loops": [{"load16": 2}]}
    assert list(resources.differences([row], [row])) == []
    assert list(resources.differences([{**row, "registers": 41}], [row])) == ["k D=64 bf16 90: registers 40 -> 41"]
    changed = {**row, "loops": [{"load16": 1, "load2": 8}, {"barrier": 1}]}
    assert list(resources.differences([changed], [row])) == [
        "k D=64 bf16 90: loop 1 load16 2 -> 1, loop 1 load2 None -> 8, loop 2 barrier None -> 1"]
    assert "not in the golden file" in next(resources.differences([{**row, "sm": 80}], [row]))


def test_a_narrow_row_is_found():
    """The check sees what it looks for: a row's offset multiplied in 32 bits."""
    narrow = """
    %n = tt.get_program_id x : i32
    %row = arith.muli %n, %stride : i32
    %p = tt.addptr %x, %row : !tt.ptr<f32>, i32
    """
    wide = narrow.replace("arith.muli %n, %stride : i32", "arith.muli %m, %stride : i64")
    assert resources.narrow_rows(narrow) == 1 and resources.narrow_rows(wide) == 0


def code(text):
    """Lines as nvdisasm prints them, with an end and the trap behind it."""
    lines = [*text.strip().splitlines(), "EXIT", ".L_end:", "BRA `(.L_end)"]
    return "\n".join(line.strip() if line.strip().startswith(".L") else f"        /*{16 * at:04x}*/    {line.strip()} ;"
                     for at, line in enumerate(lines))


def loop_of(text):
    (loop,) = machine_code.inner_loops(code(text))
    return loop


FOUR_LOADS = """
    MOV R2, R3
    .L_1:
    LDG.E.128 R8, desc[UR4][R2.64]
    LDG.E.128 R12, desc[UR4][R2.64+0x10]
    LDG.E.128 R16, desc[UR4][R2.64+0x20]
    IADD3 R2, P0, R2, 0x40, RZ
    @!P1 LDG.E.128 R20, desc[UR4][R4.64]
    FADD R30, R30, R11
    MUFU.EX2 R31, R20
    @P0 BRA `(.L_1)
"""


def test_loads_in_flight():
    assert loop_of(FOUR_LOADS) == {"instructions": 8, "load16": 4, "alu": 1, "fp32": 1, "exp": 1, "branch": 1,
                                   "in_flight": 4}
    used_early = FOUR_LOADS.replace("IADD3 R2, P0, R2, 0x40, RZ", "IMAD.U32 R2, R13, 0x10000, RZ")
    assert loop_of(used_early)["in_flight"] == 3
    assert loop_of(FOUR_LOADS.replace("@!P1 LDG.E.128 R20, desc[UR4][R4.64]", "LDG.E R20, desc[UR4][R8.64]")) == {
        "instructions": 8, "load16": 3, "load4": 1, "alu": 1, "fp32": 1, "exp": 1, "branch": 1, "in_flight": 3}


def test_loads_for_the_next_round_are_in_flight():
    """Each first use comes before the load, in the text."""
    ahead = """
        .L_1:
        FADD R30, R8, R12
        LDG.E.64 R8, desc[UR4][R2.64]
        LDG.E.64 R12, desc[UR4][R4.64]
        BAR.SYNC.DEFER_BLOCKING 0x0
        STG.E.64 desc[UR4][R6.64], R30
        @P0 BRA `(.L_1)
    """
    assert loop_of(ahead) == {"instructions": 6, "fp32": 1, "load8": 2, "barrier": 1, "store8": 1, "branch": 1,
                              "in_flight": 2}
    assert loop_of(ahead.replace("R30\n", "R8\n"))["in_flight"] == 2  # stored once both are issued
    assert loop_of(ahead.replace("BAR.SYNC.DEFER_BLOCKING 0x0", "@P1 STL [R1], R9"))["spill"] == 1


def test_narrow_loads_and_stores_are_found():
    narrow = FOUR_LOADS.replace("LDG.E.128 R12", "LDG.E.U16 R12").replace("LDG.E.128 R16", "LDG.E R16")
    assert {"load16": 2, "load2": 1, "load4": 1}.items() <= loop_of(narrow).items()


def test_copies_in_flight():
    copies = """
        .L_1:
        DEPBAR.LE SB0, 0x2
        WARPGROUP.ARRIVE
        HGMMA.64x32x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT
        LDGSTS.E.BYPASS.128 [R112], desc[UR54][R22.64], P0
        LDGSTS.E.BYPASS.128 [R112+0x800], desc[UR54][R24.64], P0
        LDGDEPBAR
        @P0 BRA `(.L_1)
    """
    assert loop_of(copies) == {"instructions": 7, "alu": 3, "tensor": 1, "products": 64 * 32 * 16 / 4, "copy16": 2,
                               "branch": 1, "in_flight": 4}
    assert "in_flight" not in loop_of(copies.replace("0x2", "0x0"))  # waits for all that it has asked for


def test_what_is_no_loop_and_which_is_the_main_one():
    forward = FOUR_LOADS.replace("    .L_1:\n", "").replace("@P0 BRA", ".L_1:\nBRA")
    assert loop_of(FOUR_LOADS.replace("@P0 BRA `(.L_1)", "@P0 BRA `(.L_9)\n.L_9:"))["instructions"] == 10  # the whole
    assert loop_of(forward.replace("`(.L_1)", "`(.L_end)"))["in_flight"] == 4
    fills = "\n.L_2:\n" + 8 * "STG.E.128 desc[UR4][R6.64], R40\n" + "@P0 BRA `(.L_2)"
    assert loop_of(FOUR_LOADS + fills) == loop_of(FOUR_LOADS)
    tail = "\n.L_2:\nLDG.E.128 R8, desc[UR4][R2.64]\nFADD R9, R8, R9\n@P0 BRA `(.L_2)"
    assert loop_of(FOUR_LOADS + tail) == loop_of(FOUR_LOADS)
    passes = machine_code.inner_loops(code(FOUR_LOADS + FOUR_LOADS.replace(".L_1", ".L_2")))
    assert passes == 2 * [loop_of(FOUR_LOADS)]
    nested = FOUR_LOADS.replace("@P0 BRA `(.L_1)", "@P1 BRA `(.L_1)\n@P0 BRA `(.L_0)")
    assert loop_of(".L_0:\n" + nested) == loop_of(FOUR_LOADS)
    around = ".L_0:\n" + nested.replace("@P0 BRA `(.L_0)", "HMMA.16816.F32.BF16 R4, R8, R12, R4\n@P0 BRA `(.L_0)")
    assert loop_of(around)["products"] == 16 * 8 * 16  # the loop that multiplies, with the one that copies


MEASURED = {  # µs on an H200, benchmarks/results/gpu-h200-2026-11-27-*.json and kernels/attention.py
    ("attention", "attention_fwd"): 180, ("attention", "attention_bwd_keys"): 285,
    ("attention", "attention_bwd_queries"): 193, ("layer_norm", ""): 117, ("bias_gelu", ""): 248, ("adamw", ""): 822,
}
PREDICT = """
import json
from fastlm.benchmarks import harness, prediction
found = {op: list(prediction.predictions(op, harness.bench_of(op).DECISIVE[0][0], "fp32" if op == "adamw" else "bf16",
                                         prediction.Device())) for op in OPS}
print(json.dumps({"ops": found, "preset": list(prediction.preset("gpt2", prediction.Device()))}))
"""


@pytest.mark.slow
def test_predictions_beside_what_was_measured(tell):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = f"OPS = {sorted({op for op, _ in MEASURED})}{PREDICT}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for (op, kernel), measured in MEASURED.items():
        us = sum(row["us"] for row in found["ops"][op] if kernel in row["kernel"])
        assert 0.75 * measured < us < 1.25 * measured, (op, kernel, us)
        tell(f"{kernel or op}: predicted {us:.0f} µs, measured {measured}")
    rows = {row["what"]: row for row in found["preset"]}
    assert {"attention_bwd_keys", "softmax_xent_both", "adamw"} <= rows.keys()
    assert rows["adamw"]["tiles"] == math.ceil((12 * 12 * 768**2 + (50257 + 1024) * 768) / 1024)


def test_tiles_of_a_causal_square():
    from fastlm.benchmarks import prediction

    assert prediction._tiles(T=128, S=128, offset=0, CAUSAL=True, BLOCK_T=64, BLOCK_S=64) == (1.5, 1)
    assert prediction._tiles(T=128, S=128, offset=0, CAUSAL=True, BLOCK_T=64, BLOCK_S=32, EVEN=True) == (6 / 4, 1)
    assert prediction._tiles(T=64, S=100, offset=36, CAUSAL=False, BLOCK_T=64, BLOCK_S=64) == (2, 100 / 64)


def test_how_a_preset_fills_a_gpu():
    from typer.testing import CliRunner

    from fastlm.cli import app

    done = CliRunner().invoke(app, ["explain", "preset", "gpt2"])
    told = " ".join(done.output.split())
    # 16 · 1024 rows and 3 · 768 columns in tiles of 128 × 256; of bf16 16384 · (768 + 2304) + 768 · 2304 numbers
    assert "product qkv 1,152 tiles 8.73 waves, 3% idle 104.2 MB 2.08 × 1.74 ×" in told, done.output
    assert "product head, a chunk, dw 1,179 tiles 8.93 waves" in told
    assert "kernels are left out: Triton is interpreted here" in told
    wrong = CliRunner().invoke(app, ["explain", "preset", "gpt9"])
    assert "wanted shakespeare-char, gpt2, small" in str(wrong.exception)
