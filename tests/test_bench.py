"""The harness, the comparison of two runs, and `fastlm bench`."""

import dataclasses
import json
import time

import pytest
import torch
from typer.testing import CliRunner

import fastlm
from fastlm import dispatch, native
from fastlm.benchmarks import compare, harness, programs
from fastlm.cli import app
from fastlm.measure import roofs as roofs_module
from fastlm.measure.roofs import Roofs

ROOFS = Roofs(copy=20e9, read=25e9, products={"fp32": 100e9, "bf16": 200e9, "fp16": 1e9}, launch=1e-6, taken=0.0)
SMALL = {"softmax_xent": "N=8,V=100", "attention": "B=1,T=16,H=2,D=16", "decode_attention": "B=2,S=70,H=2,D=16",
         "cache_append": "B=2,T=70,H=2,D=16"}


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """Roofs without measuring, and no compiled peer: compiling takes seconds."""
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(roofs_module, "measure", lambda device, **options: ROOFS)
    monkeypatch.setattr(torch, "compile", lambda function: function)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "--device", "cpu", "--seconds", "0.01", *arguments])


def native_here():
    if (reason := dispatch.machine_why_not("cpu")) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("op", harness.OPS)
def test_every_op_is_measured_beside_its_peers(op, tmp_path):
    done = run(op, "--shape", SMALL[op], "--out", str(tmp_path / "r.json"))
    assert done.exit_code == 0, done.output + str(done.exception)
    rows = harness.read(tmp_path / "r.json")["rows"]
    timed = [row for row in rows if "refused" not in row]
    assert {row["dtype"] for row in timed} == {"fp32", "bf16"}
    for case in {compare.case_of(row) for row in timed}:
        same = [row for row in timed if compare.case_of(row) == case]
        assert sum(row["chosen"] for row in same) == 1
        assert any(not row["ours"] for row in same) and any(row["contender"] == "fastlm torch" for row in same)
    for row in timed:
        assert row["error"] <= 1 and row["median_us"] > 0 and len(row["samples_us"]) >= 5
        assert row["contender"].removeprefix("fastlm ") in done.output


def test_the_suite_covers_every_op():
    assert set(harness.OPS) == {row.family for row in dispatch.TABLE.values()}


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
    dispatch._forget()
    arguments = ("decode_attention", "--shape", SMALL["decode_attention"], "--dtype", "fp32")
    done = run(*arguments, "--out", str(tmp_path / "r.json"))
    dispatch._forget()
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
    dispatch._forget()
    done = run(*arguments, "--compare", str(tmp_path / "r.json"))
    dispatch._forget()
    assert done.exit_code == 1 and "slower" in done.output


TINY = "L=1,H=2,C=32,V=97"


@pytest.mark.parametrize("program, sizes, parts", [("generate", "B=2,T=6,N=3", ["prefill", "decode"]),
                                                   ("train", "B=2,T=6", ["step"])])
def test_programs_are_measured_beside_transformers(program, sizes, parts, tmp_path):
    pytest.importorskip("transformers")
    done = run(program, "--shape", f"{sizes},{TINY}", "--out", str(tmp_path / "r.json"))
    assert done.exit_code == 0, done.output + str(done.exception)
    rows = harness.read(tmp_path / "r.json")["rows"]
    assert len(rows) == 3 * 2 * len(parts) and {row["part"] for row in rows} == set(parts)
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
        (["nonsense"], "no op 'nonsense' to measure; there are softmax_xent"),
        (["attention", "--shape", "Q=3"], "attention has no size 'Q'; it has B, T, H, D"),
        (["attention", "--shape", "T=0"], "size T is 0, wanted ≥ 1"),
        (["attention", "--shape", "T3"], "got 'T3', wanted letters and sizes"),
        (["attention", "--dtype", "int4"], "no dtype 'int4', wanted fp32"),
        (["generate", "--shape", "N=1"], "N is 1, wanted 2 or more"),
        (["train", "--shape", "H=5"], "C=768 is no multiple of H=5"),
        (["--seconds", "0"], "--seconds is 0"),
        (["softmax_xent", "--shape", "N=90000000"], "GiB are free; choose smaller sizes with --shape"),
        (["--compare", "1234567"], "neither a file nor a commit with results"),
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
