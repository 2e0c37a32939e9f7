"""The generator: the cache, the draws, the limits, the command."""

import os
import subprocess
import sys

import pytest
import torch

import fastlm
from fastlm.data.tokenizer import Tokenizer
from fastlm.generation import KVCache, stream_tokens
from fastlm.generation.sampling import choose, uniforms


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = fastlm.GPT2(fastlm.GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path, tokenizer=Tokenizer.bytes())
    return path


PROMPTS = [torch.tensor([5]), torch.arange(9), torch.tensor([200, 1, 30])]


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


def test_rows_reach_the_last_position(model):
    """Rows that end early wait at their length while others fill the context to the last position."""
    rows = model.generate([torch.zeros(60, dtype=torch.int64), torch.tensor([3])], max_length=64, temperature=0)
    alone = model.generate([torch.tensor([3])], max_length=64, temperature=0)
    assert [len(row) for row in rows] == [64, 64] and rows[1].tolist() == alone[0].tolist()


def test_a_seed_repeats_and_rows_do_not_disturb_each_other(model):
    options = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 40, "top_p": 0.95}
    one = model.generate(PROMPTS, seed=11, **options)
    assert [row.tolist() for row in one] == [row.tolist() for row in model.generate(PROMPTS, seed=11, **options)]
    assert [row.tolist() for row in one] != [row.tolist() for row in model.generate(PROMPTS, seed=12, **options)]
    assert one[0].tolist() == model.generate(PROMPTS[:1], seed=11, **options)[0].tolist()
    torch.manual_seed(5)
    first = model.generate(PROMPTS, **options)
    torch.manual_seed(5)
    assert [row.tolist() for row in first] == [row.tolist() for row in model.generate(PROMPTS, **options)]


def test_stopping(model):
    plain = model.generate(PROMPTS, max_new_tokens=8, temperature=0)
    stop = int(plain[1][len(PROMPTS[1]) + 2])
    for row, full, prompt in zip(
        model.generate(PROMPTS, max_new_tokens=8, temperature=0, stop_at=stop), plain, PROMPTS
    ):
        new = full[len(prompt) :].tolist()
        wanted = new[: new.index(stop) + 1] if stop in new else new
        assert row[len(prompt) :].tolist() == wanted


def test_streaming_gives_the_same_tokens(model):
    steps = list(stream_tokens(model, PROMPTS, max_new_tokens=5, seed=1))
    rows = model.generate(PROMPTS, max_new_tokens=5, seed=1)
    assert [list(column) for column in zip(*steps)] == [row[-5:].tolist() for row in rows]
    assert not model.training


def test_draws_follow_the_distribution():
    """Chi-square over 8 classes and 20,000 draws; 24.3 is exceeded by chance once in a thousand."""
    logits = torch.tensor([[0.1, -1.0, 2.0, 0.5, 1.0, -0.3, 0.0, 1.5]])
    n, temperature = 20_000, 0.7
    drawn = choose(logits.expand(n, 8), temperature, None, None, uniforms(7, n, 1, "cpu")[:, 0])
    counts = torch.bincount(drawn, minlength=8)
    expected = torch.softmax(logits[0] / temperature, 0) * n
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3


def test_top_k_and_top_p():
    p = torch.tensor([[0.05, 0.4, 0.3, 0.15, 0.1]])
    draws = uniforms(0, 2000, 1, "cpu")[:, 0]

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
    with pytest.raises(RuntimeError, match="row 1 hold NaN or infinity"):
        choose(logits, 1.0, None, None, torch.zeros(2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="row 0"):
        choose(torch.full((1, 5), float("-inf")), 0, None, None, None)


def test_extreme_draws_stay_inside():
    logits = torch.full((2, 50257), -30.0)
    logits[:, 7] = 0.0
    ids = choose(logits, 0.01, None, None, torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64))
    assert ids.tolist() == [7, 7]


@pytest.mark.parametrize(
    "tokens, options, told",
    [
        ([], {}, "hold no prompt"),
        ([torch.tensor([], dtype=torch.int64)], {}, "prompt 0 is empty"),
        (torch.zeros(3, dtype=torch.int64), {}, "wanted \\(B, T\\) or a list"),
        ([torch.tensor([1, 257])], {}, "token id 257, wanted 0 ≤ id < vocab_size 257"),
        ([torch.tensor([0.5])], {}, "prompt 0 is torch.float32"),
        (PROMPTS, {"max_new_tokens": 60}, "prompt 1 has 9 tokens, with 60 new .* n_positions=64"),
        (PROMPTS, {"max_length": 9}, "prompt 1 has 9 tokens, none left"),
        (PROMPTS, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (PROMPTS, {"max_new_tokens": 3, "max_length": 30}, "got both"),
        (PROMPTS, {"temperature": -0.1}, "temperature is -0.1"),
        (PROMPTS, {"temperature": float("nan")}, "temperature is nan"),
        (PROMPTS, {"top_k": 0}, "top_k is 0"),
        (PROMPTS, {"top_p": 1.5}, "top_p is 1.5"),
        (PROMPTS, {"num_return_sequences": 0}, "num_return_sequences is 0"),
        (PROMPTS, {"seed": -1}, "seed is -1"),
    ],
)
def test_bad_input(model, tokens, options, told):
    with pytest.raises(ValueError, match=told):
        model.generate(tokens, **options)


def test_text(model):
    tokenizer = Tokenizer.bytes()
    text = fastlm.generate(model, tokenizer, "Hello", max_new_tokens=5, seed=0)
    assert text.startswith("Hello")
    both = fastlm.generate(model, tokenizer, ["Hello", "a"], max_new_tokens=5, seed=0)
    assert both[0] == text and both[1].startswith("a")
    five = fastlm.generate(model, tokenizer, "Hello, I am", max_length=50, num_return_sequences=5, seed=0)
    assert len(five) == 5 and len(set(five)) == 5
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        fastlm.generate(model, tokenizer, ["a", ""])


