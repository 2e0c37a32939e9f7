"""Only dispatch refuses: kernels planted that raise or lie, and what every command makes of them."""

import contextlib
import importlib.util
import json
import sys

import pytest
import torch
from typer.testing import CliRunner

import fastlm
from fastlm import cli, dispatch
from fastlm.backends import machine, native, reference, vendor
from fastlm.benchmarks import apart, bench_train, cuts, harness
from fastlm.cli import app
from fastlm.cli import doctor as doctor_module
from fastlm.dispatch.refusal import failure
from fastlm.dispatch.table import TABLE, forget
from fastlm.measure import certificate, tuned
from fastlm.measure import roofs as roofs_module
from fastlm.measure.certificate import Line, certify, unmeasured
from fastlm.measure.roofs import Roofs

ROOFS = Roofs(copy=20e9, read=25e9, products={"fp32": 100e9, "bf16": 200e9, "fp16": 1e9}, launch=1e-6, taken=0.0)


class CompilationError(Exception):
    """Triton's: no RuntimeError, and its first line is a place."""


class OutOfResources(Exception):
    """Triton's."""


ERRORS = {
    "RuntimeError": (RuntimeError("no kernel image\nand a stack"), "no kernel image"),
    "CompilationError": (CompilationError("at 5:4:\n    x = y\n        ^\nnothing named y"),
                         "CompilationError: at 5:4: nothing named y"),
    "OutOfResources": (OutOfResources("out of resource: shared memory"),
                       "OutOfResources: out of resource: shared memory"),
    "CUDA error": (torch.AcceleratorError("CUDA error: an illegal memory access\nCompile with"),
                   "AcceleratorError: CUDA error: an illegal memory access"),
    "ValueError": (ValueError("softmax_xent: stride_xn is 3"), "ValueError: softmax_xent: stride_xn is 3"),
}
PLANTS = [*ERRORS, "NaN"]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """No roofs are measured, nothing is compiled, no process is started, and what was tuned before is forgotten."""
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(roofs_module, "measure", lambda device, **options: ROOFS)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(harness.Case, "passes", 1)
    monkeypatch.setattr(bench_train.Train, "apart", False)
    monkeypatch.setattr(native, "keep_heap", lambda: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # calls this small only wait for one another
    _forget()
    yield
    torch.set_num_threads(threads)
    _forget()


def _forget():
    """What is remembered of the machine, the tuned tables and the choices."""
    tuned._name.cache_clear()
    tuned._rows.cache_clear()
    forget()


@pytest.fixture
def plant(monkeypatch):
    """plant(kind, torch op, module): the function of a backend raises, or all that it returns is NaN."""

    def put(kind, name, module=vendor):
        right = getattr(module, name)

        def planted(*arguments):
            if kind in ERRORS:
                raise ERRORS[kind][0]
            got = right(*arguments)
            return got * float("nan") if isinstance(got, torch.Tensor) else tuple(x * float("nan") for x in got)

        monkeypatch.setattr(module, name, planted)
        forget()
        return ERRORS[kind][1] if kind in ERRORS else "NaN"

    return put


@pytest.fixture
def half(monkeypatch):
    """A backend that has the forward of attention alone."""
    monkeypatch.setitem(machine.BACKENDS, "half", (("cpu",), lambda: None))
    monkeypatch.setitem(TABLE["attention_qkv_fwd"].kernels, "half", "fastlm.backends.reference")
    forget()
    return "half"


@contextlib.contextmanager
def refusing(family, *exempt):
    """Dispatch refuses the family's ops on every backend but those."""
    rows = [row for row in TABLE.values() if row.family == family]
    limits = [row.limits for row in rows]
    for row in rows:
        object.__setattr__(row, "limits", lambda backend, *_: None if backend in exempt else f"{backend} will not")
    forget()
    try:
        yield
    finally:
        for row, former in zip(rows, limits):
            object.__setattr__(row, "limits", former)
        forget()


@pytest.fixture
def few(monkeypatch):
    """Few ops are checked, tuned and examined, the model's stay, transformers is left out."""
    some = ("bias_gelu", "attention", "grad_norm")
    samples = doctor_module._samples
    monkeypatch.setattr(certificate, "CASES", {name: certificate.CASES[name] for name in some})
    monkeypatch.setattr(certificate, "_transformers_lines", lambda *_: ())
    monkeypatch.setattr(doctor_module, "_samples", lambda device: {name: samples(device)[name] for name in some})
    monkeypatch.setattr(harness, "OPS", ("bias_gelu", "grad_norm"))


def strict(text):
    """JSON as other parsers read it, which know no NaN."""
    return json.loads(text, parse_constant=pytest.fail)


def main(monkeypatch, capsys, *arguments):
    """(exit code, output) of the whole command line."""
    monkeypatch.setattr(sys, "argv", ["fastlm", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code or 0, capsys.readouterr().out


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "300"})


# ---- dispatch


def test_what_dispatch_refuses_is_a_class_of_its_own():
    x = torch.randn(3)
    with refusing("grad_norm"), pytest.raises(fastlm.Refused, match="no backend can run grad_norm: .*torch will not"):
        fastlm.grad_norm(x)
    with refusing("grad_norm", "reference"), fastlm.use(grad_norm="torch"):
        with pytest.raises(fastlm.Refused, match="grad_norm cannot run on backend 'torch': torch will not"):
            fastlm.grad_norm(x)
    assert issubclass(fastlm.Refused, RuntimeError)


def test_a_refusal_comes_out_of_the_backward_as_it_is(monkeypatch):
    row, x = TABLE["bias_gelu_bwd"], torch.randn(2, 3, requires_grad=True)
    y = fastlm.bias_gelu(x, torch.zeros(3)).sum()
    limits = row.limits
    try:
        object.__setattr__(row, "limits", lambda *_: "never")
        with pytest.raises(fastlm.Refused, match="no backend can run bias_gelu_bwd"):
            y.backward()
    finally:
        object.__setattr__(row, "limits", limits)


def test_a_machine_that_lacks_a_backend_refuses(monkeypatch, capsys):
    monkeypatch.setitem(machine.BACKENDS, "half", (("cpu",), lambda: "half of it is missing"))
    with pytest.raises(fastlm.Refused, match="use: backend 'half' cannot run here: half of it is missing"):
        fastlm.use("half")
    monkeypatch.setattr(sys, "argv", ["fastlm", "check", "--backend", "half"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2 and "fastlm: use: backend 'half' cannot run here" in capsys.readouterr().err


def test_a_first_call_under_capture_is_no_refusal(monkeypatch):
    forget()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="first called under CUDA graph capture") as error:
        fastlm.grad_norm(torch.ones(3))
    assert not isinstance(error.value, fastlm.Refused)


@pytest.mark.parametrize("kind", ERRORS)
def test_the_first_line_of_a_failure(kind):
    error, told = ERRORS[kind]
    assert failure(error) == told


@pytest.mark.parametrize("error, told", [
    (RuntimeError(), "RuntimeError"), (AssertionError("\n"), "AssertionError"), (RuntimeError("x" * 999), "x" * 200)])
def test_a_failure_that_says_little_or_much(error, told):
    assert failure(error) == told


def test_a_part_of_an_op_is_forced_by_itself(half):
    qkv = torch.randn(1, 4, 3, 2, 8, requires_grad=True)
    with fastlm.use(attention="half", attention_qkv_bwd="reference"), dispatch.record() as calls:
        fastlm.attention_qkv(qkv).sum().backward()
    assert dict(calls) == {("attention_qkv_fwd", "half"): 1, ("attention_qkv_bwd", "reference"): 1}
    with pytest.raises(ValueError, match="attention_qkv_bwd has no half kernel; it has triton, cpu, torch"):
        fastlm.use(attention_qkv_bwd="half")


# ---- check


@pytest.mark.parametrize("kind", PLANTS)
def test_check_fails_and_the_others_are_checked(kind, plant, few, monkeypatch, capsys):
    told = plant(kind, "bias_gelu_bwd")
    code, out = main(monkeypatch, capsys, "check", "--backend", "torch", "--json")
    found = strict(out)
    lines = {(line["path"], line["what"], line["dtype"]): line for line in found["lines"]}
    assert code == 1 and not found["passed"] and lines["op", "grad_norm norm", "fp32"]["holds"]
    if kind == "NaN":
        assert lines["op", "bias_gelu y", "fp32"]["holds"]
        bad = lines["op", "bias_gelu dx", "fp32"], lines["model", "gradients", "fp32"]
    else:
        bad = lines["op", "bias_gelu", "fp32"], lines["model", "all", "bf16"]
        assert all(line["outcome"] == "failed" and line["note"] == f"failed: {told}" for line in bad)
    assert all(line["ratio"] is None and not line["holds"] for line in bad)


def test_the_table_names_what_failed(plant, few, monkeypatch, capsys):
    told = plant("CompilationError", "bias_gelu_bwd")
    code, out = main(monkeypatch, capsys, "check", "--backend", "torch")
    assert code == 1 and "FAIL" in out and "grad_norm norm" in out and "5 failed" in out
    assert f"bias_gelu on torch in fp32, bf16, fp16: failed: {told}" in out
    assert f"model: all on torch in fp32, bf16: failed: {told}" in out


def test_check_tells_a_refusal_and_passes(few, monkeypatch, capsys):
    with refusing("grad_norm", "reference"):
        code, out = main(monkeypatch, capsys, "check", "--backend", "torch")
    assert code == 0 and "PASS" in out and "3 refused" in out
    assert "grad_norm on torch in fp32, bf16, fp16: refused: grad_norm cannot run on backend 'torch'" in out


def test_check_names_what_ran_each_part(half, few, monkeypatch, capsys):
    code, out = main(monkeypatch, capsys, "check", "--backend", half, "--json")
    lines = {(line["path"], line["what"], line["dtype"]): line for line in strict(out)["lines"]}
    forward, backward = (lines["op", f"attention {what}", "fp32"] for what in ("o", "dqkv"))
    assert code == 0 and forward["by"] == "half" and forward["ran"] == {"attention_qkv_fwd": "half"}
    other = backward["ran"]["attention_qkv_bwd"]
    assert other != half and backward["by"] == f"half+{other}" and backward["backend"] == half
    logits = lines["model", "logits", "fp32"]
    assert logits["ran"]["attention_qkv_fwd"] == half and logits["by"].startswith("half+")
    assert lines["model", "gradients", "fp32"]["ran"]["attention_qkv_bwd"] == other
    assert "attention_qkv_bwd" not in lines["model", "loss", "fp32"]["ran"]
    assert "decode_attention" in lines["model", "decoded logits", "fp32"]["ran"]
    code, out = main(monkeypatch, capsys, "check", "--backend", half)
    assert code == 0 and f"half+{other}: attention_qkv_bwd on {other}" in out


@pytest.mark.parametrize("devices, kernels, told", [
    (("cpu",), {}, "what it was asked for ran on"),
    (("meta",), {"grad_norm": "fastlm.backends.reference"},
     "grad_norm in fp32 refused: grad_norm cannot run on backend 'idle'"),
])
def test_check_of_a_backend_that_measures_nothing(devices, kernels, told, few, monkeypatch, capsys):
    monkeypatch.setitem(machine.BACKENDS, "idle", (devices, lambda: None))
    for name, home in kernels.items():
        monkeypatch.setitem(TABLE[name].kernels, "idle", home)
    code, out = main(monkeypatch, capsys, "check", "--backend", "idle", "--backend", "torch")
    assert code == 1 and f"idle measured nothing: {told}" in out and "FAIL" in out
    code, out = main(monkeypatch, capsys, "check", "--backend", "idle", "--json")
    assert code == 1 and set(strict(out)["unmeasured"]) >= {"idle"}


def test_sentences_of_what_was_not_measured():
    line = Line("op", "x y", "torch", "fp32", 0.5, ran={"x_fwd": "torch"})
    assert unmeasured([line], ["torch"]) == {}
    assert unmeasured([line], ["cuda"]) == {"cuda": "cuda measured nothing: no op has it"}
    failed = Line("op", "x", "cuda", "fp32", float("inf"), "failed: no kernel image", "failed", {"x_fwd": "cuda"})
    assert unmeasured([failed], ["cuda"]) == {"cuda": "cuda measured nothing: x in fp32 failed: no kernel image"}


def test_check_goes_on_where_the_truth_cannot_be_computed(plant, few, monkeypatch, capsys):
    told = plant("OutOfResources", "grad_norm", reference)
    code, out = main(monkeypatch, capsys, "check", "--backend", "torch")
    assert code == 1 and f"grad_norm on reference in fp32, bf16, fp16: failed: {told}" in out and "model: loss" in out


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_may_refuse_with_anything(plant, monkeypatch):
    def refuse(*_, **options):
        raise CompilationError("at 1:1:\nno")

    monkeypatch.setattr(certificate, "CASES", {})
    monkeypatch.setattr(certificate, "_model_lines", lambda *_: ())
    monkeypatch.setattr(certificate, "transformers_twin", refuse)
    found = [line for line in certify(backends=["torch"]) if line.path == "transformers"]
    assert [(line.outcome, line.holds, line.note) for line in found] == [
        ("refused", True, "refused: CompilationError: at 1:1: no")]


# ---- bench and tune


def measured(op, tmp_path, *arguments):
    done = run("bench", op, "--device", "cpu", "--dtype", "fp32", "--seconds", "0.01", "--out", tmp_path / "r.json",
               *arguments)
    return done, {(row["part"], row["contender"]): row for row in harness.read(tmp_path / "r.json")["rows"]}


@pytest.mark.parametrize("kind", PLANTS)
def test_bench_fails_and_the_others_are_measured(kind, plant, tmp_path):
    told = plant(kind, "grad_norm")
    done, rows = measured("grad_norm", tmp_path, "--shape", "N=1000")
    (bad,) = [row for row in rows.values() if row["contender"] == "fastlm torch"]
    assert done.exit_code == 1 and "median_us" not in bad and any("median_us" in row for row in rows.values())
    if kind == "NaN":
        assert bad["wrong"] and "fastlm torch is WRONG" in done.output
    else:
        assert bad["failed"] == told and "refused" not in bad and f"fastlm torch FAILED: {told}" in done.output
    assert not any("failed" in row for row in rows.values() if not row["ours"])


def test_what_fails_at_the_whole_size_alone_leaves_the_race(plant, monkeypatch, tmp_path):
    right = vendor.grad_norm

    def large(g):
        if len(g) > 500:
            raise OutOfResources("too large")
        return right(g)

    suite = harness.suite
    monkeypatch.setattr(vendor, "grad_norm", large)
    monkeypatch.setattr(harness, "suite", lambda *a, **k: [
        harness.dataclasses.replace(case, check=lambda: [torch.randn(100)], peak=True) for case in suite(*a, **k)])
    done, rows = measured("grad_norm", tmp_path, "--shape", "N=1000")
    (bad,) = [row for row in rows.values() if row["contender"] == "fastlm torch"]
    assert done.exit_code == 1 and bad["failed"] == "OutOfResources: too large" and bad["error"] <= 1
    assert any("median_us" in row for row in rows.values())


def test_peers_refuse_with_anything_and_ours_where_dispatch_does():
    case = next(iter(harness.suite(["grad_norm"], shape={"N": 100}, dtypes=["fp32"])))

    def odd(*operands):
        raise OutOfResources("a peer's")

    case = harness.dataclasses.replace(case, peers={"odd": odd})
    with refusing("grad_norm", "reference", "cpu"):
        rows = {row["contender"]: row for row in harness.measure(case, "cpu", ROOFS, seconds=0.01)}
    assert rows["odd"]["refused"] == "a peer's" and "torch will not" in rows["fastlm torch"]["refused"]
    assert not any("failed" in row for row in rows.values())


def test_bench_tells_what_ran_each_part(half, tmp_path):
    done, rows = measured("attention", tmp_path, "--shape", "B=1,T=8,H=2,D=16")
    mixed = next(row for row in rows.values() if row["contender"] == "fastlm half" and "ran" in row)
    other = mixed["ran"]["attention_qkv_bwd"]
    assert done.exit_code == 0 and f"fastlm half+{other}" in done.output and "median_us" in mixed
    assert all("ran" not in row for row in rows.values() if row["contender"] == "fastlm torch")


@pytest.mark.parametrize("ran, title", [
    ({}, "fastlm cuda"), ({"a_fwd": "cuda", "a_bwd": "torch"}, "fastlm cuda+torch"),
    ({"a_": "torch"}, "fastlm torch, for cuda")])
def test_titles(ran, title):
    assert harness.title({"contender": "fastlm cuda"} | ({"ran": ran} if ran else {})) == title


def test_bench_where_every_backend_refuses(tmp_path):
    with refusing("grad_norm", "reference"):
        done, _ = measured("grad_norm", tmp_path, "--shape", "N=100")
    assert done.exit_code == 1 and "fp32 N=100: nothing of ours was measured: fastlm " in done.output


@pytest.mark.parametrize("kind", ["RuntimeError", "CompilationError"])
@pytest.mark.parametrize("program, sizes, name", [
    ("train", "B=1,T=6", "adamw_"), ("generate", "B=1,T=6,N=3", "decode_attention")])
def test_a_program_that_fails_is_named_and_its_peers_are_measured(program, sizes, name, kind, plant, tmp_path):
    pytest.importorskip("transformers")
    told = plant(kind, name)
    with fastlm.use("torch"):
        done, rows = measured(program, tmp_path, "--shape", f"{sizes},L=1,H=2,C=32,V=97")
    ours = [row for row in rows.values() if row["ours"]]
    assert done.exit_code == 1 and f"fastlm FAILED: {told}" in done.output
    assert ours and all(row["failed"] == told and "median_us" not in row for row in ours)
    assert any("median_us" in row for row in rows.values() if row["contender"] == "transformers")


def test_a_case_whose_truth_fails_is_a_failure_of_the_case_alone(plant, tmp_path):
    told = plant("CUDA error", "grad_norm", reference)
    done = run("bench", "grad_norm", "adamw", "--device", "cpu", "--seconds", "0.01", "--out", tmp_path / "r.json",
               "--shape", "N=100")
    rows = harness.read(tmp_path / "r.json")["rows"]
    assert done.exit_code == 1 and told in done.output
    assert [row["failed"] for row in rows if row["op"] == "grad_norm"] == [told]
    assert any("median_us" in row for row in rows if row["op"] == "adamw")


def test_a_process_that_dies_is_a_failure_of_its_case(monkeypatch, tmp_path):
    class Dying(apart.Apart):
        def ask(self, **message):
            if message["case"].startswith("adamw") and not hasattr(self, "died"):
                self.died = True
                self.process.kill()
                self.process.wait()
            return super().ask(**message)

    monkeypatch.setattr(harness.Case, "passes", 2)
    monkeypatch.setattr(apart, "Apart", Dying)
    done = run("bench", "adamw", "grad_norm", "--device", "cpu", "--seconds", "0.01", "--shape", "N=100",
               "--out", tmp_path / "r.json")
    rows = harness.read(tmp_path / "r.json")["rows"]
    assert done.exit_code == 1 and "ended: killed by signal 9" in done.output
    assert {row["op"] for row in rows if "failed" in row} == {"adamw"}
    assert any("median_us" in row for row in rows if row["op"] == "grad_norm" and row["ours"])


def test_what_another_process_raises_keeps_its_kind(monkeypatch):
    for raised, told in ((fastlm.Refused("x"), {"refused": "x"}), (ValueError("x"), {"invalid": "x"}),
                         (CompilationError("x"), {"failed": "CompilationError: x"})):
        def function(raised=raised):
            raise raised

        assert apart._answer(function) == told
    with apart.Process("harness", "head", device="nowhere") as process, pytest.raises(RuntimeError) as error:
        process.ask()
    assert "nowhere" in str(error.value) and not isinstance(error.value, fastlm.Refused)
    if not torch.cuda.is_available():
        monkeypatch.setenv("FASTLM_BACKEND", "cuda")
        shape = {"B": 1, "T": 6, "L": 1, "H": 2, "C": 32, "V": 97}
        with apart.Process("bench_train", "stepping", name="fastlm", shape=shape, dtype="fp32",
                           device="cpu") as process, pytest.raises(fastlm.Refused, match="cannot run here"):
            process.ask()


def test_passes_of_which_one_failed():
    good = {"part": "f", "contender": "fastlm cpu", "ours": True, "median_us": 1.0, "samples_us": [1.0], "spread": 0.0,
            "noisy": False, "of_roof": 0.5, "gb_per_s": 8.0, "tflop_per_s": 1.0}
    bad = {"part": "f", "contender": "fastlm cpu", "ours": True, "failed": "no kernel image"}
    whole = {"part": "f", "contender": "fastlm", "ours": True, "failed": "the process ended"}
    for passes in (([good], [bad]), ([bad], [good])):
        (row,) = harness.merge(*passes)
        assert row["failed"] == "no kernel image" and not set(harness.FIGURES) & set(row)
    assert harness.merge([whole], [good]) == [whole, good] and harness.merge([good], [whole]) == [good, whole]


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    """Tunes a small model: (exit code, output, the rows of the table that was written)."""
    config = fastlm.GPT2Config(vocab_size=31, n_positions=16, n_embd=24, n_layer=1, n_head=2)
    fastlm.GPT2(config).save_pretrained(str(tmp_path / "m"))

    monkeypatch.setattr(cuts, "cases", lambda config, dtypes: to_cut)

    def tune():
        done = run("tune", "--model", tmp_path / "m", "--device", "cpu", "--dtype", "fp32", "--seconds", "0.01")
        paths = list((tmp_path / "cache" / "tuned").glob("*.json"))
        rows = json.loads(paths[0].read_text())["rows"] if paths else []
        return done.exit_code, done.output, {row["op"]: row.get("order") for row in rows}

    to_cut = tune.to_cut = []
    return tune


@pytest.mark.parametrize("kind", PLANTS)
def test_tune_leaves_out_what_fails_and_says_so(kind, plant, few, tuning):
    told = plant(kind, "bias_gelu_bwd")
    code, out, orders = tuning()
    assert code == 1 and "torch" in orders["grad_norm"] and "torch" not in orders.get("bias_gelu", ())
    assert ("fastlm torch is WRONG" if kind == "NaN" else f"fastlm torch FAILED: {told}") in out


def test_tune_where_every_backend_refuses(few, tuning):
    with refusing("grad_norm", "reference"):
        code, out, orders = tuning()
    assert code == 1 and "nothing of ours was measured" in out and set(orders) == {"bias_gelu"}
    with refusing("grad_norm", "reference"), refusing("bias_gelu", "reference"):
        code, out, _ = tuning()
    assert code == 1 and "nothing was measured, and no table written" in out


def test_tune_where_a_way_to_cut_products_fails(few, tuning, monkeypatch):
    def fail(config, op, dtype, **_):
        raise RuntimeError(f"no {dtype}")

    monkeypatch.setattr(cuts, "measure", fail)
    tuning.to_cut += [("gpt2_step", "fp32")]
    code, out, orders = tuning()
    assert code == 1 and "gpt2_step fp32 FAILED: no fp32" in out and set(orders) == {"bias_gelu", "grad_norm"}


# ---- doctor, profile, explain


@pytest.mark.parametrize("kind", PLANTS)
def test_doctor_fails_and_examines_the_others(kind, plant, few):
    told = plant(kind, "bias_gelu_bwd").replace("NaN", "the results hold NaN or infinity")
    done = run("doctor", "--json")
    found = strict(done.output)["devices"]["cpu"]
    assert done.exit_code == 1 and found["bias_gelu"]["backends"]["torch"] == f"failed: {told}"
    assert found["bias_gelu"]["backends"]["reference"] == found["grad_norm"]["backends"]["torch"] == "runs"
    done = run("doctor")
    assert done.exit_code == 1 and "FAILED (" in done.output and f"failed: {told}" in done.output


def test_doctor_tells_a_refusal_and_passes(few):
    with refusing("grad_norm", "reference"):
        done = run("doctor", "--json")
    assert done.exit_code == 0
    assert "torch will not" in strict(done.output)["devices"]["cpu"]["grad_norm"]["backends"]["torch"]


def test_doctor_fails_where_the_choice_does(plant, few):
    with refusing("grad_norm", "torch"):
        told = plant("OutOfResources", "grad_norm")
        done = run("doctor", "--json")
    found = strict(done.output)["devices"]["cpu"]["grad_norm"]
    assert done.exit_code == 1 and found["default"] == f"failed: {told}" and found["chosen"] == "torch"


def test_doctor_tells_what_ran_each_part(half, few, monkeypatch):
    monkeypatch.setitem(TABLE["attention_qkv_fwd"].kernels, "half", "fastlm.backends.reference")
    done = run("doctor", "--json")
    found = strict(done.output)["devices"]["cpu"]["attention"]
    assert done.exit_code == 0 and found["backends"]["half"] == "runs"
    assert found["others"]["half"].keys() == {"attention_qkv_bwd"} and "torch" not in found["others"]
    assert f"attention_qkv_bwd runs on {found['others']['half']['attention_qkv_bwd']}" in run("doctor").output


@pytest.mark.parametrize("kind", PLANTS)
def test_profile_and_explain_fail_with_one_line(kind, plant, monkeypatch, capsys, tmp_path):
    told = plant(kind, "grad_norm").replace("NaN", "the gradient's norm is nan after 2 steps")
    with fastlm.use("torch"):
        code, out = main(monkeypatch, capsys, "profile", "train", "--shape", "B=1,T=8,L=1,H=2,C=32,V=97", "--device",
                         "cpu", "--steps", "1", "--out", tmp_path / "t.json")
        assert code == 1 and out.splitlines()[-1].endswith(f"FAILED: {told}") and not (tmp_path / "t.json").exists()
        if kind == "NaN":  # explain looks at no values
            return
        code, out = main(monkeypatch, capsys, "explain", "grad_norm", "--device", "cpu", "--dtype", "fp32", "--shape",
                         "N=100")
        assert code == 1 and out.splitlines()[-1] == f"grad_norm fp32 FAILED: {told}"


def test_explain_tells_which_part_a_forced_backend_lacks(half):
    with fastlm.use(attention="half"):
        out = run("explain", "attention", "--device", "cpu", "--dtype", "fp32", "--shape", "B=1,T=4,H=2,D=8").output
    assert "attention_qkv_fwd runs on half" in out and "not half: attention_qkv_bwd has no half kernel; it has" in out


def test_profile_of_what_dispatch_refuses(monkeypatch, tmp_path):
    with refusing("grad_norm", "reference"), fastlm.use("torch"):
        done = run("profile", "train", "--shape", "B=1,T=8,L=1,H=2,C=32,V=97", "--device", "cpu", "--steps", "1",
                   "--out", tmp_path / "t.json")
    assert isinstance(done.exception, fastlm.Refused)  # of which the command line makes exit code 2
