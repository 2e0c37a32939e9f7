"""A step: however it is divided it is the same, without a finite gradient it is none, and its precision is told."""

import math

import pytest
import torch
from runs import Notes, config, weights

import fastlm
from fastlm.training import step as step_module
from fastlm.training.trainer import MOST_SKIPPED, Trainer


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulation_does_not_change_the_step(text, tmp_path, micro):
    whole = Trainer(config(text, tmp_path / "whole", dropout=0.0))
    parts = Trainer(config(text, tmp_path / "parts", dropout=0.0, micro_batch=micro))
    for _ in range(3):
        one, other = whole.train_step(), parts.train_step()
        assert one == pytest.approx(other, rel=1e-5)
    for mine, theirs in zip(whole.state.model.parameters(), parts.state.model.parameters()):
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


def test_a_step_without_a_finite_gradient_changes_nothing(text, tmp_path):
    notes = Notes()
    trainer = Trainer(config(text, tmp_path / "run"), listeners=[notes])
    trainer.train_step()
    before = weights(trainer)
    hook = trainer.state.model.transformer.ln_f.register_forward_hook(lambda *call: call[-1] * float("nan"))
    loss, _ = trainer.train_step()
    assert math.isnan(loss) and trainer.state.skipped == 1 and "the step was skipped" in notes.said[-1]
    assert all(torch.equal(before[name], after) for name, after in weights(trainer).items())
    with pytest.raises(RuntimeError, match=f"{MOST_SKIPPED} steps in a row .* lower learning_rate"):
        for _ in range(MOST_SKIPPED):
            trainer.train_step()
    hook.remove()
    assert all(torch.equal(before[name], after) for name, after in weights(trainer).items())
    assert math.isfinite(trainer.train_step()[0])


def test_no_memory_is_told_with_what_takes_less(text, tmp_path, monkeypatch):
    def fill(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    for recompute, told in ((False, "micro_batch, which changes no result, or recompute=true"), (True, "result \\(")):
        trainer = Trainer(config(text, tmp_path / f"run{recompute}", micro_batch=2, recompute=recompute))
        monkeypatch.setattr(trainer.step, "_loss", fill)
        with pytest.raises(RuntimeError, match=f"no memory for a step of 2 sequences of 16 tokens .*{told}") as found:
            trainer.train_step()
        assert "2.00 GiB" in str(found.value) and "\n" not in str(found.value)


def test_blocks_computed_again_make_the_same_run(text, tmp_path):
    found = []
    for again in (False, True):
        trainer = Trainer(config(text, tmp_path / str(again), recompute=again))
        found.append(([trainer.train_step() for _ in range(3)], weights(trainer), trainer.state.model.recomputes))
    (losses, wanted, plain), (same, held, again) = found
    assert losses == same and (plain, again) == (False, True)
    assert all(torch.equal(value, held[name]) for name, value in wanted.items())


@pytest.mark.parametrize("dtype, fast, told", [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)])
def test_bf16_where_the_cpu_has_none(text, tmp_path, monkeypatch, dtype, fast, told):
    monkeypatch.setattr(step_module, "_multiplies_bf16", lambda: fast)
    notes, on = Notes(), []
    trainer = Trainer(config(text, tmp_path / "run", dtype=dtype, device="cpu"), listeners=[notes])
    assert [note for note in notes.said if "made in fp32" in note] == notes.said[: int(told)]
    part = trainer.state.model.transformer.ln_f
    part.register_forward_hook(lambda *_: on.append(torch.is_autocast_enabled("cpu")))
    trainer.train_step()
    trainer.evaluate()
    assert len(on) > 1 and set(on) == {dtype == "bf16" and fast}
