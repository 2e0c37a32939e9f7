"""The harness, the comparison of two runs, and `fastlm bench`."""

import dataclasses
import itertools
import json
import statistics
import time

import pytest
import torch
from typer.testing import CliRunner

import fastlm
from fastlm.backends import native
from fastlm.backends.machine import machine_why_not
from fastlm.benchmarks import apart, bench_train, compare, harness, peers, programs
from fastlm.cli import app
from fastlm.dispatch.table import TABLE, forget
from fastlm.measure import roofs as roofs_module
from fastlm.measure.roofs import Roofs

ROOFS = Roofs(copy=20e9, read=25e9, products={"fp32": 100e9, "bf16": 200e9, "fp16": 1e9}, launch=1e-6, taken=0.0)
SMALL = {op: ",".join(f"{letter}={size}" for letter, size in harness.bench_of(op).SMALL.items()) for op in harness.OPS}


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """Roofs without measuring, no compiled peer (compiling takes seconds), one pass, in this process."""
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(roofs_module, "measure", lambda device, **options: ROOFS)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(harness.Case, "passes", 1)
    monkeypatch.setattr(bench_train.Train, "apart", False)
    monkeypatch.setattr(native, "keep_heap", lambda: None)  # it would hold for all tests that follow


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "--device", "cpu", "--seconds", "0.01", *arguments])


def native_here():
    if (reason := machine_why_not("cpu")) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("op", harness.OPS)
def test_every_op_is_measured_beside_its_peers(op, tmp_path):
    done = run(op, "--shape", SMALL[op], "--out", str(tmp_path / "r.json"))
    assert done.exit_code == 0, done.output + str(done.exception)
    rows = harness.read(tmp_path / "r.json")["rows"]
    timed = [row for row in rows if "refused" not in row]
    assert {row["dtype"] for row in timed} == {"fp32", "bf16"} & set(harness.widths_of(op))
    for case in {compare.case_of(row) for row in timed}:
        same = [row for row in timed if compare.case_of(row) == case]
        assert sum(row["chosen"] for row in same) == 1
        assert any(not row["ours"] for row in same) and any(row["contender"] == "fastlm torch" for row in same)
    for row in timed:
        assert row["error"] <= 1 and row["median_us"] > 0 and len(row["samples_us"]) >= 5
        assert row["contender"].removeprefix("fastlm ") in done.output


def test_the_products_alone(tmp_path):
    done = run("products", "--shape", "N=8,C=16,V=33", "--dtype", "fp32", "--out", str(tmp_path / "r.json"))
    assert done.exit_code == 0, done.output + str(done.exception)
    rows = {row["part"]: row for row in harness.read(tmp_path / "r.json")["rows"]}
    assert list(rows) == ["qkv", "attention output", "MLP up", "MLP down", "head"]
    for part, inner, outer in (("qkv", 16, 48), ("MLP down", 64, 16), ("head", 16, 33)):
        flops = rows[part]["tflop_per_s"] * 1e12 * rows[part]["median_us"] * 1e-6
        assert flops == pytest.approx(2 * 8 * inner * outer) and not rows[part]["ours"]


def test_the_suite_covers_every_op():
    assert set(harness.OPS) == {row.family for row in TABLE.values()}


def test_figures_follow_from_bytes_flops_and_roofs():
    case = next(iter(harness.suite(["attention"], shape={"B": 1, "T": 16, "H": 2, "D": 16}, dtypes=["fp32"])))
    assert (case.bytes, case.flops) == (4 * 16 * 2 * 16 * 4, 2 * 2 * 16 * 16 * 16)
    row = harness.measure(case, "cpu", ROOFS, seconds=0.01)[0]
    seconds = row["median_us"] * 1e-6
    assert row["gb_per_s"] == pytest.approx(case.bytes / seconds * 1e-9)
    assert row["of_roof"] == pytest.approx(max(case.bytes / 20e9, case.flops / 100e9) / seconds)


def test_a_wrong_kernel_has_no_speed(monkeypatch, tmp_path):
    native_here()
    right = native.cpu.decode_attention
    monkeypatch.setattr(native.cpu, "decode_attention", lambda *a: right(*a) * 1.01, raising=False)
    forget()
    arguments = ("decode_attention", "--shape", SMALL["decode_attention"], "--dtype", "fp32")
    done = run(*arguments, "--out", str(tmp_path / "r.json"))
    forget()
    assert done.exit_code == 1 and "fastlm cpu is WRONG" in done.output
    row = next(row for row in harness.read(tmp_path / "r.json")["rows"] if row["contender"] == "fastlm cpu")
    assert row["wrong"] and "median_us" not in row


