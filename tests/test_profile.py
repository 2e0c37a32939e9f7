"""`fastlm profile`: the ranges, the trace, the tables, and what an op's shapes say of its work."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

import fastlm
from fastlm.benchmarks import profile_run
from fastlm.benchmarks.profile_trace import ENGINE, PYTHON, load, tables, work
from fastlm.cli.profile import profile
from fastlm.measure import roofs
from fastlm.measure.roofs import Roofs

TINY = {"L": 1, "H": 2, "C": 32, "V": 97, "B": 1, "T": 8}
PRODUCTS = {"fp32": 100e9, "bf16": 200e9, "fp16": 1e9}
SOME = Roofs(copy=20e9, read=25e9, products=PRODUCTS, launch=1e-6, taken=0.0)
BLOCK = {"h.0", "h.0.ln_1", "h.0.attn", "h.0.ln_2", "h.0.mlp", "embedding", "ln_f", "step"}
RANGES = {
    "train": BLOCK | {"loss", "backward", "optimizer"},
    "generate": BLOCK | {"lm_head", "prefill", "decode", "draw"},
}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(roofs, "measure", lambda device: SOME)


def sizes(program):
    return {**TINY, "N": 3} if program == "generate" else TINY


def command(*arguments):
    app = typer.Typer()
    app.command()(profile)
    return CliRunner().invoke(app, [*arguments, "--device", "cpu"], env={"COLUMNS": "300"})


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("program", ["train", "generate"])
def test_a_profile_has_the_ranges_and_accounts_for_the_whole_time(program, dtype, tmp_path):
    out = tmp_path / ("trace.json.gz" if dtype == "bf16" else "trace.json")
    found = profile_run.run(profile_run.plan(program, shape=sizes(program), dtype=dtype, steps=2, out=out))
    trace = load(out)
    assert trace == found.trace and list(tmp_path.glob(".*")) == []
    names = [e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
    assert RANGES[program] <= set(names) and names.count("step") == 2  # the warm-up has none
    rows, parts = tables(trace, 2, context=9, parameters=found.parameters)
    assert sum(row.share for row in rows) == pytest.approx(1)
    whole = sum(row.seconds for row in rows)
    steps = sum(e["dur"] for e in trace["traceEvents"] if e.get("name") == "step" and e["ph"] == "X")
    assert whole == pytest.approx(steps * 1e-6 / 2, rel=1e-3)  # of a step
    assert sum(times.total() for times in parts.values()) == pytest.approx(whole)
    assert {"attn", "mlp", "ln", "embedding", "residual"} <= parts.keys()
    if program == "train":
        assert {"loss", "optimizer", "gradients"} <= parts.keys()
        for part in ("attn", "mlp", "ln", "embedding", "loss"):  # backward finds its way to the parts
            assert parts[part].keys() == {"forward", "backward"}
        assert parts["optimizer"].keys() == {"optimizer"}
    else:
        assert {"prefill", "decode"} <= parts["attn"].keys() and "backward" not in parts["attn"]


def test_products_are_counted_as_the_profiler_counts_them(tmp_path):
    found = profile_run.run(profile_run.plan("train", shape=TINY, steps=1, out=tmp_path / "t.json"))
    rows, _ = tables(found.trace, 1, least=0)
    products = {row.name: row for row in rows if row.name.startswith(("mm", "addmm"))}
    B, T, C, V = (TINY[letter] for letter in "BTCV")
    one = products[f"addmm {B * T}×{C} · {C}×{3 * C}"]
    assert one.calls == 1 and one.flops == 2 * B * T * C * 3 * C
    assert (one.read, one.written) == (4 * (3 * C + B * T * C + 3 * C * C), 4 * B * T * 3 * C)
    # forward and twice as much backward: 12 C² weights of the block and the head
    assert sum(row.flops for row in products.values()) == 3 * 2 * B * T * (12 * C * C + C * V)
    tflops, gb, of_roof = one.figures(SOME)
    assert tflops == pytest.approx(one.flops / one.seconds * 1e-12) and gb > 0
    assert of_roof == pytest.approx(max(one.flops / 100e9, (one.read + one.written) / 20e9) / one.seconds)


F, I, S = "float", "long int", "Scalar"


@pytest.mark.parametrize("name, dims, kinds, wanted", [
    ("aten::bmm", [[5, 2, 3], [5, 3, 4]], [F, F], (240, 4 * 90, 4 * 40)),
    ("aten::mv", [[3, 4], [4]], ["c10::BFloat16"] * 2, (24, 32, 6)),
    ("aten::gelu", [[2, 8], []], [F, ""], (0, 64, 64)),
    ("aten::add", [[2, 8], [8], []], [F, F, S], (0, 96, 64)),
    ("aten::mul_", [[2, 8], []], [F, F], (0, 68, 64)),
    ("aten::copy_", [[4, 4], [4, 4], []], ["c10::BFloat16", F, S], (0, 64, 32)),
    ("aten::index_select", [[97, 32], [], [8]], [F, S, I], (0, 8 * 32 * 4 + 64, 8 * 32 * 4)),
    ("aten::_fused_adamw_", [[]], ["TensorList"], (0, 16 * 1000, 12 * 1000)),
    ("fastlm::softmax_xent_fwd", [[8, 97], [8], []], [F, I, S], (0, 8 * 97 * 4 + 64, 64)),
    ("fastlm::attention_qkv_fwd", [[2, 8, 3, 4, 16]], [F], (2 * 2 * 4 * 64 * 16, 4 * 3072, 4 * 1024)),
    ("fastlm::attention_qkv_bwd", [[2, 8, 4, 16], [2, 8, 3, 4, 16], [2, 8, 4, 16], [2, 4, 8]], [F] * 4,
     (5 * 2 * 4 * 64 * 16, 4 * (1024 + 3072 + 1024 + 64), 4 * 3072)),
    ("fastlm::decode_attention", [[3, 1, 2, 16], [9, 64, 2, 16]], [F, F],
     (4 * 3 * 2 * 100 * 16, 4 * (2 * 3 * 100 * 2 * 16 + 96), 4 * 96)),
    ("aten::unheard_of", [[2, 8]], [F], (0, 0, 0)),
])
def test_the_work_of_an_op_follows_from_its_inputs(name, dims, kinds, wanted):
    assert work(name, {"Input Dims": dims, "Input type": kinds}, context=100, parameters=1000) == wanted


def test_a_gpu_is_timed_by_the_kernels_and_its_backward_thread_finds_the_parts():
    def event(cat, name, tid, ts, dur, number, **args):
        return {"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": ts, "dur": dur,
                "args": {"External id": number, **args}}

    product = {"Input Dims": [[2, 4], [4, 8]], "Input type": ["float", "float"]}
    trace = {"traceEvents": [
        event("user_annotation", "step", 1, 0, 100, 1), event("user_annotation", "h.0.mlp", 1, 1, 20, 2),
        event("cpu_op", "aten::mm", 1, 2, 5, 3, **{"Sequence number": 7}, **product),
        event("user_annotation", "backward", 1, 30, 60, 4),
        event("cpu_op", f"{ENGINE}: MmBackward0", 2, 40, 20, 5, **{"Sequence number": 7}),
        event("cpu_op", "aten::mm", 2, 42, 5, 6, **product),
        event("kernel", "sgemm", 0, 10, 30, 3), event("kernel", "sgemm", 0, 50, 60, 6),
        event("gpu_user_annotation", "step", 0, 10, 100, 1), event("gpu_memset", "Memset", 0, 120, 10, 99),
    ]}
    rows, parts = tables(trace, 1, least=0)
    assert [(row.name, row.calls, round(row.seconds * 1e6)) for row in rows] == [
        ("mm 2×4 · 4×8", 2, 90), ("no op", 1, 10)]
    assert rows[0].flops == 2 * 128 and rows[0].kernels["sgemm"] == 90
    assert {part: {phase: round(s * 1e6) for phase, s in times.items()} for part, times in parts.items()} == {
        "mlp": {"forward": 30, "backward": 60}, "other": {"forward": 10}}


def test_small_rows_are_one(tmp_path):
    found = profile_run.run(profile_run.plan("train", shape=TINY, steps=1, out=tmp_path / "t.json"))
    every, few = tables(found.trace, 1, least=0)[0], tables(found.trace, 1, least=0.05)[0]
    assert few[-1].name.startswith("other, ") and all(row.share >= 0.05 for row in few[:-1])
    assert sum(row.seconds for row in few) == pytest.approx(sum(row.seconds for row in every))
    assert PYTHON in {row.name for row in every}


def test_hooks_are_gone_afterwards_even_when_the_step_raises(monkeypatch, tmp_path):
    made, make = [], profile_run.model_of
    monkeypatch.setattr(profile_run, "model_of", lambda plan: made.append(make(plan)) or made[-1])
    plan = profile_run.plan("train", shape=TINY, steps=1, out=tmp_path / "t.json")
    profile_run.run(plan)
    assert hooks(made[0]) == 0 and (tmp_path / "t.json").is_file()
    calls = []

    def failing(x, bias):
        calls.append(hooks(made[-1]))
        if len(calls) > 1:  # beyond the warm-up, within h.0.mlp
            raise RuntimeError("boom")
        return x.tanh()

    (tmp_path / "t.json").unlink()
    monkeypatch.setattr("fastlm.activations.bias_gelu", failing)
    with fastlm.use(attention="reference"), pytest.raises(RuntimeError, match="boom"):  # the parts, not whole blocks
        profile_run.run(plan)
    assert calls[0] == 0 < calls[1] and hooks(made[1]) == 0
    assert list(tmp_path.iterdir()) == []  # no trace, nor half of one


def test_ranges_nest_and_reach_nvtx(monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: told.append(name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append("pop"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_start", lambda name: told.append(f"start {name}") or 5)
    monkeypatch.setattr(torch.cuda.nvtx, "range_end", lambda number: told.append(f"end {number}"))
    ranges = profile_run.Ranges(nvtx=True)
    with pytest.raises(KeyError), ranges("step"):
        with ranges("backward"):
            pass
        ranges._push("left open")
        raise KeyError
    assert told == ["step", "start backward", "end 5", "left open", "pop", "pop"]


def test_a_failed_export_leaves_nothing(tmp_path):
    class Profiler:
        def export_chrome_trace(self, path):
            with open(path, "w") as file:
                file.write('{"traceEvents": [')

    with pytest.raises(ValueError):
        profile_run._export(Profiler(), tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", ["train", "generate"])
def test_the_command_shows_tables_trace_and_ncu(program, tmp_path):
    shape = ",".join(f"{letter}={size}" for letter, size in sizes(program).items())
    done = command(program, "--shape", shape, "--steps", "1", "--out", str(tmp_path / "t.json"))
    assert done.exit_code == 0, done.output + str(done.exception)
    json.loads((tmp_path / "t.json").read_text())
    for told in ("Python, between the ops", "GFLOP/s", "roof", "part, ms", "attn", "ui.perfetto.dev",
                 str(tmp_path), "the profiler's overhead", "ncu --set full --nvtx", "needs a CUDA GPU",
                 "--ranges-only"):
        assert told in done.output, told


def test_ranges_alone_write_no_trace_and_a_model_gives_its_sizes(monkeypatch, tmp_path):
    config = fastlm.GPT2Config(vocab_size=31, n_positions=16, n_embd=24, n_layer=1, n_head=2)
    fastlm.GPT2(config).save_pretrained(str(tmp_path / "m"))
    monkeypatch.chdir(tmp_path)
    for arguments in (["train", "--shape", "B=1,T=8"], ["generate", "--shape", "B=1,T=8,N=3"]):
        done = command(*arguments, "--model", "m", "--steps", "1", "--ranges-only")
        assert done.exit_code == 0, done.output + str(done.exception)
        assert "L=1 H=2 C=24 V=31" in done.output and "tokens/s" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    for arguments, told in ((["train", "--shape", "T=17"], "17 tokens a sequence, but m has n_positions=16"),
                            (["generate", "--shape", "T=12,N=5"], "17 tokens"),
                            (["train", "--shape", "C=8"], "--shape gives C, but --model says that")):
        done = command(*arguments, "--model", "m")
        assert isinstance(done.exception, ValueError) and told in str(done.exception)


@pytest.mark.parametrize("arguments, told", [
    (["softmax_xent"], "no program 'softmax_xent' to profile, wanted train or generate"),
    (["train", "--steps", "0"], "--steps is 0, wanted 1 or more"),
    (["train", "--dtype", "fp16"], "--dtype is 'fp16', wanted fp32 or bf16"),
    (["train", "--out", "nowhere/t.json"], "there is no folder nowhere"),
    (["train", "--out", "t.txt"], "ends with .json or .json.gz"),
    (["train", "--shape", "N=8"], "train has no size 'N'; it has B, T"),
    (["train", "--shape", "B=0"], "size B is 0, wanted ≥ 1"),
    (["train", "--shape", "b=1"], "--shape: got 'b=1'"),
    (["generate", "--shape", "H=5"], "C=768 is no multiple of H=5"),
    (["generate", "--shape", "N=1"], "N is 1, wanted 2 or more"),
    (["generate", "--shape", "B=9999999"], "GiB are free"),
    (["train", "--model", "nowhere"], "--model is nowhere, wanted a directory"),
])
def test_bad_input_is_told_before_anything_heavy(arguments, told, monkeypatch):
    monkeypatch.setattr(profile_run, "run", None)
    monkeypatch.setattr(roofs, "measure", None)
    done = command(*arguments)
    assert isinstance(done.exception, ValueError) and told in str(done.exception), done.exception
