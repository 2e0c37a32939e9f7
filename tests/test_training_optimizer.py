"""AdamW over flat buffers is torch's, and the learning rate goes up and down as it should."""

import pytest
import torch

import fastlm
from fastlm.training import optimizer as optimizer_module
from fastlm.training.config import TrainConfig
from fastlm.training.optimizer import AdamW, learning_rate


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
        ours.count()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    for mine, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    again = AdamW(model, given)
    again.load({key: value.clone() for key, value in ours.state().items()})
    assert again.steps == 5 and all(torch.equal(value, again.state()[key]) for key, value in ours.state().items())


@pytest.mark.parametrize("norm, loss", [("nan", "1"), ("inf", "1"), ("1", "nan"), ("1", "-inf")])
def test_a_step_that_is_not_finite_changes_nothing(norm, loss):
    model = fastlm.GPT2(fastlm.GPT2Config(vocab_size=17, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    ours, tokens = AdamW(model, TrainConfig(data="x", out="y")), torch.randint(17, (2, 8))
    model.loss(tokens, tokens).backward()
    flat, _ = ours.gradients()
    before = {name: value.clone() for name, value in (model.state_dict() | ours.state()).items()}
    ours.step(flat, torch.tensor(float(norm)), 1e-2, torch.tensor(float(loss)))
    assert all(torch.equal(value, before[name]) for name, value in (model.state_dict() | ours.state()).items())
    ours.step(flat, torch.tensor(1.0), 1e-2, torch.tensor(1.0))
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