def test_a_slowed_kernel_is_a_regression(monkeypatch, tmp_path):
    native_here()
    arguments = ("decode_attention", "--shape", SMALL["decode_attention"], "--dtype", "fp32")
    assert run(*arguments, "--out", str(tmp_path / "r.json")).exit_code == 0
    right = native.cpu.decode_attention

    def slowed(*a):
        time.sleep(0.02)
        return right(*a)

    monkeypatch.setattr(native.cpu, "decode_attention", slowed, raising=False)
    forget()
    done = run(*arguments, "--compare", str(tmp_path / "r.json"))
    forget()
    assert done.exit_code == 1 and "slower" in done.output


TINY = "L=1,H=2,C=32,V=97"


@pytest.mark.parametrize("program, sizes, parts", [("generate", "B=2,T=6,N=3", ["prefill", "decode"]),
                                                   ("train", "B=2,T=6", ["step"])])
def test_programs_are_measured_beside_transformers(program, sizes, parts, tmp_path):
    pytest.importorskip("transformers")
    done = run(program, "--shape", f"{sizes},{TINY}", "--out", str(tmp_path / "r.json"))
    assert done.exit_code == 0, done.output + str(done.exception)
    rows = [row for row in harness.read(tmp_path / "r.json")["rows"] if "refused" not in row]
    assert {row["part"] for row in rows} == set(parts)
    if program == "generate":
        assert {row["dtype"] for row in rows} == {"fp32", "bf16", "int8", "int4"}
    for part, dtype in itertools.product(parts, ("fp32", "bf16")):
        names = {row["contender"] for row in rows if (row["part"], row["dtype"]) == (part, dtype)}
        assert {"fastlm", "transformers", "transformers, compiled"} <= names
        assert program != "train" or "nanoGPT's architecture, compiled" in names
    for row in rows:
        tokens = 2 if row["part"] == "decode" else 12
        assert row["tokens_per_s"] == pytest.approx(tokens / row["median_us"] * 1e6)
        assert row["chosen"] == row["ours"] and (not row["ours"] or row["error"] <= 1)
    (decoding,) = [row for row in rows if "latency_us" in row and row["dtype"] == "fp32"] or [None]
    assert (decoding is not None) == (program == "generate")


@pytest.mark.parametrize("factor", [1.01, float("nan")])
@pytest.mark.parametrize("program, sizes", [("generate", "B=1,T=6,N=3"), ("train", "B=1,T=6")])
def test_a_program_that_computes_something_else_has_no_speed(program, sizes, factor, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    right = fastlm.GPT2.hidden
    monkeypatch.setattr(fastlm.GPT2, "hidden", lambda self, *a, **k: right(self, *a, **k) * factor)
    done = run(program, "--shape", f"{sizes},{TINY}", "--dtype", "fp32", "--out", str(tmp_path / "r.json"))
    assert done.exit_code == 1 and "fastlm is WRONG" in done.output
    assert not any("median_us" in row for row in harness.read(tmp_path / "r.json")["rows"] if row["ours"])


@pytest.mark.parametrize("dtype, name", [
    ("fp32", "CTranslate2"), ("fp32", "llama.cpp"), ("bf16", "llama.cpp"), ("int8", "CTranslate2"),
    ("int8", "llama.cpp, q8_0"), ("fp16", "llama.cpp"),
])
def test_converted_peers_hold_the_same_model(dtype, name, tmp_path):
    """In fp32 they write our greedy tokens; a narrower one goes astray later, at a near tie."""
    known, missing = peers.peers(dtype, "cpu")
    if name not in known:
        pytest.skip(f"{name}: {missing[name]}")
    ours, theirs = programs.pair({"L": 2, "H": 2, "C": 64, "V": 97}, 20, "cpu")
    std = 0.05 if dtype == "int8" else 0.2  # CTranslate2's int8 products saturate where the CPU has no VNNI
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=std) if parameter.dim() == 2 else None
    theirs.load_state_dict(ours.state_dict())
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    prompts = torch.randint(97, (2, 8), generator=torch.Generator().manual_seed(3))
    wanted = [row.tolist() for row in ours.eval().generate(prompts, max_new_tokens=9, temperature=0, stop_at=None)]
    write = known[name](theirs.eval(), prompts, 9, tmp_path)
    got = write(9)
    assert [len(row) for row in got] == [17, 17] and write(1) == [row[:9] for row in got]
    assert got == wanted if dtype == "fp32" else [row[:9] for row in got] == [row[:9] for row in wanted]
    assert all(torch.equal(value, before[key]) for key, value in theirs.state_dict().items())


