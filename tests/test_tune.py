"""Tuned tables: measured, kept, read by dispatch, told by `fastlm explain`."""

import json

import pytest
import torch
from typer.testing import CliRunner

import fastlm
from fastlm import dispatch
from fastlm.benchmarks import harness
from fastlm.cli import app
from fastlm.dispatch.table import forget
from fastlm.measure import cuts, roofs, tuned
from fastlm.measure.roofs import Roofs


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    some = Roofs(copy=20e9, read=25e9, products={"fp32": 100e9, "bf16": 200e9, "fp16": 1e9}, launch=1e-6, taken=0.0)
    monkeypatch.setattr(roofs, "measure", lambda device: some)
    tuned._rows.cache_clear()
    forget()
    yield tmp_path
    tuned._rows.cache_clear()
    forget()


def table(*order, dtype="fp32", op="softmax_xent"):
    return {"op": op, "dtype": dtype, "order": list(order), "us": {name: 10.0 * n for n, name in enumerate(order, 1)}}


def ran(dtype=torch.float32):
    with dispatch.record() as calls:
        fastlm.softmax_xent(torch.randn(3, 7, dtype=dtype), torch.tensor([1, 2, 3]))
    (call,) = calls
    return call[1]


def test_dispatch_takes_the_fastest_that_was_measured():
    usual = ran()
    tuned.save("cpu", {}, [table("reference", "cpu", "torch"), table("torch", "cpu", dtype="bf16")])
    assert ran() == "reference" and ran(torch.bfloat16) == "torch" and ran(torch.float16) == usual
    with fastlm.use("torch"):
        assert ran() == "torch"
    tuned.save("cpu", {}, [table("torch")])
    assert ran() == "torch" and ran(torch.bfloat16) == "torch"  # the other rows stay
    tuned.save("cpu", {}, [table("cuda", "reference")])  # a backend that this machine lacks is passed over
    assert ran() == "reference"


def test_products_are_cut_as_was_measured():
    usual = {"cut_rows": 3, "cut_columns": 512}
    assert tuned.cut("gpt2_blocks", "fp32") == usual
    row = {"op": "gpt2_blocks", "dtype": "fp32", "cut": {"rows": 1, "columns": 256}, "us": {}}
    tuned.save("cpu", {}, [table("torch", op="gpt2_blocks"), row])
    assert tuned.cut("gpt2_blocks", "fp32") == {"cut_rows": 1, "cut_columns": 256}
    assert tuned.order("gpt2_blocks", torch.float32, torch.device("cpu")) == ("torch",)
    with tuned.trying("gpt2_blocks", {"rows": 4, "columns": 1024}):
        assert tuned.cut("gpt2_blocks", "fp32") == {"cut_rows": 4, "cut_columns": 1024}
    tuned.save("cpu", {}, [row | {"cut": {"rows": 0, "columns": 256}}])  # what was never tested is not taken
    with pytest.warns(UserWarning, match="its cut is no candidate"):
        assert tuned.cut("gpt2_blocks", "fp32") == usual


@pytest.mark.parametrize("rows", ['', '[]', '{}', '{"rows": [{"op": "x"}]}', '{"rows": [{"op": "x", "dtype": "i4"}]}'])
def test_a_damaged_table_is_told_and_ignored(rows):
    usual = ran()
    path = tuned.save("cpu", {}, [table("reference")])
    path.write_text(rows)
    tuned._rows.cache_clear()
    forget()
    with pytest.warns(UserWarning, match="is damaged .* run fastlm tune again"):
        assert ran() == usual


def test_the_fastest_by_geometric_mean_of_the_cases():
    def row(contender, part, us):
        row = {"op": "o", "dtype": "fp32", "part": part, "shape": {"N": 3}, "ours": contender.startswith("fastlm"),
               "contender": contender}
        return row | ({"refused": "no"} if us is None else {"median_us": us})

    rows = [row("fastlm a", "f", 10), row("fastlm b", "f", 1), row("fastlm c", "f", 1), row("peer", "f", 0.1),
            row("fastlm a", "g", 10), row("fastlm b", "g", 1000), row("fastlm c", "g", None)]
    (found,) = harness.fastest(rows)
    assert found["order"] == ["a", "b"] and found["us"]["a"] == pytest.approx(10)


def test_tune_measures_a_models_shapes(tmp_path):
    model = fastlm.GPT2(fastlm.GPT2Config(vocab_size=31, n_positions=16, n_embd=24, n_layer=1, n_head=2))
    model.save_pretrained(str(tmp_path / "m"))
    arguments = ["tune", "--model", str(tmp_path / "m"), "--device", "cpu", "--dtype", "fp32", "--seconds", "0.01"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output + str(done.exception)
    (path,) = (tmp_path / "tuned").iterdir()
    found = json.loads(path.read_text())
    orders, cut = ([row for row in found["rows"] if ("cut" in row) == are] for are in (False, True))
    assert {row["op"] for row in orders} == set(harness.OPS)
    assert found["head"]["torch"] and all(row["order"] for row in orders)
    if dispatch.machine_why_not("cpu") is None:
        assert [(row["op"], row["dtype"]) for row in cut] == [("gpt2_step", "fp32"), ("gpt2_blocks", "fp32")]
        assert all(row["cut"] in cuts.every(row["op"]) and len(row["us"]) == len(cuts.every(row["op"])) for row in cut)
    assert {"B": 1, "T": 16, "H": 2, "D": 12} in next(r for r in orders if r["op"] == "attention")["shapes"]
    assert ran() == next(row for row in orders if row["op"] == "softmax_xent")["order"][0]
    for wrong, told in ((["--context", "17"], "n_positions 16"), (["--batch", "-1"], "--batch is -1")):
        done = CliRunner().invoke(app, [*arguments, *wrong])
        assert isinstance(done.exception, ValueError) and told in str(done.exception)


def explained(*arguments):
    done = CliRunner().invoke(app, ["explain", *arguments, "--device", "cpu"], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output + str(done.exception)
    return done.output


def test_explain_names_the_choice_the_reasons_and_the_floor():
    told = explained("softmax_xent", "--shape", "N=4,V=100", "--dtype", "fp32")
    assert f"softmax_xent_fwd runs on {ran()}" in told and "softmax_xent_bwd runs on" in told
    assert "not reference: it stands behind" in told
    # 2 · 4 · 100 · 4 bytes at 20 GB/s
    assert "0.0 MB at 20 GB/s" in told and "at least 0.2 µs, limited by bytes" in told
    attention = explained("attention", "--shape", "B=1,T=512,H=2,D=64", "--dtype", "fp32")
    assert "limited by FLOPs" in attention  # 2 · 2 · 512² · 64 FLOP at 100 GFLOP/s
    assert "at least 671.1 µs" in attention


def test_explain_tells_what_was_tuned_and_what_is_forced():
    tuned.save("cpu", {}, [table("reference", "torch")])
    told = explained("softmax_xent", "--shape", "N=4,V=100", "--dtype", "fp32")
    assert "runs on reference" in told
    assert "not torch: fastlm tune measured 20 µs on this kind of device, reference 10 µs" in told
    with fastlm.use("torch"):
        told = explained("softmax_xent", "--shape", "N=4,V=100", "--dtype", "fp32")
    assert "runs on torch" in told and "not reference: another is forced" in told
