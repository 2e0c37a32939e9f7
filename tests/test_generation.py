"""The generator: the cache, the draws, the limits, text."""

import copy
import sys
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm import dispatch, fast_path
from fastlm.backends.philox import philox
from fastlm.data.tokenizer import Tokenizer
from fastlm.dispatch.forcing import forced
from fastlm.dispatch.table import TABLE, forget
from fastlm.generation import KVCache, step, stream_tokens
from fastlm.generation.sampling import BAD, choose, uniforms

LOOP = sys.modules["fastlm.generation.generate"]  # the package has a function of that name


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = fastlm.GPT2(fastlm.GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


PROMPTS = [torch.tensor([5]), torch.arange(9), torch.tensor([200, 1, 30])]


def lists(rows):
    return [row.tolist() for row in rows]


@pytest.mark.parametrize("name", ["torch", "cpu", "reference"])
def test_the_forced_backend_runs_and_stays_forced(model, name):
    if (reason := dispatch.why_not("decode_attention", name)) is not None:
        pytest.skip(reason)
    with fastlm.use(name), dispatch.record() as calls:
        model.generate(PROMPTS, max_new_tokens=3)
        assert forced("attention") == name
    L = model.config.n_layer
    assert dict(calls) == {
        ("cache_append_", name): 3 * L, ("attention_qkv_fwd", name): L, ("decode_attention", name): 2 * L,
        ("bias_gelu_fwd", name): 3 * L, ("layer_norm_fwd", name): 3 * (2 * L + 1),
    }


@pytest.mark.parametrize("counts", [1, 2, 7])
def test_cached_logits_equal_uncached(model, counts):
    tokens = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = model(tokens)[0]
        cache = KVCache(model.config, 2, 40, device="cpu", dtype=torch.float32, page=8)
        for start, stop in [(0, 5)] + [(at, min(at + counts, 40)) for at in range(5, 40, counts)]:
            n = torch.full((2,), stop - start, dtype=torch.int32)
            positions = cache.begin(n, stop - start)
            logits = model.lm_head(model.hidden(tokens[:, start:stop], positions=positions, cache=cache))
            cache.end()
            torch.testing.assert_close(logits, whole[:, start:stop], rtol=1e-4, atol=1e-4)


SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 2, "stop_at": 7}


