"""The trainer: its settings, its steps, and that a run which was killed is the run which was not."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import fastlm
from fastlm import dispatch
from fastlm.backends import machine
from fastlm.training import checkpoint
from fastlm.training import optimizer as optimizer_module
from fastlm.training import trainer as trainer_module
from fastlm.training.bigram import bigram_loss
from fastlm.training.config import PRESETS, TrainConfig, read_settings
from fastlm.training.curve import draw, read_metrics, save_png
from fastlm.training.optimizer import AdamW, learning_rate
from fastlm.training.trainer import MOST_SKIPPED, Silent, Trainer

TEXT = "".join(f"the {n} times {n} is {n * n}, and so it goes on;\n" for n in range(400))
SMALL = {
    "tokenizer": "chars", "n_layer": 2, "n_head": 2, "n_embd": 16, "sequence_length": 16, "batch_size": 4, "steps": 12,
    "warmup_steps": 2, "eval_every": 3, "save_every": 2, "sample_tokens": 0, "dropout": 0.1, "learning_rate": 3e-3,
    "min_learning_rate": 1e-4,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def config(text, out, **changes):
    return TrainConfig(**{**SMALL, "data": str(text), "out": str(out), **changes})


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


# ---- settings


def test_learning_rate():
    given = TrainConfig(data="x", out="y", steps=2000, learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=100)
    assert learning_rate(0, given) == pytest.approx(1e-3 / 101)
    assert learning_rate(99, given) == pytest.approx(1e-3 * 100 / 101)
    assert learning_rate(100, given) == pytest.approx(1e-3)
    assert learning_rate(1050, given) == pytest.approx(5.5e-4)
    assert learning_rate(2000, given) == learning_rate(5000, given) == pytest.approx(1e-4)


@pytest.mark.parametrize("large", [100, 2**20])
@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_the_optimizer_steps_as_torchs(large, clip, monkeypatch):
    """Over flat buffers, clipped, large parameters each in a buffer of its own."""
    monkeypatch.setattr(optimizer_module, "LARGE", large)
    given = TrainConfig(data="x", out="y", grad_clip=clip)
    sizes = {"vocab_size": 61, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model, twin = (fastlm.GPT2(fastlm.GPT2Config(**sizes, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
                   for _ in range(2))
    twin.load_state_dict(model.state_dict())
    ours = AdamW(model, given)
    assert len(ours.parts) == 2 if large > 1e6 else len(ours.parts) > 4
    groups = [{"params": [p for p in twin.parameters() if (p.dim() >= 2) == decays],
               "weight_decay": given.weight_decay * decays} for decays in (True, False)]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(given.beta1, given.beta2), eps=given.epsilon)
    for _ in range(5):
        tokens = torch.randint(61, (2, 8))
        model.loss(tokens, tokens).backward()
        for mine, other in zip(model.parameters(), twin.parameters()):
            other.grad = mine.grad.clone()
        flat, norm = ours.gradients()
        wanted = torch.nn.utils.clip_grad_norm_(twin.parameters(), clip)
        torch.testing.assert_close(norm, wanted)
        ours.step(flat, norm, learning_rate=1e-2)
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    for mine, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    again = AdamW(model, given)
    again.load({key: value.clone() for key, value in ours.state().items()})
    assert again.steps == 5 and all(torch.equal(value, again.state()[key]) for key, value in ours.state().items())


def test_settings_by_precedence(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("steps = 77\nn_layer = 3\n")
    values = read_settings(preset="shakespeare-char", file=file, settings=["n_layer=5", "dtype=bf16"], out="here")
    assert values["steps"] == 77 and values["n_layer"] == 5 and values["dtype"] == "bf16" and values["out"] == "here"
    assert values["batch_size"] == 12
    for name in PRESETS:
        assert TrainConfig(**read_settings(preset=name, data="x", out="y")).steps > 0


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: read_settings(preset="huge"), "preset is 'huge', wanted shakespeare-char"),
        (lambda: read_settings(settings=["learningrate=1"]), "learningrate is .* did you mean learning_rate"),
        (lambda: read_settings(settings=["steps"]), "--set steps: wanted key=value"),
        (lambda: read_settings(file="/nowhere.toml"), "/nowhere.toml: cannot be read"),
        (lambda: TrainConfig(data="x", out="y", steps=0), "steps is 0"),
        (lambda: TrainConfig(data="x", out="y", n_embd=10, n_head=3), "n_embd=10 is no multiple of n_head=3"),
        (lambda: TrainConfig(out="y"), "data is missing; pass --data"),
        (lambda: TrainConfig(data="x", out="y", dtype="fp8"), "dtype is 'fp8'"),
        (lambda: TrainConfig(data="x", out="y", learning_rate=1e-5), "min_learning_rate=6e-05 is above"),
    ],
)
def test_bad_settings(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_bad_toml(tmp_path):
    (tmp_path / "run.toml").write_text("steps = = 3")
    with pytest.raises(ValueError, match="no valid TOML"):
        read_settings(file=tmp_path / "run.toml")


# ---- steps


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulation_does_not_change_the_step(text, tmp_path, micro):
    whole = Trainer(config(text, tmp_path / "whole", dropout=0.0))
    parts = Trainer(config(text, tmp_path / "parts", dropout=0.0, micro_batch=micro))
    for _ in range(3):
        one, other = whole.train_step(), parts.train_step()
        assert one == pytest.approx(other, rel=1e-5)
    for mine, theirs in zip(whole.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_attention_dropout_does_not_depend_on_the_micro_batch():
    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = fastlm.GPT2(fastlm.GPT2Config(**sizes, embd_pdrop=0, resid_pdrop=0, attn_pdrop=0.3)).train()
    tokens = torch.randint(17, (4, 8))
    whole = model(tokens, seed=torch.tensor([1, 2, 0, 8]))[0]
    later = model(tokens[2:], seed=torch.tensor([1, 2, 0, 10]))[0]
    torch.testing.assert_close(whole[2:], later)
    assert not torch.allclose(whole, model(tokens, seed=torch.tensor([1, 3, 0, 8]))[0])


class Notes(Silent):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def test_a_step_without_a_finite_gradient_changes_nothing(text, tmp_path):
    trainer = Trainer(config(text, tmp_path / "run"), report=Notes())
    trainer.train_step()
    before = weights(trainer)
    hook = trainer.model.transformer.ln_f.register_forward_hook(lambda *call: call[-1] * float("nan"))
    loss, _ = trainer.train_step()
    assert math.isnan(loss) and trainer.skipped == 1 and "the step was skipped" in trainer.report.said[-1]
    assert all(torch.equal(before[name], after) for name, after in weights(trainer).items())
    with pytest.raises(RuntimeError, match=f"{MOST_SKIPPED} steps in a row .* lower learning_rate"):
        for _ in range(MOST_SKIPPED):
            trainer.train_step()
    hook.remove()
    assert all(torch.equal(before[name], after) for name, after in weights(trainer).items())
    assert math.isfinite(trainer.train_step()[0])


@pytest.mark.parametrize("dtype, fast, told", [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)])
def test_bf16_where_the_cpu_has_none(text, tmp_path, monkeypatch, dtype, fast, told):
    monkeypatch.setattr(trainer_module, "_multiplies_bf16", lambda: fast)
    trainer = Trainer(config(text, tmp_path / "run", dtype=dtype, device="cpu"), report=Notes())
    assert [note for note in trainer.report.said if "made in fp32" in note] == trainer.report.said[: int(told)]
    with trainer._autocast():
        assert torch.is_autocast_enabled("cpu") == (dtype == "bf16" and fast)


def test_a_run(text, tmp_path):
    trainer = Trainer(config(text, tmp_path / "run", steps=30, eval_every=10))
    assert trainer.run()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 10, 20, 30]
    assert all({"step", "train_loss", "val_loss", "tokens_per_second"} <= set(row) for row in rows)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.2
    assert rows[0]["val_loss"] == pytest.approx(math.log(trainer.tokenizer.vocab_size), abs=0.3)
    assert len(checkpoint.found(tmp_path / "run" / "checkpoints")) == checkpoint.KEPT
    model = fastlm.GPT2.from_pretrained(tmp_path / "run")
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in model.named_parameters())
    total = sum(targets.numel() for _, targets in trainer.val_data.whole(3))
    assert total == trainer.val_data.tokens - 1
    save_png(rows, tmp_path / "loss.png", baselines={"bigram": 3.0})
    assert (tmp_path / "loss.png").stat().st_size > 5000 and "held-out loss" in draw(rows)


def test_bf16_and_compiled_runs(text, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "_multiplies_bf16", lambda: True)  # bf16 itself, also where it is slow
    for changes in ({"dtype": "bf16"}, {"compile": True, "dropout": 0.0, "steps": 3}):
        trainer = Trainer(config(text, tmp_path / str(len(changes)), **changes))
        assert trainer.run() and all(value.dtype == torch.float32 for value in weights(trainer).values())


def test_a_backend_that_leaves_the_backward_to_another(text, tmp_path, monkeypatch):
    """What runs it is told, and holds for the run that is resumed, whatever would be chosen then."""
    monkeypatch.setitem(machine.BACKENDS, "half", (("cpu",), lambda: None))
    monkeypatch.setitem(dispatch.TABLE["attention_qkv_fwd"].kernels, "half", "fastlm.backends.reference")
    given, notes = config(text, tmp_path / "run", dropout=0.0, steps=4), Notes()
    with fastlm.use(attention="half", attention_qkv_bwd="reference"):
        trainer = Trainer(given, report=notes)
    told = "attention runs on half, but attention_qkv_bwd on reference"
    assert trainer.backends["attention"] == "half" and trainer.backends["attention_qkv_bwd"] == "reference"
    with dispatch.record() as calls:
        assert trainer.run()
    assert {backend for op, backend in calls if op == "attention_qkv_fwd"} == {"half"}
    assert {backend for op, backend in calls if op == "attention_qkv_bwd"} == {"reference"} and told in notes.said
    notes = Notes()
    again = Trainer.resume(tmp_path / "run", report=notes, steps=6)
    assert again.backends == trainer.backends
    with dispatch.record() as calls:
        assert again.run()
    assert {backend for op, backend in calls if op == "attention_qkv_bwd"} == {"reference"} and told in notes.said


def test_a_backend_that_is_forced_has_the_op(text, tmp_path, monkeypatch):
    """The forward is the forced one's although what ran last, the backward, is another's."""
    monkeypatch.setitem(machine.BACKENDS, "half", (("cpu",), lambda: None))
    monkeypatch.setitem(dispatch.TABLE["attention_qkv_fwd"].kernels, "half", "fastlm.backends.reference")
    with fastlm.use(attention="half"):
        trainer = Trainer(config(text, tmp_path / "run", dropout=0.0))
    assert trainer.backends["attention"] == "half" and trainer.backends["attention_qkv_bwd"] != "half"
    assert set(Trainer(config(text, tmp_path / "other", dropout=0.0)).backends) <= {
        row.family for row in dispatch.TABLE.values()}


# ---- killed and resumed

SCRIPT = """
import os, sys, time
from fastlm.training import checkpoint
from fastlm.training.config import TrainConfig
from fastlm.training.trainer import Trainer
import torch
torch.set_num_threads(1)
if os.environ.get("SLOW_DISK"):  # a save takes long enough to be killed in
    quick = checkpoint.sync
    checkpoint.sync = lambda path: (time.sleep(0.02), quick(path))
