"""`fastlm check`: it passes where all is right, fails where something is wrong, and says where first."""

import json
import sys

import pytest
import torch

import fastlm
from fastlm import cli
from fastlm.backends import native, vendor
from fastlm.data.tokenizer import Tokenizer
from fastlm.measure.certificate import certify


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `fastlm check` in this process: (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastlm", "check", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capsys.readouterr()

    return run


def test_all_hold(command):
    code, out, _ = command("--json")
    found = json.loads(out)
    assert code == 0 and found["passed"] and found["fastlm"] == fastlm.__version__
    lines = found["lines"]
    assert {line["path"] for line in lines} >= {"op", "model"}
    assert {line["dtype"] for line in lines} == {"fp32", "bf16", "fp16"}
    assert {"softmax_xent dx", "attention o", "decode_attention o", "cache_append k_pages", "logits", "loss",
            "decoded logits", "gradients"} <= {line["what"] for line in lines}
    assert any(0 < line["ratio"] <= 1 for line in lines)
    assert {line["backend"] for line in lines} >= {"torch"} | ({"cpu"} if native._C else set())


def test_the_table(command):
    code, out, _ = command("--seed", 3, "--backend", "torch", "--backend", "reference")
    assert code == 0 and "PASS" in out and "attention dqkv" in out


def test_a_wrong_backend_fails_and_the_first_layer_is_named(monkeypatch):
    right = vendor.attention_qkv_fwd
    calls = []

    def wrong(qkv, *options):  # from the second layer on, and by 1 %
        calls.append(qkv)
        o, lse = right(qkv, *options)
        return (o, lse) if len(calls) % 3 == 1 else (o * 1.01, lse)

    monkeypatch.setattr(vendor, "attention_qkv_fwd", wrong)
    monkeypatch.setattr("fastlm.measure.certificate.CASES", {})
    found = [line for line in certify(backends=["torch"]) if line.path == "model" and line.dtype == "fp32"]
    assert {line.what for line in found if not line.holds} >= {"logits", "loss"}
    assert {line.note for line in found if line.what == "logits"} == {"first astray in layer 1"}


def test_a_wrong_op_exits_with_1(command, monkeypatch):
    right = vendor.decode_attention
    monkeypatch.setattr(vendor, "decode_attention", lambda *a: right(*a) + 1e-3)
    code, out, _ = command("--backend", "torch")
    assert code == 1 and "FAIL" in out


def test_nan_fails(monkeypatch):
    right = vendor.cache_append_

    def lose(k_pages, *rest):
        right(k_pages, *rest)
        k_pages[0, 0, 0, 0] = float("nan")

    monkeypatch.setattr(vendor, "cache_append_", lose)
    found = {line.what: line for line in certify(backends=["torch"]) if line.dtype == "fp32"}
    assert not found["cache_append k_pages"].holds and found["cache_append v_pages"].holds


def test_a_model_of_ones_own(command, tmp_path):
    torch.manual_seed(0)
    config = fastlm.GPT2Config(vocab_size=257, n_positions=20, n_embd=32, n_layer=1, n_head=2)
    fastlm.GPT2(config).save_pretrained(tmp_path, tokenizer=Tokenizer.bytes())
    code, out, _ = command("--model", tmp_path, "--json", "--backend", "torch")
    found = json.loads(out)
    assert code == 0 and found["model"] == str(tmp_path)
    assert {line["path"] for line in found["lines"]} <= {"model", "transformers"}


def test_what_a_kernel_raises_is_no_refusal(monkeypatch):
    def raises(*args):
        raise RuntimeError("no room")

    monkeypatch.setattr(vendor, "softmax_xent_fwd", raises)
    found = [line for line in certify(backends=["torch"]) if line.what == "softmax_xent"]
    assert {line.note for line in found} == {"failed: no room"} and not any(line.holds for line in found)


@pytest.mark.parametrize("arguments, told", [
    (("--device", "tpu"), "--device is 'tpu', wanted auto, cpu or cuda"),
    (("--model", "nowhere"), "nowhere"),
    (("--backend", "opencl"), "no backend 'opencl'; the backends are"),
])
def test_bad_input(command, arguments, told):
    code, out, err = command(*arguments)
    assert code == 2 and told in err and "Traceback" not in err