@pytest.mark.parametrize("options", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
def test_a_captured_step_gives_the_same_tokens(model, monkeypatch, options):
    """With a stand-in for the CUDA graph; outside of it nothing is allocated."""
    options = {**options, "max_new_tokens": 12, "num_return_sequences": 2}
    monkeypatch.setattr(LOOP, "serving", lambda model: (None, "the step as on a GPU is tried here"))
    wanted = lists(model.generate(PROMPTS, **options))
    replays, outside = [], Allocations()

    def repeat(run):
        run()  # before the capture, without effect

        def replay():
            replays.append(run)
            with outside.off():
                run()

        return replay

    class CapturedStep(step.Step):
        def __init__(self, *arguments, captured):
            assert not captured, "there is no GPU to capture on"
            super().__init__(*arguments, captured=True)

        def __call__(self):
            with outside:
                return super().__call__()

    monkeypatch.setattr(step, "capture", repeat)
    monkeypatch.setattr(LOOP, "Step", CapturedStep)
    assert lists(model.generate(PROMPTS, **options)) == wanted
    assert outside.watched >= len(replays) and not outside.made
    assert len(replays) == max(map(len, wanted_new(wanted))) - 1


def wanted_new(rows):
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    return [row[len(prompt) :] for prompt, row in zip(prompts, rows)]


class Allocations(TorchDispatchMode):
    """The names of torch's operations under it whose result is not in the memory of an argument."""

    def __init__(self):
        super().__init__()
        self.made, self.watched, self._seeing = [], 0, True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self._seeing:
            self.watched += 1
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if result.untyped_storage().data_ptr() not in given:
                self.made.append(str(func))
        return result

    @contextmanager
    def off(self):
        self._seeing = False
        try:
            yield
        finally:
            self._seeing = True


def test_a_padded_head_gives_the_same_logits():
    model = fastlm.GPT2(fastlm.GPT2Config(vocab_size=131, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    hidden = torch.randn(3, 16)
    padded = step.head_of(model, padded=True)(hidden)
    assert padded.shape == (3, 131) and torch.allclose(padded, model.lm_head(hidden), atol=1e-6)
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert step.head_of(model, padded=True) is model.lm_head
    handle.remove()
    assert step.head_of(model, padded=False) is model.lm_head


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cuda_graph_gives_the_same_tokens(dtype, options):
    torch.manual_seed(3)
    config = fastlm.GPT2Config(vocab_size=257, n_positions=64, n_embd=128, n_layer=2, n_head=2)
    model, options = fastlm.GPT2(config).eval().to("cuda", dtype), {**options, "max_new_tokens": 20}
    graphed = lists(model.generate(PROMPTS, **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LOOP, "WORTH_CAPTURING", 1000)
        assert lists(model.generate(PROMPTS, **options)) == graphed


@pytest.mark.parametrize("training", [False, True])
def test_warmup_chooses_every_kernel_and_changes_nothing(training):
    config = fastlm.GPT2Config(vocab_size=31, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    model = fastlm.GPT2(config).train(training)
    before, state = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    forget()
    assert fastlm.warmup(model, [(2, 16), (1, 1)]) > 0
    chosen = {name for name, row in TABLE.items() if row.chosen}
    used = {"attention_qkv_fwd", "bias_gelu_fwd", "layer_norm_fwd"} | ({
        "softmax_xent_fwd", "softmax_xent_bwd", "attention_qkv_bwd", "bias_gelu_bwd", "layer_norm_bwd",
        "linear_xent_grad",
    } if training else {"cache_append_", "decode_attention"})
    whole = {"gpt2_blocks_fwd", "gpt2_blocks_bwd"}  # on a CPU, where there is no dropout
    assert chosen - whole == used and bool(chosen & whole) == (
        not training and fast_path.whole_why_not(model, torch.ones(1)) is None)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters()))
    assert all(p.grad is None for p in model.parameters()) and torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match=r"warmup: shape is \(2, 17\), wanted .* n_positions 16"):
        fastlm.warmup(model, [(2, 17)])


def test_results_hold_prompt_and_no_pads(model):
    results = model.generate(PROMPTS, max_new_tokens=6, seed=0, num_return_sequences=2)
    assert len(results) == 6
    for row, prompt in zip(results, [prompt for prompt in PROMPTS for _ in range(2)]):
        assert row.dtype == torch.int64 and len(row) == len(prompt) + 6 and torch.equal(row[: len(prompt)], prompt)
    assert results[0].tolist() != results[1].tolist()


def test_a_tensor_of_prompts(model):
    batch = torch.randint(257, (3, 5))
    assert [len(row) for row in model.generate(batch, max_new_tokens=2)] == [7, 7, 7]
    assert [len(row) for row in model.generate(PROMPTS, max_length=12)] == [12, 12, 12]
    assert [len(row) for row in model.generate([[5], range(60)])] == [51, 64]  # 50 new ones, or what fits
    assert lists(model.generate([[5], (1, 2)], temperature=0)) == lists(
        model.generate([torch.tensor([5], dtype=torch.int32), torch.tensor([1, 2])], temperature=0)
    )


def test_rows_reach_the_last_position(model):
    """Rows that end early wait at their length while others fill the context to the last position."""
    rows = model.generate([torch.zeros(60, dtype=torch.int64), torch.tensor([3])], max_length=64, temperature=0)
    alone = model.generate([torch.tensor([3])], max_length=64, temperature=0)
    assert [len(row) for row in rows] == [64, 64] and rows[1].tolist() == alone[0].tolist()


def test_a_seed_repeats_and_rows_do_not_disturb_each_other(model):
    options = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 40, "top_p": 0.95}
    one = lists(model.generate(PROMPTS, seed=11, **options))
    assert one == lists(model.generate(PROMPTS, seed=11, **options))
    assert one != lists(model.generate(PROMPTS, seed=12, **options))
    assert one != lists(model.generate(PROMPTS, seed=11 + 2**32, **options))
    assert one[:1] == lists(model.generate(PROMPTS[:1], seed=11, **options))
    assert one == lists(model.generate(PROMPTS, seed=11, num_return_sequences=3, **options)[::3])
    torch.manual_seed(5)
    first = lists(model.generate(PROMPTS, **options))
    assert first != lists(model.generate(PROMPTS, **options))
    torch.manual_seed(5)
    assert first == lists(model.generate(PROMPTS, **options))


def test_draws_do_not_depend_on_the_batch():
    logits = torch.randn(40, 1000, generator=torch.Generator().manual_seed(0))
    draws = uniforms(3, 40, 1, 1, "cpu")[:, 0]
    together = choose(logits, 0.8, 50, 0.9, draws).tolist()
    assert together == [int(choose(logits[r : r + 1], 0.8, 50, 0.9, draws[r : r + 1])) for r in range(40)]


def test_dropout_is_off_and_the_mode_comes_back(model):
    wanted = lists(model.generate(PROMPTS, max_new_tokens=5, temperature=0))
    try:
        model.train()
        model.transformer.h[1].eval()
        mode = [module.training for module in model.modules()]
        assert lists(model.generate(PROMPTS, max_new_tokens=5, temperature=0)) == wanted
        assert mode == [module.training for module in model.modules()]
        # Two texts at once: the first to end does not switch dropout on for the other.
        short = stream_tokens(model, PROMPTS[:1], max_new_tokens=2, temperature=0)
        long = stream_tokens(model, PROMPTS, max_new_tokens=5, temperature=0)
        first = next(short)
        steps = [next(long)]
        assert [first, *short] == [[token] for token in wanted[0][1:3]]
        steps += long
        assert [list(column) for column in zip(*steps)] == [row[-5:] for row in wanted]
        assert mode == [module.training for module in model.modules()]
    finally:
        model.eval()


def test_under_autocast(model):
    plain = lists(model.generate(PROMPTS, max_new_tokens=5, temperature=0))
    with torch.autocast("cpu", torch.bfloat16):
        assert lists(model.generate(PROMPTS, max_new_tokens=5, temperature=0)) == plain


def test_bf16(model):
    half = fastlm.GPT2(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    assert [len(row) for row in half.generate(PROMPTS, max_new_tokens=5, seed=0)] == [6, 14, 8]


def test_stopping(model):
    plain = model.generate(PROMPTS, max_new_tokens=8, temperature=0)
    stop = int(plain[1][len(PROMPTS[1]) + 2])
    for row, full, prompt in zip(
        model.generate(PROMPTS, max_new_tokens=8, temperature=0, stop_at=stop), plain, PROMPTS
    ):
        new = full[len(prompt) :].tolist()
        wanted = new[: new.index(stop) + 1] if stop in new else new
        assert row[len(prompt) :].tolist() == wanted


def test_stopping_at_the_models_end_of_text(model):
    greedy = {"max_new_tokens": 8, "temperature": 0}
    plain = lists(model.generate(PROMPTS, **greedy))
    end = plain[0][2]
    other = fastlm.GPT2(model.config.model_copy(update={"eos_token_id": end})).eval()
    other.load_state_dict(model.state_dict())
    first = other.generate(PROMPTS, **greedy)[0].tolist()
    assert first == plain[0][: plain[0].index(end, 1) + 1]
    assert lists(other.generate(PROMPTS, stop_at=None, **greedy)) == plain


def test_streaming_gives_the_same_tokens(model):
    steps = list(stream_tokens(model, PROMPTS, max_new_tokens=5, seed=1))
    rows = model.generate(PROMPTS, max_new_tokens=5, seed=1)
    assert [list(column) for column in zip(*steps)] == [row[-5:].tolist() for row in rows]
    assert not model.training


def test_draws_follow_the_distribution():
    """Chi-square over 8 classes and 20,000 draws; 24.3 is exceeded by chance once in a thousand."""
    logits = torch.tensor([[0.1, -1.0, 2.0, 0.5, 1.0, -0.3, 0.0, 1.5]])
    n, temperature = 20_000, 0.7
    drawn = choose(logits.expand(n, 8), temperature, None, None, uniforms(7, n, 1, 1, "cpu")[:, 0])
    counts = torch.bincount(drawn, minlength=8)
    expected = torch.softmax(logits[0] / temperature, 0) * n
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3


def test_top_k_and_top_p():
    p = torch.tensor([[0.05, 0.4, 0.3, 0.15, 0.1]])
    draws = uniforms(0, 2000, 1, 1, "cpu")[:, 0]

    def support(**options):
        given = {"top_k": None, "top_p": None, **options}
        return set(choose(p.log().expand(2000, 5), 1.0, given["top_k"], given["top_p"], draws).tolist())

    assert support() == {0, 1, 2, 3, 4}
    assert support(top_k=2) == {1, 2} and support(top_k=9) == {0, 1, 2, 3, 4}
    assert support(top_p=0.6) == {1, 2} and support(top_p=0.75) == {1, 2, 3} and support(top_p=0.01) == {1}
    assert support(top_k=3, top_p=0.8) == {1, 2}  # after top_k, 1 and 2 hold 0.82
    assert support(top_p=1.0) == {0, 1, 2, 3, 4}


def test_greedy_takes_the_lowest_of_equals():
    assert choose(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]), 0, None, None, None).tolist() == [1, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_distribution(value):
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    draws = torch.zeros(2, dtype=torch.float64)
    for temperature, top_k, top_p in [(1.0, None, None), (1.0, 2, 0.9), (0, None, None)]:
        assert choose(logits, temperature, top_k, top_p, draws).tolist() == [0, BAD]
    assert choose(torch.full((1, 5), float("-inf")), 0, None, None, None).tolist() == [BAD]


def test_a_model_gone_bad_is_told(model):
    """A row that has ended no longer counts."""
    bad = copy.deepcopy(model)
    with torch.no_grad():
        bad.transformer.wpe.weight[9:] = float("nan")
    options = {"max_new_tokens": 6, "temperature": 0}
    assert [len(row) for row in bad.generate(PROMPTS[:1], **options)] == [7]
    with pytest.raises(RuntimeError, match="the logits of row 1 hold NaN or infinity; are the model's weights good"):
        bad.generate(PROMPTS, **options)
    assert [len(row) for row in bad.generate(PROMPTS[:2], max_length=10, temperature=0)] == [10, 10]


def test_extreme_draws_stay_inside():
    logits = torch.full((2, 50257), -30.0)
    logits[:, 7] = 0.0
    ids = choose(logits, 0.01, None, None, torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64))
    assert ids.tolist() == [7, 7]
    ends = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(2, 4)
    assert choose(ends, 1.0, None, None, torch.tensor([0.0, 1.0 - 2**-53]).double()).tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [5e-324, 1e-50, 1e-9])
