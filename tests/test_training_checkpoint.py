"""Checkpoints: they hold a run's state, survive what befalls it, and a run that was killed is the run which was not."""

import builtins
import dataclasses
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from runs import SMALL, Notes, config
from safetensors.torch import load_file

from fastlm.training import checkpoint
from fastlm.training.curve import Curve
from fastlm.training.metrics import read_metrics
from fastlm.training.state import State
from fastlm.training.trainer import Trainer

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


def test_a_checkpoint_holds_the_state(tmp_path, text):
    """Every field, under names that runs on disks have."""
    trainer = Trainer(config(text, tmp_path / "run", steps=5, eval_every=3, save_every=5))
    trainer.run()
    path = checkpoint.found(tmp_path / "run" / "checkpoints")[-1]
    names = dict(trainer.state.model.named_parameters())
    moments = load_file(path / "optimizer.safetensors")
    assert set(load_file(path / "model.safetensors")) == set(names)
    assert set(moments) - {"rng.cuda"} == {"step", "rng.cpu", *(f"exp_avg.{name}" for name in names),
                                           *(f"exp_avg_sq.{name}" for name in names)}
    rest = json.loads((path / "state.json").read_text())
    fields = {field.name for field in dataclasses.fields(State)}
    assert fields == {"model", "optimizer", "generators", "backends", "step", "skipped", "skipped_in_a_row", "loss_sum",
                      "loss_steps", "metrics_bytes"}
    assert set(rest) == fields - {"model", "optimizer", "generators"} | {"torch", "threads"}
    other = Trainer(config(text, tmp_path / "other", seed=7)).state
    for name in set(rest) & fields:
        value = {"no": "backend"} if name == "backends" else rest[name] + 1
        setattr(trainer.state, name, value)
    trainer.state.generators["cpu"].manual_seed(3)
    saved, drawn = checkpoint.save(tmp_path / "run" / "checkpoints", trainer.state), torch.rand(4)
    checkpoint.load(saved, other)
    assert torch.equal(torch.rand(4), drawn)
    for mine, theirs in zip(trainer.state.dump()[:2], other.dump()[:2]):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine if not name.startswith("rng."))
    assert all(getattr(trainer.state, name) == getattr(other, name) for name in set(rest) & fields)
    assert other.step == 6 and other.backends == {"no": "backend"}


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
        trainer.state.step = 5
        try:
            trainer.save()
        except Killed:
            pass
        monkeypatch.setattr(checkpoint, "sync", real)
        path = checkpoint.newest(tmp_path / "run" / "checkpoints")
        step = Trainer.resume(tmp_path / "run").state.step
        assert (path == good and step == 4) or step == 5
        if step == 5:  # it was cut off behind the rename
            assert moment == 6
    assert Trainer.resume(tmp_path / "run", steps=6).run()


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, text, monkeypatch):
    trainer = Trainer(config(text, tmp_path / "run", steps=4))
    trainer.run()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    trainer.state.step = 5
    with pytest.raises(RuntimeError, match="No space left on device.*the last good one is .*step_00000004"):
        trainer.save()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] != []
    assert not list((tmp_path / "run" / "checkpoints").glob(".saving*"))
    assert Trainer.resume(tmp_path / "run").state.step == 4


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, text, name):
    Trainer(config(text, tmp_path / "run", steps=4)).run()
    older, newer = checkpoint.found(tmp_path / "run" / "checkpoints")
    content = bytearray((newer / name).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (newer / name).write_bytes(content)
    notes = Notes()
    assert Trainer.resume(tmp_path / "run", listeners=[notes]).state.step == 2
    assert "damaged" in notes.said[0] and "going back" in notes.said[0]
    (older / name).unlink()
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        Trainer.resume(tmp_path / "run")


def test_rows_behind_a_checkpoint_are_cut_off(tmp_path, text):
    Trainer(config(text, tmp_path / "run", steps=4, eval_every=1)).run()
    (checkpoint.found(tmp_path / "run" / "checkpoints")[-1] / "manifest.json").unlink()
    assert Trainer.resume(tmp_path / "run").state.step == 2
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert [row["step"] for row in read_metrics(metrics)] == [0, 1, 2]
    metrics.write_bytes(metrics.read_bytes()[:-1])
    with pytest.raises(ValueError, match="metrics.jsonl: shorter than when .*step_00000002 was saved; was it edited"):
        Trainer.resume(tmp_path / "run")


def test_resume_with_more_steps(tmp_path, text):
    Trainer(config(text, tmp_path / "run", steps=4)).run()
    trainer = Trainer.resume(tmp_path / "run", steps=6)
    assert trainer.run() and trainer.state.step == 6


def test_a_checkpoint_of_another_model(tmp_path, text):
    Trainer(config(text, tmp_path / "run", steps=2)).run()
    with pytest.raises(ValueError, match="of another model"):
        Trainer.resume(tmp_path / "run", n_layer=3)


def full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("what", ["metrics.jsonl", "config.json", "train.json", "tokenizer.json"])
def test_a_full_disk_names_the_file_what_was_kept_and_what_to_do(tmp_path, text, monkeypatch, what):
    """Beside the checkpoint itself: everything that a run writes."""
    Trainer(config(text, tmp_path / "run", steps=4)).run()
    trainer = Trainer.resume(tmp_path / "run", steps=8)
    opened, replaced = builtins.open, os.replace

    def limited(path, *arguments, **options):
        mode = arguments[0] if arguments else options.get("mode", "r")
        return full() if what in str(path) and mode[0] in "wa" else opened(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", limited)
    monkeypatch.setattr(io, "open", limited)
    with pytest.raises(RuntimeError) as raised:
        trainer.run()
    monkeypatch.undo()
    assert os.replace is replaced
    told = str(raised.value)
    assert what in told and "No space left on device" in told and "Errno" not in told
    last = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert f"the last good checkpoint is {last}" in told and f"fastlm train --resume --out {tmp_path / 'run'}" in told
    assert Trainer.resume(tmp_path / "run", steps=8).run()


def test_a_picture_that_cannot_be_drawn_ends_no_run(tmp_path, text, monkeypatch):
    notes = Notes()
    monkeypatch.setattr("fastlm.training.curve.save_png", full)
    assert Trainer(config(text, tmp_path / "run", steps=2), listeners=[Curve(), notes]).run()
    assert any("loss.png could not be drawn (No space left on device)" in said for said in notes.said), notes.said
