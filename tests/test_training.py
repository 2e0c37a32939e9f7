"""A run of the trainer: its rows, its model, its backends, and who is told."""

import math
import time

import pytest
import torch
from runs import Notes, config, weights

import fastlm
from fastlm import dispatch
from fastlm.backends import machine
from fastlm.dispatch.table import TABLE
from fastlm.training import checkpoint
from fastlm.training import step as step_module
from fastlm.training.bigram import bigram_loss
from fastlm.training.curve import draw, save_png
from fastlm.training.listener import Listener
from fastlm.training.metrics import read_metrics
from fastlm.training.trainer import Trainer


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


def diary():
    """A listener, and the list of events that it is told."""
    events, listener = [], Listener()
    for name in vars(Listener):
        if not name.startswith("_"):
            setattr(listener, name, lambda *what, name=name: events.append((name, *what)))
    return listener, events


def test_listeners_are_told(text, tmp_path):
    (first, told), (second, too) = diary(), diary()
    trainer = Trainer(config(text, tmp_path / "run", steps=2, eval_every=2), listeners=[first, second])
    assert told[0][0] == "preparing" and told[-1][0] == "prepared"
    begun = len(told)
    assert trainer.run() and trainer.done and told == too
    events = " ".join(name for name, *_ in told[begun:])
    assert events == "evaluated started stepped stepped evaluated finished"
    assert [what[1]["step"] for name, *what in told if name == "evaluated"] == [0, 2]
    again, told = diary()
    trainer = Trainer.resume(tmp_path / "run", listeners=[again], steps=3)
    assert told[0] == ("resumed", trainer, checkpoint.found(tmp_path / "run" / "checkpoints")[-1])
    assert told[1:] == [("say", f"resuming {tmp_path / 'run'} at step 2")]


def test_another_step_stands_in(text, tmp_path):
    """The loop asks nothing of a step but its call."""
    trainer = Trainer(config(text, tmp_path / "run", steps=4, eval_every=2))
    before, numbers = weights(trainer), []

    def stand_in(number):
        numbers.append(number)
        return 2.5, 1.0, number != 1

    trainer.step = stand_in
    assert trainer.run() and numbers == [0, 1, 2, 3]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["train_loss"] for row in rows[1:]] == [2.5, 2.5] and rows[-1]["skipped_steps"] == 1
    assert all(torch.equal(before[name], after) for name, after in weights(trainer).items())


def test_bf16_and_compiled_runs(text, tmp_path, monkeypatch):
    monkeypatch.setattr(step_module, "_multiplies_bf16", lambda: True)  # bf16 itself, also where it is slow
    for changes in ({"dtype": "bf16"}, {"compile": True, "dropout": 0.0, "steps": 3}):
        trainer = Trainer(config(text, tmp_path / str(len(changes)), **changes))
        assert trainer.run() and all(value.dtype == torch.float32 for value in weights(trainer).values())


def test_a_backend_that_leaves_the_backward_to_another(text, tmp_path, monkeypatch):
    """What runs it is told, and holds for the run that is resumed, whatever would be chosen then."""
    monkeypatch.setitem(machine.BACKENDS, "half", (("cpu",), lambda: None))
    monkeypatch.setitem(TABLE["attention_qkv_fwd"].kernels, "half", "fastlm.backends.reference")
    given, notes = config(text, tmp_path / "run", dropout=0.0, steps=4), Notes()
    with fastlm.use(attention="half", attention_qkv_bwd="reference"):
        trainer = Trainer(given, listeners=[notes])
    told = "attention runs on half, but attention_qkv_bwd on reference"
    assert trainer.state.backends["attention"] == "half" and trainer.state.backends["attention_qkv_bwd"] == "reference"
    with dispatch.record() as calls:
        assert trainer.run()
    assert {backend for op, backend in calls if op == "attention_qkv_fwd"} == {"half"}
    assert {backend for op, backend in calls if op == "attention_qkv_bwd"} == {"reference"} and told in notes.said
    notes = Notes()
    again = Trainer.resume(tmp_path / "run", listeners=[notes], steps=6)
    assert again.state.backends == trainer.state.backends
    with dispatch.record() as calls:
        assert again.run()
    assert {backend for op, backend in calls if op == "attention_qkv_bwd"} == {"reference"} and told in notes.said


def test_a_backend_that_is_forced_has_the_op(text, tmp_path, monkeypatch):
    """The forward is the forced one's although what ran last, the backward, is another's."""
    monkeypatch.setitem(machine.BACKENDS, "half", (("cpu",), lambda: None))
    monkeypatch.setitem(TABLE["attention_qkv_fwd"].kernels, "half", "fastlm.backends.reference")
    with fastlm.use(attention="half"):
        trainer = Trainer(config(text, tmp_path / "run", dropout=0.0))
    assert trainer.state.backends["attention"] == "half" and trainer.state.backends["attention_qkv_bwd"] != "half"
    assert set(Trainer(config(text, tmp_path / "other", dropout=0.0)).state.backends) <= {
        row.family for row in TABLE.values()}


@pytest.mark.parametrize("limit, wanted", [(1, 1), (50, 50), (100, 100), (10**6, None)])
def test_an_evaluation_reads_as_much_as_it_may(text, tmp_path, limit, wanted):
    """The first held-out tokens, the same each time; more than there are is all."""
    notes = Notes()
    trainer = Trainer(config(text, tmp_path / "run", eval_tokens=limit), listeners=[notes])
    whole = [targets for _, targets in trainer.val_data.whole(4)]
    read = [targets for _, targets in trainer.val_data.whole(4, limit)]
    assert sum(targets.numel() for targets in read) == (wanted or trainer.val_data.tokens - 1)
    flat, given = (torch.cat([part.flatten() for part in parts]) for parts in (whole, read))
    assert torch.equal(flat[: len(given)], given)
    counted = []
    trainer._loss = lambda tokens, targets: counted.append(targets.numel()) or float(targets.numel())
    trainer.evaluate()
    assert sum(counted) == len(given)
    told = f"an evaluation reads {limit:,} of {trainer.val_data.tokens - 1:,} held-out tokens"
    assert (told in notes.said) == (wanted is not None), notes.said


def test_an_evaluation_that_takes_longer_than_the_steps_says_how_to_limit_it(text, tmp_path):
    notes = Notes()
    trainer = Trainer(config(text, tmp_path / "run", steps=6, eval_every=2), listeners=[notes])
    evaluate = trainer.evaluate
    trainer.evaluate = lambda: time.sleep(1) or evaluate()
    trainer.run()
    told = [said for said in notes.said if "eval_tokens" in said]
    assert len(told) == 1 and "takes longer than the 2 steps between" in told[0], notes.said


def test_an_existing_run_is_not_overwritten(tmp_path, text):
    Trainer(config(text, tmp_path / "run", steps=2)).run()
    with pytest.raises(ValueError, match="exists; go on with --resume, or pass another --out"):
        Trainer(config(text, tmp_path / "run"))


def test_bigram_loss():
    import numpy as np

    random_text = np.random.default_rng(0).integers(0, 4, 40_000)
    assert bigram_loss(random_text[:30_000], random_text[30_000:], 4) == pytest.approx(math.log(4), abs=0.01)
    cycle = np.arange(3000) % 5
    assert bigram_loss(cycle[:2000], cycle[2000:], 5) < 0.01
    with pytest.raises(ValueError, match="wanted at least 2"):
        bigram_loss(cycle[:1], cycle, 5)
