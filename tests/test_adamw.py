"""adamw_ against fp64 and torch.optim.AdamW, on every backend."""

import numerics
import pytest
import torch
from conftest import DEVICE
from guard import guarded

import fastlm
from fastlm.backends import reference

FAMILY = "adamw"
OPTIONS = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}


def state(n, dtype=torch.float32):
    """p, g, exp_avg, exp_avg_sq, as after some steps."""
    p, g, m = (numerics.inputs("normal", (n,), dtype, seed) for seed in range(3))
    return [p, g, 0.1 * m, (0.1 * numerics.inputs("normal", (n,), dtype, 3)).square()]


def after(tensors, step, scale, backend=None, rates=None):
    tensors = [tensor.clone() for tensor in tensors]
    given = *tensors, scale, rates, step, *OPTIONS.values()
    reference.adamw_(*given) if backend is None else torch.ops.fastlm.adamw_(*given)
    return {"p": tensors[0], "exp_avg": tensors[2], "exp_avg_sq": tensors[3]}


@pytest.mark.parametrize("step", [1, 7, 10000])
@pytest.mark.parametrize("n", [1, 15, 37, 16384, 16401, 40000])
def test_sizes_and_steps(backend, n, step):
    tensors, scale = state(n), torch.tensor(0.37)
    truth = after([t.double() for t in tensors], step, scale.double())
    composed = after(tensors, step, scale)
    got = after([t.to(DEVICE) for t in tensors], step, scale.to(DEVICE), backend)
    for what, value in got.items():
        numerics.close(f"adamw {what}", backend, value.cpu(), composed[what], truth[what])


@pytest.mark.parametrize("step", [1, 7, 10000])
def test_rates_say_on_the_device_what_numbers_say(backend, step):
    if backend == "torch":
        pytest.skip("it takes the step's number")
    tensors, scale = state(1000), torch.tensor(0.37)
    rates = torch.tensor([1e-2, 1 - 0.9**step, 1 - 0.95**step], dtype=torch.float64)
    truth = after([t.double() for t in tensors], step, scale.double())
    composed = after(tensors, step, scale)
    got = after([t.to(DEVICE) for t in tensors], 0, scale.to(DEVICE), backend, rates.float().to(DEVICE))
    for what, value in got.items():
        numerics.close(f"adamw {what}", backend, value.cpu(), composed[what], truth[what])


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("n", [1, 37, 20000])
def test_a_scale_that_is_not_finite_changes_nothing(backend, n, scale):
    tensors = [t.to(DEVICE) for t in state(n)]
    tensors[1][0] = float("nan")
    found = after(tensors, 3, torch.tensor(scale, device=DEVICE), backend)
    for name, was in (("p", 0), ("exp_avg", 2), ("exp_avg_sq", 3)):
        assert torch.equal(found[name], tensors[was]), name


def test_ten_steps_as_torchs(backend):
    p, g, m, v = (t.to(DEVICE) for t in state(1000))
    m.zero_(), v.zero_()
    theirs = p.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 11):
        theirs.grad = g * step
        optimizer.step()
        fastlm.adamw_(p, g * step, m, v, step=step, **OPTIONS)
    torch.testing.assert_close(p, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_scale_multiplies_the_gradients(backend):
    p, g, m, v = (t.to(DEVICE) for t in state(100))
    one, other = [p.clone(), m.clone(), v.clone()], [p.clone(), m.clone(), v.clone()]
    fastlm.adamw_(one[0], g, *one[1:], step=3, scale=torch.tensor(0.5, device=DEVICE), **OPTIONS)
    fastlm.adamw_(other[0], 0.5 * g, *other[1:], step=3, **OPTIONS)
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("n", [0, 37, 20000])
def test_buffers_offset_by_one(backend, n):
    whole = [t.to(DEVICE) for t in state(n + 2)]
    before, near = [t.clone() for t in whole], [t[1 : n + 1].clone() for t in whole]
    for p, g, m, v in ([t[1 : n + 1] for t in whole], near):
        fastlm.adamw_(p, g, m, v, step=2, **OPTIONS)
    for t, old, alone in zip(whole, before, near):
        torch.testing.assert_close(t[1 : n + 1], alone, rtol=1e-6, atol=1e-8)
        assert torch.equal(t[[0, -1]], old[[0, -1]])


@pytest.mark.parametrize("n", [1, 15, 37, 130])
@pytest.mark.parametrize("front", [False, True], ids=["end", "front"])
def test_guard_pages(backend, n, front):
    if DEVICE != "cpu":
        pytest.skip("guard pages lie in the memory of the CPU; on a GPU compute-sanitizer does this")
    p, g, m, v = (guarded(t, front=front) for t in state(n))
    fastlm.adamw_(p, g, m, v, step=1, **OPTIONS)
    assert p.isfinite().all()


@pytest.mark.parametrize(
    "change, error, told",
    [
        ({"g": torch.zeros(4)}, ValueError, "g has n=4, but p has n=5"),
        ({"p": torch.zeros(5).bfloat16()}, TypeError, "p is torch.bfloat16, wanted float32"),
        ({"exp_avg": torch.zeros(10)[::2]}, ValueError, r"exp_avg has strides \(2,\), wanted \(1,\)"),
        ({"step": 0}, ValueError, "step is 0, wanted 1 or more"),
        ({"beta2": 1.0}, ValueError, "beta2 is 1.0, wanted 0 ≤ beta2 < 1"),
        ({"scale": torch.ones(1)}, ValueError, r"scale has shape \(1,\)"),
        ({"rates": torch.ones(2)}, ValueError, r"rates has shape \(2,\)"),
        ({"rates": torch.ones(3)}, ValueError, "step is 1, learning_rate 1.0 and rates .*, wanted the first two, or"),
        ({"step": None}, ValueError, "step is None, learning_rate 1.0 and rates None"),
        ({"step": None, "learning_rate": None}, ValueError, "step is None, learning_rate None and rates None"),
    ],
)
def test_bad_input_changes_nothing(change, error, told):
    given = {name: torch.ones(5) for name in ("p", "g", "exp_avg", "exp_avg_sq")} | {"step": 1, "learning_rate": 1.0}
    given |= change
    p, g, exp_avg, exp_avg_sq = (given.pop(name) for name in ("p", "g", "exp_avg", "exp_avg_sq"))
    before = p.clone()
    with pytest.raises(error, match=told):
        fastlm.adamw_(p, g, exp_avg, exp_avg_sq, **given)
    assert torch.equal(p, before)