def test_the_smallest_temperatures_are_greedy(temperature):
    """In fp32 1e-50 is 0, and 0 / 0 gave the last id of the vocabulary."""
    draws = torch.tensor([0.0, 0.999], dtype=torch.float64)
    assert choose(torch.tensor([[0.0, 5.0, 1.0]]).expand(2, 3), temperature, 2, 0.9, draws).tolist() == [1, 1]
    assert choose(torch.tensor([[0.0, 5.0]]).expand(2, 2), 1e300, None, None, draws).tolist() == [0, 1]


def test_uniforms_have_53_bits():
    """Made of two words of Philox without a rounding to fp32, which could give 1."""
    zero = torch.zeros((), dtype=torch.int64)
    words = philox((zero + 4, zero + 1, zero + 2, zero), (zero + 9, zero + 1))[:2]
    high, low = (int(word) for word in words)
    drawn = uniforms(9 + 2**32, 3, 2, 5, "cpu")
    assert drawn.shape == (6, 5) and float(drawn[5, 4]) == ((high >> 5 << 26) | (low >> 6)) / 2**53
    assert float(drawn.max()) < 1 and bool((uniforms(0, 50, 1, 50, "cpu") * 2**32 % 1 != 0).all())


@pytest.mark.parametrize(
    "tokens, options, told",
    [
        ([], {}, "hold no prompt"),
        ([torch.tensor([], dtype=torch.int64)], {}, "prompt 0 is empty"),
        (torch.zeros(0, 4, dtype=torch.int64), {}, "hold no prompt"),
        (torch.zeros(2, 0, dtype=torch.int64), {}, "prompt 0 is empty"),
        (torch.zeros(3, dtype=torch.int64), {}, "wanted \\(B, T\\) or a list"),
        ([1, 2, 3], {}, "prompt 0 is 1, wanted token ids"),
        (["text"], {}, "prompt 0 is 'text', wanted token ids.*fastlm.generate"),
        ("text", {}, "tokens are str"),
        (None, {}, "tokens are NoneType"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1.5]], {}, "token id 1.5, wanted whole numbers"),
        ([[2**70]], {}, "token id 1180591620717411303424"),
        ([torch.tensor([1, -1])], {}, "token id -1"),
        ([torch.tensor([1, 257])], {}, "token id 257, wanted whole numbers 0 ≤ id < vocab_size 257"),
        ([torch.tensor([0.5])], {}, "prompt 0 is torch.float32"),
        (PROMPTS, {"max_new_tokens": 60}, "prompt 1 has 9 tokens, with 60 new .* n_positions=64"),
        ([[1] * 64], {}, "prompt 0 has 64 tokens, with 1 new ones 65, .* n_positions=64"),
        (PROMPTS, {"max_length": 9}, "prompt 1 has 9 tokens, wanted fewer than max_length=9"),
        (PROMPTS, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (PROMPTS, {"max_new_tokens": 3, "max_length": 30}, "got both"),
        (PROMPTS, {"temperature": -0.1}, "temperature is -0.1"),
        (PROMPTS, {"temperature": float("nan")}, "temperature is nan"),
        (PROMPTS, {"top_k": 0}, "top_k is 0"),
        (PROMPTS, {"top_p": 1.5}, "top_p is 1.5"),
        (PROMPTS, {"top_p": 0}, "top_p is 0"),
        (PROMPTS, {"top_p": float("nan")}, "top_p is nan"),
        (PROMPTS, {"num_return_sequences": 0}, "num_return_sequences is 0"),
        (PROMPTS, {"num_return_sequences": 1.5}, "num_return_sequences is 1.5"),
        (PROMPTS, {"seed": -1}, "seed is -1"),
        (PROMPTS, {"seed": 1.5}, "seed is 1.5"),
        (PROMPTS, {"seed": 2**64}, "seed is 18446744073709551616"),
        (PROMPTS, {"stop_at": 257}, "stop_at is 257, wanted a token id below vocab_size 257"),
        (PROMPTS, {"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_bad_input(model, tokens, options, told):
    with dispatch.record() as calls, pytest.raises(ValueError, match=told):
        model.generate(tokens, **options)
    assert not calls  # nothing was computed


def test_text(model):
    tokenizer = Tokenizer.bytes()
    text = fastlm.generate(model, tokenizer, "Hello", max_new_tokens=5, seed=0)
    assert text.startswith("Hello")
    both = fastlm.generate(model, tokenizer, ["Hello", "a"], max_new_tokens=5, seed=0)
    assert both[0] == text and both[1].startswith("a")
    five = fastlm.generate(model, tokenizer, "Hello, I am", max_length=50, num_return_sequences=5, seed=0)
    assert len(five) == 5 and len(set(five)) == 5
    pairs = fastlm.generate(model, tokenizer, ["a", "b"], num_return_sequences=2)
    assert [[text[0] for text in pair] for pair in pairs] == [["a", "a"], ["b", "b"]]
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        fastlm.generate(model, tokenizer, ["a", ""])
    with pytest.raises(ValueError, match="hold no prompt"):
        fastlm.generate(model, tokenizer, [])
    with pytest.raises(TypeError, match="texts are bytes"):
        fastlm.generate(model, tokenizer, b"Hello")


def test_text_ends_with_the_tokenizers_end(model):
    """A config without an end of text leaves it to the tokenizer; the token is not part of the text."""
    tokenizer = Tokenizer.bytes()
    options = {"num_return_sequences": 60, "seed": 1, "temperature": 3.0}
    texts = fastlm.generate(model, tokenizer, "Hello", **options)
    rows = model.generate([tokenizer.encode("Hello")], stop_at=256, **options)
    ended = [int(row[-1]) == 256 for row in rows]
    assert any(ended) and not all(ended)
    assert texts == [tokenizer.decode(row[:-1] if end else row) for row, end in zip(rows, ended)]


def test_ids_that_the_tokenizer_lacks_are_not_drawn():
    """A padded vocabulary: the model has 128 ids, the tokenizer 3."""
    config = fastlm.GPT2Config(vocab_size=128, n_positions=64, n_embd=16, n_layer=1, n_head=1)
    assert set(fastlm.generate(fastlm.GPT2(config), Tokenizer.chars("abc"), "ab", seed=0)) == set("abc")


