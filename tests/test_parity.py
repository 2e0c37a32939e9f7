"""fastlm's GPT-2 against transformers': logits, loss, gradients, training, greedy tokens.

Allowed is 4 times the difference between transformers' own two attention implementations in the same run, with a floor
of 8 rounding units of fp32: the two may by chance round alike.
"""

import functools

import numerics
import pytest
import torch
import torch.nn.functional as F
from conftest import GPU

import fastlm
from fastlm import dispatch
from fastlm.dispatch.table import TABLE

pytest.importorskip("transformers", reason="transformers is not installed to compare with")
import parity
from transformers import GPT2LMHeadModel

FLOOR = 8 * torch.finfo(torch.float32).eps
SIZES = [
    {"vocab_size": 97, "n_positions": 33, "n_embd": 48, "n_layer": 3, "n_head": 4},
    {"vocab_size": 131, "n_positions": 50, "n_embd": 64, "n_layer": 2, "n_head": 1},
    {"vocab_size": 61, "n_positions": 40, "n_embd": 21, "n_layer": 4, "n_head": 3},
    {"vocab_size": 257, "n_positions": 70, "n_embd": 80, "n_layer": 1, "n_head": 5, "n_inner": 123},
    {"vocab_size": 50, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 2, "layer_norm_epsilon": 1e-3},
]
BACKENDS = ["torch", "cpu", "reference"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if (reason := dispatch.why_not("attention_fwd", request.param)) is not None:
        pytest.skip(reason)
    with fastlm.use(request.param):
        yield request.param


def hold(name, backend, ours, eager, sdpa, report=lambda line: None):
    """Asserts that we differ from transformers' eager by no more than is allowed; tells the figures."""
    found, between = parity.differences(ours, eager), parity.differences(sdpa, eager)
    for quantity, difference in found.items():
        allowed = 4 * max(between[quantity], FLOOR)
        key = f"{name} {quantity}", backend, "float32"
        numerics.WORST[key] = max(numerics.WORST.get(key, 0.0), difference / allowed)
        report(f"{name:10} {backend:10} {quantity:10} {difference:.1e} allowed {allowed:.1e}")
        told = f"{name} on {backend}: {quantity} differ by {difference:.1e}, allowed {allowed:.1e}"
        assert difference <= allowed, told


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_forward_and_backward(index, backend):
    model = parity.make(seed=index, **SIZES[index])
    tokens, targets = parity.batch(model, 4, model.config.n_positions - index)
    ours, eager, sdpa = (
        parity.step(net, tokens, targets)
        for net in (model, parity.twin(model, "eager"), parity.twin(model, "sdpa"))
    )
    hold("parity", backend, ours, eager, sdpa)


@pytest.mark.parametrize("asked", [
    *({"activation_function": name} for name in ("gelu_pytorch_tanh", "gelu_fast", "gelu", "relu", "silu", "tanh")),
    {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}, {"reorder_and_upcast_attn": True},
    {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}, {"n_inner": 50},
    {"tie_word_embeddings": False}, {"tie_word_embeddings": False, "activation_function": "relu"},
], ids=lambda asked: " ".join(f"{key}={value}" for key, value in asked.items()))
def test_what_a_config_asks_for(asked, tmp_path):
    """It is computed, in training and generation, and is what is saved, for us and for transformers."""
    model = parity.make(seed=1, **{**SIZES[0], **asked})
    tokens, targets = parity.batch(model, 4, 32)
    ours, eager, sdpa = (
        parity.step(net, tokens, targets)
        for net in (model, parity.twin(model, "eager"), parity.twin(model, "sdpa"))
    )
    usual = parity.step(parity.make(seed=1, **SIZES[0]), tokens, targets)
    same = asked.get("activation_function") in ("gelu_pytorch_tanh", "gelu_fast") or "reorder_and_upcast_attn" in asked
    assert ((ours[0] - usual[0]).abs().max() < 1e-3) == same
    hold("asked", "cpu", ours, eager, sdpa)
    greedy_equals_transformers(model.eval(), parity.twin(model))
    model.save_pretrained(tmp_path)
    again, theirs = fastlm.GPT2.from_pretrained(tmp_path), GPT2LMHeadModel.from_pretrained(tmp_path)
    assert again.config == model.config and torch.equal(again(tokens)[0], model(tokens)[0])
    assert torch.equal(theirs(tokens).logits, parity.twin(model, "sdpa")(tokens).logits)


@pytest.mark.parametrize("pads", ["left", "right", "anywhere"])
def test_attention_masks(pads):
    model = parity.make(seed=2, **SIZES[0])
    theirs = parity.twin(model)
    tokens, targets = parity.batch(model, 4, 20)
    real = torch.ones(4, 20, dtype=torch.int64)
    for row, count in enumerate((0, 1, 7, 19)):
        where = {"left": slice(count), "right": slice(20 - count, 20)}.get(pads)
        anywhere = torch.randperm(20, generator=torch.Generator().manual_seed(row))[:count]
        real[row, anywhere if where is None else where] = 0
    targets[real == 0] = -100
    model.zero_grad()
    wanted = theirs(tokens, attention_mask=real).logits
    got = model(tokens, attention_mask=real)[0]
    torch.testing.assert_close(got[real.bool()], wanted[real.bool()], rtol=1e-4, atol=2e-5)
    loss = F.cross_entropy(wanted.flatten(0, 1), targets.flatten())
    mine = model.loss(tokens, targets, attention_mask=real)
    for ours in mine, model(tokens, targets, attention_mask=real.bool())[1]:
        torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    mine.backward()
    loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)
    if pads == "left":
        written = model.eval().generate(tokens, attention_mask=real, max_new_tokens=8, temperature=0)
        wanted = theirs.generate(tokens, attention_mask=real, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for row, one, other in zip(real, written, wanted):
            assert one.tolist() == other[int((row == 0).sum()) :].tolist()


def test_the_loss_with_and_without_logits(backend):
    model = parity.make(**SIZES[3])
    tokens, targets = parity.batch(model, 4, 60)
    without = parity.step(model, tokens, targets)
    model.zero_grad()
    logits, loss = model(tokens, targets)
    loss.backward()
    torch.testing.assert_close(float(loss), without[1], rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        if not name.endswith("attn.c_attn.bias"):
            torch.testing.assert_close(parameter.grad, without[2][name], rtol=1e-4, atol=1e-6)


def test_fifty_training_steps(backend):
    model = parity.make(vocab_size=53, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    theirs = parity.twin(model).train()
    losses = []
    for net in (model, theirs):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        for index in range(50):
            tokens, targets = parity.batch(model, 4, 16, seed=index)
            losses.append(parity.step(net, tokens, targets)[1])
            for name, parameter in net.named_parameters():
                if name.endswith("attn.c_attn.bias"):  # Adam would amplify the rounding of a zero gradient
                    parameter.grad[24:48] = 0
            optimizer.step()
    ours, eager = losses[:50], losses[50:]
    assert ours == pytest.approx(eager, rel=1e-5) and ours[-1] < ours[0]
    for (name, mine), other in zip(model.named_parameters(), theirs.parameters()):
        assert float(((mine - other).norm() / other.norm()).detach()) < 1e-4, name


def losses_of_steps(net, model, steps, shape, dtype):
    """(steps, B T): before each step, the loss of every one of its tokens (B, T); products are in dtype."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    found = []
    for index in range(steps):
        tokens, targets = parity.batch(model, *shape, seed=index)
        net.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            if net is model:
                with torch.no_grad():
                    hidden = net.hidden(tokens).flatten(0, 1)
                    apart = fastlm.linear_xent(hidden, net.lm_head.weight, targets.flatten(), reduction="none")
                loss = net.loss(tokens, targets)
            else:
                logits = net(tokens).logits.flatten(0, 1).float()
                apart = F.cross_entropy(logits, targets.flatten(), reduction="none")
                loss = apart.sum() / (targets != -100).sum()
        loss.backward()
        optimizer.step()
        found.append(apart.detach())
    return torch.stack(found)


@pytest.mark.skipif(GPU, reason="autocast of the CPU")
@pytest.mark.parametrize("backend, steps, shape",
                         [("cpu", 50, (8, 64)), ("torch", 50, (8, 64)), ("triton", 2, (4, 32))],
                         indirect=["backend"])
def test_training_in_bf16_is_no_further_off_than_theirs(backend, steps, shape, tell):
    """From transformers' fp32, at every step, over its tokens; theirs is bf16 under autocast, too."""
    make = functools.partial(parity.make, vocab_size=53, n_positions=64, n_embd=64, n_layer=2, n_head=2)
    model = make()
    exact, theirs = (losses_of_steps(parity.twin(make()).train(), model, steps, shape, dtype)
                     for dtype in (torch.float32, torch.bfloat16))
    ours = losses_of_steps(model, model, steps, shape, torch.bfloat16)
    ratio = (ours - exact).norm(dim=1) / (theirs - exact).norm(dim=1)
    tell(f"bf16, {steps} steps on {backend}: {ratio.median():.2f} of transformers' distance, at most {ratio.max():.2f}")
    assert ratio.max() < 1.2 and (theirs - exact).norm(dim=1).min() > 0


@pytest.mark.parametrize("index", range(4))
def test_greedy_tokens_of_unequal_prompts(index, backend):
    """A batch gives what each prompt gives alone, and what transformers gives."""
    model = parity.make(seed=index, **SIZES[index]).eval()
    theirs = parity.twin(model)
    generator = torch.Generator().manual_seed(index)
    prompts = [torch.randint(model.config.vocab_size, (n,), generator=generator) for n in (1, 7, 3, 12)]
    together = model.generate(prompts, max_new_tokens=20, temperature=0)
    for prompt, row in zip(prompts, together):
        alone = model.generate([prompt], max_new_tokens=20, temperature=0)[0]
        wanted = theirs.generate(prompt[None], max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
        assert row.tolist() == alone.tolist() == wanted.tolist()


def greedy_equals_transformers(model, theirs):
    prompts = [torch.arange(5, 5 + n) for n in (1, 9, 4)]
    for prompt, row in zip(prompts, model.generate(prompts, max_new_tokens=8, temperature=0)):
        wanted = theirs.generate(prompt[None], max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
        assert row.tolist() == wanted.tolist()


@pytest.mark.skipif(GPU, reason="a GPU is here: the backends themselves run, nothing is interpreted or emulated")
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_interpreted_kernels_make_a_whole_model(backend):
    """Loss, gradients and greedy tokens through every Triton kernel there is."""
    model = parity.make(vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=2)
    tokens, targets = parity.batch(model, 3, 21)
    with dispatch.record() as calls:
        ours = parity.step(model, tokens, targets)
    assert {name for op, name in calls if "triton" in TABLE[op].kernels} == {"triton"}
    hold("interpreted", backend, ours, *(parity.step(parity.twin(model, name), tokens, targets)
                                         for name in ("eager", "sdpa")))
    with dispatch.record() as calls:
        greedy_equals_transformers(model.eval(), parity.twin(model))
    assert {name for op, name in calls if "triton" in TABLE[op].kernels} == {"triton"}


@pytest.mark.skipif(GPU, reason="a GPU is here: the backends themselves run, nothing is interpreted or emulated")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_emulated_kernels_generate(emulated, dtype):
    """Greedy tokens through every CUDA kernel there is; in fp32 the prompts go through another attention."""
    model = parity.make(vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=2).eval()
    theirs = parity.twin(model).to(dtype)
    half = {"attention": "cuda-emulated"} if dtype == torch.float16 else {}
    emulated = {**half, "decode_attention": "cuda-emulated", "cache_append": "cuda-emulated"}
    with fastlm.use(**emulated), dispatch.record() as calls:
        greedy_equals_transformers(model.to(dtype), theirs)
    ran = {name for op, name in calls if "cuda" in TABLE[op].kernels and (half or "attention_qkv" not in op)}
    assert ran == {"cuda-emulated"}


def test_files_are_hugging_faces(tmp_path):
    from transformers import AutoModelForCausalLM

    model = parity.make(**SIZES[0]).eval()
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(theirs.state_dict()) == set(model.state_dict())
    tokens, _ = parity.batch(model, 2, 20)
    torch.testing.assert_close(model(tokens)[0], theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = fastlm.GPT2.from_pretrained(tmp_path / "theirs")
    assert all(torch.equal(mine, other) for mine, other in zip(model.parameters(), back.parameters()))
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    back = fastlm.GPT2.from_pretrained(tmp_path / "shards")
    assert all(torch.equal(mine, other) for mine, other in zip(model.parameters(), back.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)
def test_124m_at_1024_tokens(backend, tell):
    model = parity.make(vocab_size=50257)
    tokens, targets = parity.batch(model, 1, 1024)
    targets[0, 700:] = -100
    ours, eager, sdpa = (
        parity.step(net, tokens, targets)
        for net in (model, parity.twin(model, "eager"), parity.twin(model, "sdpa"))
    )
    hold("124M", backend, ours, eager, sdpa, tell)