out, text = sys.argv[1:3]
if os.path.exists(os.path.join(out, "checkpoints")) and checkpoint.found(os.path.join(out, "checkpoints")):
    trainer = Trainer.resume(out)
else:
    import shutil, json
    shutil.rmtree(out, ignore_errors=True)
    trainer = Trainer(TrainConfig(data=text, out=out, **json.loads(sys.argv[3])))
print("started", flush=True)
trainer.run()
print("done", flush=True)
"""


def state_of(out):
    """Everything that a resumed run must have in common with one that was not killed."""
    path = checkpoint.found(out / "checkpoints")[-1]
    checkpoint.verify(path)
    state = json.loads((path / "state.json").read_text())
    rows = read_metrics(out / "metrics.jsonl")
    for row in rows:
        row.pop("tokens_per_second")
    state.pop("metrics_bytes")  # tokens_per_second has not always as many digits
    return load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors"), state, rows


def assert_same(one, other):
    for mine, theirs in zip(one[:2], other[:2]):
        assert set(mine) == set(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert one[2:] == other[2:]


def kill_and_resume(tmp_path, text, kills, seed):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "SLOW_DISK": "1", "OMP_NUM_THREADS": "1"}

    def start(out):
        arguments = [sys.executable, script, out, text, json.dumps(SMALL)]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    begun = time.monotonic()
    whole = start(tmp_path / "whole")
    assert whole.stdout.readline() == "started\n", whole.stderr.read()
    started = time.monotonic()
    assert whole.stdout.readline() == "done\n", whole.stderr.read()
    length = time.monotonic() - started
    assert begun < started
    chance, struck = random.Random(seed), 0
    while struck < kills:
        run = start(tmp_path / "killed")
        if run.stdout.readline() != "started\n":
            raise AssertionError(run.stderr.read())
        time.sleep(chance.uniform(0, length * 0.8))
        if run.poll() is None and not checkpoint_is_last(tmp_path / "killed"):
            run.send_signal(signal.SIGKILL)
            struck += 1
        run.wait()
        run.stdout.close(), run.stderr.close()
        if checkpoint_is_last(tmp_path / "killed"):  # it reached the end: begin anew, to be killed again
            assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "killed"))
            (tmp_path / "killed").rename(tmp_path / f"ended-{struck}-{time.monotonic_ns()}")
    last = start(tmp_path / "killed")
    assert last.wait(timeout=120) == 0, last.stderr.read()
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "killed"))


def checkpoint_is_last(out):
    found = checkpoint.found(out / "checkpoints")
    return bool(found) and found[-1].name == f"step_{SMALL['steps']:08d}"


def test_killed_and_resumed(tmp_path, text):
    kill_and_resume(tmp_path, text, kills=2, seed=0)


@pytest.mark.slow
def test_killed_twenty_times_and_resumed(tmp_path, text):
    kill_and_resume(tmp_path, text, kills=20, seed=1)


def test_killed_inside_a_save(tmp_path, text, monkeypatch):
    """Whatever a save had done when it was cut off, the last good checkpoint is found."""
    trainer = Trainer(config(text, tmp_path / "run", steps=4))
    trainer.run()
    good = checkpoint.found(tmp_path / "run" / "checkpoints")[-1]
    calls = {"count": 0}
    real = checkpoint.sync

    class Killed(BaseException):
        pass

    for moment in range(1, 7):
        calls["count"] = 0

        def cut_off(path, moment=moment):
            calls["count"] += 1
            if calls["count"] == moment:
                raise Killed
            real(path)

        monkeypatch.setattr(checkpoint, "sync", cut_off)
        trainer.step = 5
        try:
            trainer.save()
        except Killed:
            pass
        monkeypatch.setattr(checkpoint, "sync", real)
        path, _, _, state = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
        assert (path == good and state["step"] == 4) or state["step"] == 5
        if state["step"] == 5:  # it was cut off behind the rename
            assert moment == 6
    assert Trainer.resume(tmp_path / "run", steps=6).run()


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, text, monkeypatch):
    trainer = Trainer(config(text, tmp_path / "run", steps=4))
    trainer.run()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    trainer.step = 5
    with pytest.raises(RuntimeError, match="No space left on device.*the last good one is .*step_00000004"):
        trainer.save()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] != []
    assert not list((tmp_path / "run" / "checkpoints").glob(".saving*"))
    assert checkpoint.load_newest(tmp_path / "run" / "checkpoints")[3]["step"] == 4


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, text, name):
    Trainer(config(text, tmp_path / "run", steps=4)).run()
    older, newer = checkpoint.found(tmp_path / "run" / "checkpoints")
    content = bytearray((newer / name).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (newer / name).write_bytes(content)
    notes = Notes()
    assert Trainer.resume(tmp_path / "run", report=notes).step == 2
    assert "damaged" in notes.said[0] and "going back" in notes.said[0]
    (older / name).unlink()
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        Trainer.resume(tmp_path / "run")


def test_resume_with_more_steps(tmp_path, text):
    Trainer(config(text, tmp_path / "run", steps=4)).run()
    trainer = Trainer.resume(tmp_path / "run", steps=6)
    assert trainer.run() and trainer.step == 6


def test_an_existing_run_is_not_overwritten(tmp_path, text):
    Trainer(config(text, tmp_path / "run", steps=2)).run()
    with pytest.raises(ValueError, match="exists; go on with --resume, or pass another --out"):
        Trainer(config(text, tmp_path / "run"))


def test_a_checkpoint_of_another_model(tmp_path, text):
    Trainer(config(text, tmp_path / "run", steps=2)).run()
    with pytest.raises(ValueError, match="of another model"):
        Trainer.resume(tmp_path / "run", n_layer=3)


# ---- the command


def command(*arguments, wait=True):
    run = subprocess.Popen(
        [sys.executable, "-m", "fastlm.cli", "train", *map(str, arguments)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )
    if not wait:
        return run
    output, error = run.communicate(timeout=120)
    return run.returncode, output, error


def settings(**changes):
    values = {**SMALL, **changes}
    return [item for key, value in values.items() for item in ("--set", f"{key}={value}")]


def test_command(tmp_path, text):
    code, output, error = command("--data", text, "--out", tmp_path / "run", *settings(sample_tokens=8))
    assert code == 0, error
    assert "held out" in output and "a sample:" in output and (tmp_path / "run" / "loss.png").is_file()


def test_interrupted_command_saves_and_goes_on(tmp_path, text):
    run = command("--data", text, "--out", tmp_path / "run", *settings(steps=100000, save_every=50000), wait=False)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    output, error = run.communicate(timeout=60)
    assert run.returncode == 0 and "stopped by SIGINT and saved at step" in output, output + error
    assert f"fastlm train --resume --out {tmp_path / 'run'}" in output.replace("\n", " ")
    step = checkpoint.load_newest(tmp_path / "run" / "checkpoints")[3]["step"]
    code, output, error = command("--resume", "--out", tmp_path / "run", "--set", f"steps={step + 2}")
    assert code == 0 and f"at step {step}" in output, output + error


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--data", "/nowhere"], "/nowhere: no such file or folder"),
        (["--set", "speed=9"], "speed is no setting"),
        (["--preset", "huge"], "preset is 'huge'"),
        (["--resume"], "no settings of a run"),
        (["--data", "TEXT", "--set", "sequence_length=900000"], "a sequence of 900000"),
        (["--data", "TEXT", "--set", "device=cuda"], "no CUDA GPU"),
    ],
)
def test_command_refuses_with_a_sentence(tmp_path, text, arguments, told):
    if "device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    given = [str(text) if argument == "TEXT" else argument for argument in arguments]
    code, _, error = command("--out", tmp_path / "run", *given)
    assert code == 2 and told in error and "Traceback" not in error
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---- the baseline


def test_bigram_loss():
    import numpy as np

    random_text = np.random.default_rng(0).integers(0, 4, 40_000)
    assert bigram_loss(random_text[:30_000], random_text[30_000:], 4) == pytest.approx(math.log(4), abs=0.01)
    cycle = np.arange(3000) % 5
    assert bigram_loss(cycle[:2000], cycle[2000:], 5) < 0.01
    with pytest.raises(ValueError, match="wanted at least 2"):
        bigram_loss(cycle[:1], cycle, 5)