def test_peers_that_are_absent_are_told(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    known, missing = peers.peers("bf16", "cpu")
    assert not known and set(missing.values()) == {"not installed: pip install 'fastlm[peers]'"}
    assert peers.peers("bf16", "cuda") == ({}, {})


def test_each_pass_has_a_process_of_its_own(monkeypatch, tmp_path):
    started = []

    class Counted(apart.Apart):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.append(self.process.pid)

    monkeypatch.setattr(harness.Case, "passes", 2)
    monkeypatch.setattr(apart, "Apart", Counted)
    done = run("cache_append", "--shape", SMALL["cache_append"], "--dtype", "fp32", "--out", str(tmp_path / "r.json"))
    assert done.exit_code == 0, done.output + str(done.exception)
    rows = harness.read(tmp_path / "r.json")["rows"]
    assert {"fastlm torch", "plain copy"} <= {row["contender"] for row in rows}
    assert len(set(started)) == 2 and all(row["error"] <= 1 and len(row["samples_us"]) >= 10 for row in rows)


def test_a_process_that_ends_is_told():
    shape = {"N": 8, "V": 100}
    (case, *_) = harness.suite(["softmax_xent"], shape=shape, dtypes=["fp32"])
    with apart.Apart(["softmax_xent"], "cpu", shape, ["fp32"]) as process:
        rows = process.measure(case, ROOFS, seconds=0.01, cold=True)
        assert {row["contender"] for row in rows} >= {"fastlm torch"}
        process.process.kill()
        with pytest.raises(RuntimeError, match=r"softmax_xent .* ended: killed by signal 9"):
            process.measure(case, ROOFS, seconds=0.01, cold=True)


def test_a_training_step_in_a_process_of_its_own():
    shape = {"B": 1, "T": 6, "L": 1, "H": 2, "C": 32, "V": 97}
    with apart.Process("bench_train", "stepping", name="fastlm", shape=shape, dtype="fp32", device="cpu") as process:
        assert process.ask() is None and process.ask(peak=True) >= 0
    with apart.Process("bench_train", "stepping", name="fastlm", shape={**shape, "C": 31}, dtype="fp32",
                       device="cpu") as process, pytest.raises(ValueError, match="n_embd"):
        process.ask()


def two_passes(first, second):
    """The row of two passes with these samples."""
    (row,) = harness.merge(*([
        {"contender": "x", "ours": True, "median_us": statistics.median(samples), "samples_us": samples, "spread": 0.0,
         "noisy": False, "of_roof": 0.5, "gb_per_s": 8.0, "tflop_per_s": 1.0}] for samples in (first, second)))
    return row


def test_the_spread_covers_both_passes():
    row = two_passes([100.0] * 5, [100.0, 100.0, 140.0, 140.0, 140.0])  # the quartiles are 30 apart, the medians 40
    assert row["median_us"] == 100.0 and row["spread"] == pytest.approx(0.4) and row["noisy"]
    row = two_passes([80.0, 90.0, 100.0, 110.0, 120.0], [104.0] * 5)
    assert row["median_us"] == 104.0 and row["spread"] == pytest.approx(4 / 104) and len(row["samples_us"]) == 10
    assert row["gb_per_s"] == pytest.approx(8.0 * 100 / 104)
    calm = two_passes([100.0] * 5, [101.0] * 5)
    assert not calm["noisy"]
    wrong = harness.merge([calm], [{"contender": "x", "ours": True, "wrong": True, "error": 2.0}])
    assert wrong[0]["wrong"] and "median_us" not in wrong[0]


def test_what_does_not_fit_is_left_out_unless_it_was_asked_for():
    cases = harness.suite(["softmax_xent"], shape={"N": 90_000_000}, dtypes=["fp32"])
    small = harness.suite(["softmax_xent"], shape={"N": 2, "V": 7}, dtypes=["fp32"])
    fit, told = harness.fitting(cases + small, "cpu", False)
    assert fit == small and len(told) == len(cases) and "GiB are free" in told[0]
    with pytest.raises(ValueError, match="choose smaller sizes"):
        harness.fitting(cases + small, "cpu", True)


def test_the_weights_that_are_counted():
    model = fastlm.GPT2(fastlm.GPT2Config(vocab_size=97, n_positions=8, n_embd=32, n_layer=3, n_head=2))
    counted = sum(p.numel() for p in model.parameters()) - 8 * 32
    assert programs.weights({"L": 3, "C": 32, "V": 97}) == counted


def row(contender, median, *, ours=True, spread=0.02):
    return {"op": "o", "part": "forward", "dtype": "fp32", "shape": {"N": 3}, "cold": True, "contender": contender,
            "ours": ours, "median_us": median, "spread": spread}


@pytest.mark.parametrize(
    "kernel, peer, spread, verdict",
    [
        (100, 50, 0.02, "same"), (109, 50, 0.02, "same"), (112, 50, 0.02, "slower"), (88, 50, 0.02, "faster"),
        (200, 100, 0.02, "same"),  # the whole machine is slower
        (100, 25, 0.02, "slower"),  # and here it hides that we are
        (130, 50, 0.2, "same"), (150, 50, 0.2, "slower"),  # noise widens what is the same
    ],
)
def test_noise_is_told_from_change(kernel, peer, spread, verdict):
    old = [row("fastlm cpu", 100, spread=spread), row("eager", 50, ours=False)]
    new = [row("fastlm cpu", kernel, spread=spread), row("eager", peer, ours=False)]
    (change,) = compare.changes(old, new)
    assert change.verdict() == verdict
    if verdict == "slower":
        assert change.verdict(bound=1e9) == "same"


def test_runs_without_a_common_case():
    with pytest.raises(ValueError, match="no case of ours in common"):
        compare.changes([row("fastlm cpu", 1)], [row("fastlm triton", 1)])


def test_what_refuses_is_told():
    case = next(iter(harness.suite(["cache_append"], shape={"B": 1, "T": 4, "H": 1, "D": 16}, dtypes=["fp32"])))

    def refuses(*operands):
        raise RuntimeError("no kernel [image]\nand a stack")

    case = dataclasses.replace(case, peers={"odd": refuses}, absent={"gone": "not installed: pip install gone"})
    rows = {row["contender"]: row for row in harness.measure(case, "cpu", ROOFS, seconds=0.01)}
    assert rows["odd"]["refused"] == "no kernel [image]" and rows["gone"]["refused"].startswith("not installed")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["nonsense"], "no op 'nonsense' to measure; there are adamw, attention"),
        (["attention", "--shape", "Q=3"], "attention has no size 'Q'; it has B, T, H, D"),
        (["attention", "--shape", "T=0"], "size T is 0, wanted ≥ 1"),
        (["attention", "--shape", "T3"], "got 'T3', wanted letters and sizes"),
        (["attention", "--dtype", "int4"], "no dtype 'int4', wanted fp32"),
        (["generate", "--dtype", "int3"], "no dtype 'int3', wanted fp32, bf16, fp16, int8, int4"),
        (["generate", "--shape", "N=1"], "N is 1, wanted 2 or more"),
        (["train", "--shape", "H=5"], "C=768 is no multiple of H=5"),
        (["--seconds", "0"], "--seconds is 0"),
        (["softmax_xent", "--shape", "N=90000000"], "GiB are free; choose smaller sizes with --shape"),
        (["--compare", "1234567"], "neither a results file nor a commit"),
    ],
)
def test_bad_input(arguments, told):
    done = run(*arguments)
    assert isinstance(done.exception, ValueError) and told in str(done.exception)


ODD_ROWS = '{"head": {}, "roofs": {}, "rows": [1]}'


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", ODD_ROWS, '{"head": 1, "rows": 1}'])
def test_a_damaged_results_file(text, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="r.json is no results file.*measure again"):
        harness.read(path)
    done = run("--compare", str(path))
    assert isinstance(done.exception, ValueError) and "is no results file" in str(done.exception)


def test_results_name_what_a_reader_must_know(tmp_path):
    harness.write(tmp_path / "deep" / "r.json", harness.head("cpu"), vars(ROOFS), [])
    head = json.loads((tmp_path / "deep" / "r.json").read_text())["head"]
    assert head["torch"] == torch.__version__.split("+")[0] or head["torch"] == torch.__version__
    assert head["threads"] == torch.get_num_threads() and head["device"] and head["date"]
