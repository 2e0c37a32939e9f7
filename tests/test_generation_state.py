"""What generation keeps and what is around it: weights that change, torch's defaults, other threads, modes."""

import threading

import pytest
import torch
import torch.nn.functional as F
from test_fast_path import TOKENS, Adapter, each, greedy, greedy_by_hand, make, two_threads, untold  # noqa: F401
from torch import nn

import fastlm
from fastlm.generation import derived, engine, perplexity
from fastlm.generation.inference import inference


def by_data(model):
    model.transformer.wte.weight.data[TOKENS[0, -1]] = 3.0


def by_numpy(model):
    model.transformer.h[0].mlp.c_fc.weight.detach().numpy()[:] *= -1


def one_number(model):
    model.transformer.h[1].attn.c_proj.weight.data[5, 7] += 40


def one_bias(model):
    model.transformer.ln_f.bias.data[3] += 40


def assigned(model):
    state = {name: -tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def rows_swapped(model):
    weight = model.transformer.h[0].attn.c_attn.weight.data
    weight[:] = weight.flip(0).clone()


STALE = by_data, by_numpy, one_number, one_bias, assigned, rows_swapped


@pytest.mark.parametrize("change", STALE, ids=lambda change: change.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_changes_of_weights_count_from_the_next_call(change, dtype):
    if (change, dtype) == (by_numpy, torch.bfloat16):
        pytest.skip("numpy has no bfloat16")
    model = make().to(dtype)
    before = engine.packed(model)
    assert engine.packed(model) is before
    change(model)
    after = engine.packed(model)
    assert after is not before
    if dtype == torch.float32:
        assert greedy(model) == greedy_by_hand(model, TOKENS, 8)


class Weighted(nn.Module):
    """Stands for a model: what is derived from it is kept as long as it lives."""


@pytest.mark.parametrize("shape", [(300, 1024), (257, 384), (64, 2400), (2048, 7), (500, 47 * 16)], ids=str)
def test_a_short_call_sees_rows_and_columns(shape, monkeypatch):
    """Of large weights; and of single numbers it sees each within 47 calls, or in a long one."""
    monkeypatch.setattr(derived, "FEW", 0)
    weight, model, made = torch.randn(shape), Weighted(), []

    def stale(whole=False):
        before = len(made)
        derived.of(model, [weight], lambda: made.append(1), note=None, whole=whole)
        return len(made) > before

    assert stale() and not any(stale() for _ in range(50))
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        row, column = (int(torch.randint(n, (), generator=generator)) for n in shape)
        for data in (weight.numpy()[row], weight.numpy()[:, column], weight.numpy()):
            data += 1
            assert stale() and not stale()
        weight.numpy()[row, column] += 1
        assert stale(whole=True) and not stale(whole=True)
        weight.numpy()[row, column] += 1
        assert any(stale() for _ in range(47)) and not stale(whole=True)


def test_checksums_do_not_depend_on_threads():
    tensors = [torch.randn(n) for n in (1, 15, 17, 1000, 700_001)]
    from fastlm.backends import native

    spans = torch.tensor([[t.data_ptr(), t.nbytes, apart] for t, apart in zip(tensors, (1, 1, 1, 3, 47))])
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(native.cpu.checksum(spans))
        assert [native.cpu.checksum(spans, only=k)[k] for k in range(47)] == found[-1]
    assert found[0] == found[1] == found[2]
    tensors[1].numpy()[14] += 1
    assert native.cpu.checksum(spans) != found[0]
    lines = tensors[4].view(torch.int32).numpy()[: 96 * 16].reshape(96, 16)
    before, lines[:48] = native.cpu.checksum(spans), lines[[47, *range(1, 47), 0]]
    assert native.cpu.checksum(spans) != before  # lines of one sum that changed places


# ---- memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("path", ["engine", "step"])
def test_torchs_default_dtype_changes_nothing(dtype, path):
    model = make()

    def results():
        with fastlm.use(decode_attention="torch") if path == "step" else fastlm.use():
            drawn = [row.tolist() for row in model.generate([[1, 2, 3], [4]], max_new_tokens=9, seed=3, top_k=40,
                                                            num_return_sequences=2, stop_at=None)]
            every = perplexity.perplexity(model, list(range(70)))
            model.zero_grad()
            loss = model.loss(TOKENS, TOKENS)
            loss.backward()
            return greedy(model), drawn, every, loss.item(), [p.grad.to_dense() for p in model.parameters()]

    *wanted, gradients = results()
    torch.set_default_dtype(dtype)
    try:
        *got, others = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert got == wanted and all(torch.equal(*pair) for pair in zip(gradients, others))


@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("path", ["engine", "step"])
def test_torchs_default_device_changes_nothing(path, size, seed):
    model = make()

    def results():
        torch.manual_seed(5)
        with fastlm.use(decode_attention="torch") if path == "step" else fastlm.use():
            return [row.tolist() for row in model.generate([[1, 2, 3], [4]], max_new_tokens=9, seed=seed, stop_at=None,
                                                           batch_size=size)]

    wanted = results()
    torch.set_default_device("meta")
    try:
        got = results()
    finally:
        torch.set_default_device(None)
    assert got == wanted


@pytest.mark.parametrize("what", ["vocab_size", "n_positions"])
@pytest.mark.filterwarnings("ignore")
def test_a_config_that_says_more_than_there_is(what):
    model = make()
    sizes = dict(vocab_size=300, n_positions=64) | {what: 10_000}
    model.config = fastlm.GPT2Config(n_embd=64, n_layer=2, n_head=4, eos_token_id=None, bos_token_id=None, **sizes)
    assert "but config has" in engine.why_not(model)
    with pytest.raises((IndexError, ValueError)):
        model.generate([[9_999]] if what == "vocab_size" else [[1] * 60], max_new_tokens=20)


def test_weights_that_are_replaced_between_two_tokens():
    """What a stream reads stays where it was."""
    model = make()
    wanted = greedy(model, [[1, 2, 3]], 20)[0][3:]
    stream, got = fastlm.generation.stream_tokens(model, [[1, 2, 3]], max_new_tokens=20, temperature=0), []
    for new in stream:
        got += new
        for parameter in model.parameters():
            parameter.data = torch.full_like(parameter, float("nan"))
    assert got == wanted


# ---- threads and modes


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("case", ["plain", "hooked", "adapter"])
@pytest.mark.filterwarnings("ignore")
def test_generation_touches_no_mode_and_drops_nothing(case):
    model = make(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    seen = []
    if case == "hooked":
        model.transformer.h[0].mlp.register_forward_hook(lambda module, *_: seen.append(modes(model)))
    if case == "adapter":
        each(model, "mlp.c_fc", lambda conv: Adapter(conv, dropout=0.5))
    model.eval()
    wanted, told = greedy(model), perplexity.perplexity(model, list(range(70)))
    model.train()
    model.transformer.h[1].eval()
    before = modes(model)
    stream = fastlm.generation.stream_tokens(model, TOKENS, max_new_tokens=8, temperature=0, stop_at=None)
    for row, new in enumerate(zip(*stream)):
        assert list(new) == wanted[row][12:]
    assert perplexity.perplexity(model, list(range(70))) == pytest.approx(told)
    assert modes(model) == before and all(found in (before, modes(model.eval())) for found in seen)


@pytest.mark.parametrize("path", ["engine", "step"])
@pytest.mark.filterwarnings("ignore")
def test_threads_that_generate_while_one_trains(path):
    model = make(attn_pdrop=0.5)  # whose mask a seed names
    if path == "step":
        model.transformer.h[0].register_forward_hook(lambda *_: None)
    wrong, losses, stop = [], [], threading.Event()

    def written(seed):
        rows = model.generate(TOKENS[:, : 1 + seed % 12], max_new_tokens=8, seed=seed, num_return_sequences=2)
        return [row.tolist() for row in rows]

    wanted = [written(seed) for seed in range(50)]

    def generate():
        for seed in range(50):
            if (got := written(seed)) != wanted[seed]:
                wrong.append((seed, got))

    def train():
        while not stop.is_set():
            model.train()
            for _ in range(20):
                model.zero_grad()
                loss = model.loss(TOKENS, TOKENS, seed=torch.arange(4))
                loss.backward()
                losses.append((float(loss.detach()), float(model.transformer.wte.weight.grad.norm())))
                if not all(modes(model)):
                    wrong.append("a mode")
            model.eval()

    trainer = threading.Thread(target=train)
    threads = [threading.Thread(target=generate) for _ in range(2)]
    trainer.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    trainer.join()
    assert not wrong and len(set(losses)) == 1 < len(losses)


def test_evaluation_is_this_threads_alone():
    x, found = torch.ones(1000), []
    with inference(make()):
        assert torch.equal(F.dropout(x, 0.5, True), x) and torch.equal(F.dropout(x, training=True), x)
        assert torch.equal(nn.Dropout(0.5).train()(x), x) and torch.equal(nn.AlphaDropout().train()(x), x)
        thread = threading.Thread(target=lambda: found.append(F.dropout(x, 0.5, True)))
        thread.start()
        thread.join()
        q = torch.randn(1, 1, 8, 4)
        a, b = (F.scaled_dot_product_attention(q, q, q, dropout_p=0.5) for _ in range(2))
        assert torch.equal(a, b)
    assert (found[0] == 0).any() and (F.dropout(x, 0.5, True) == 0).any()
