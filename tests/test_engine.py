"""The engine against the model's own forward, its reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import two_threads_for

import fastlm
from fastlm.backends.machine import machine_why_not
from fastlm.generation import KVCache, engine, sampling, step
from fastlm.gpt2 import MLP, Conv1D
from fastlm.measure import cuts, tuned
from fastlm.measure.numerics import norm_ratio
from fastlm.quantised import dequantise, quantise, quantise_

if (reason := machine_why_not("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

LOOP = sys.modules["fastlm.generation.generate"]  # the package has a function of that name
SIZES = {  # vocabulary, C, H, L, inner: no multiples of what the kernels work in, and whole ones
    "odd": (97, 18, 3, 2, 50), "even": (257, 64, 2, 3, None), "one panel": (16, 16, 1, 1, 16),
}
WIDE = {"wide": (97, 192, 3, 1, 3072)}
PROMPTS = [torch.arange(n) % 16 for n in (1, 7, 3, 20, 5)]


@pytest.fixture(autouse=True)
def two_threads():
    with two_threads_for("cpu"):
        yield


@pytest.fixture(params=SIZES)
def model(request):
    return make(request.param)


def make(name):
    V, C, H, L, inner = (SIZES | WIDE)[name]
    torch.manual_seed(3)
    model = fastlm.GPT2(fastlm.GPT2Config(vocab_size=V, n_positions=64, n_embd=C, n_layer=L, n_head=H, n_inner=inner,
                                          bos_token_id=None, eos_token_id=None)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.dim() == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def prefilled(model, B, T, page):
    """A cache with T - 1 tokens, and the tokens (B, T); row 1 is shorter by 4."""
    tokens = torch.randint(16, (B, T), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.config, B, T + 2, device="cpu", dtype=model.dtype, page=page)
    counts = torch.full((B,), T - 1, dtype=torch.int32)
    counts[1:2] -= 4
    with torch.inference_mode():
        model.hidden(tokens[:, :-1], positions=cache.begin(counts, T - 1), cache=cache)
        cache.end()
    return cache, tokens


def decoded(model, B=3, T=37, page=8):
    """Logits of the model's own forward and of the engine, and both caches afterwards; row 1 waits."""
    counts = torch.ones(B, dtype=torch.int32)
    counts[1] = 0
    with torch.inference_mode():
        cache, tokens = prefilled(model, B, T, page)
        hidden = model.hidden(tokens[:, -1:], positions=cache.begin(counts, 1), cache=cache)
        cache.end()
        wanted = model.lm_head(hidden[:, 0])
        again, _ = prefilled(model, B, T, page)
        got = engine.Engine(model, again)(tokens[:, -1:], counts).clone()
    return wanted[counts > 0], got[counts > 0], cache, again


@pytest.mark.parametrize("page", [8, 64])
@pytest.mark.parametrize("B", [2, 6, 12, 19])
def test_logits(model, B, page):
    """In fp32 within rounding of the model's; the lengths count, keys and values are appended, a waiting row is not."""
    wanted, got, cache, again = decoded(model, B=B, page=page)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(cache.lengths, again.lengths)
    for ours, theirs in zip(again.k_pages + again.v_pages, cache.k_pages + cache.v_pages):
        for b, length in enumerate(cache.lengths.tolist()):
            pages = cache.block_table[b].long()
            torch.testing.assert_close(ours[pages].flatten(0, 1)[:length], theirs[pages].flatten(0, 1)[:length],
                                       rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numerics(model, dtype):
    """Held to the policy: the reference's composition in the same dtype is the measure, fp64 the truth."""
    model = model.to(dtype)
    _, got, _, _ = decoded(model)
    with fastlm.use("reference"):
        composed = decoded(model)[0]
        truth = decoded_in_fp64(model)
    assert norm_ratio(got, composed, truth) <= 1


def decoded_in_fp64(model):
    with torch.inference_mode():
        model = make_double(model)
        cache, tokens = prefilled(model, 3, 37, 8)
        counts = torch.tensor([1, 0, 1], dtype=torch.int32)
        hidden = model.hidden(tokens[:, -1:], positions=cache.begin(counts, 1), cache=cache)
        return model.lm_head(hidden[:, 0])[counts > 0]


def make_double(model):
    twin = fastlm.GPT2(model.config).double().eval()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 3, "top_k": 9}, {"seed": 4, "top_p": 0.8}], ids=str)
def test_generation_picks_it_up(model, options, monkeypatch):
    options = {"max_new_tokens": 20, "stop_at": 3, "num_return_sequences": 2, **options}
    steps = []
    call = step.EngineStep.__call__
    monkeypatch.setattr(step.EngineStep, "__call__", lambda self: steps.append(1) or call(self))
    got = [row.tolist() for row in model.generate(PROMPTS, **options)]
    assert len(steps) >= 15
    monkeypatch.setattr(LOOP, "serving", lambda model: (None, "not now"))
    assert got == [row.tolist() for row in model.generate(PROMPTS, **options)]


SAMPLERS = [
    dict(temperature=0.0), dict(temperature=1.0), dict(temperature=0.7, top_k=1), dict(temperature=0.8, top_k=200),
    dict(temperature=1.3, top_k=20000), dict(temperature=1.0, top_p=0.9), dict(temperature=0.5, top_p=1e-9),
    dict(temperature=2.0, top_p=0.999), dict(temperature=1.0, top_k=50, top_p=0.6), dict(temperature=1e-9),
    dict(temperature=1e9, top_k=60000), dict(temperature=1e-300), dict(temperature=1e300),
]


@pytest.mark.parametrize("V", [1, 15, 16, 17, 511, 513, 50257])
@pytest.mark.parametrize("options", SAMPLERS, ids=str)
def test_draws(V, options):
    """The same tokens as the reference's, in fp64, but where u falls within rounding of a border."""
    generator = torch.Generator().manual_seed(V)
    B = 40
    sampler = sampling.Sampler(V, **{"top_k": None, "top_p": None, **options})
    logits = torch.randn(B, V + 3, generator=generator) * torch.linspace(0, 6, B)[:, None]
    logits[:, V:] = 1e9  # beyond the choices
    logits[1] = logits[1].round()  # equals
    logits[2, : V // 2] = float("-inf")
    uniform = torch.rand(B, 2, generator=generator, dtype=torch.float64)[:, 1]
    uniform[:3] = torch.tensor([0.0, 1 - 2**-53, 0.5])
    got = sampler(logits, uniform)
    wanted = sampling.choose(logits[:, :V], sampler.temperature, sampler.top_k, sampler.top_p, uniform)
    assert sorted(bordering(logits[:, :V], sampler, uniform, got, wanted)) == []
    assert int((got != wanted).sum()) <= 1


def bordering(logits, sampler, uniform, got, wanted):
    """The rows in which the two differ by more than rounding: both ids must be drawn by a u as near as 1e-5."""
    for row in (got != wanted).nonzero()[:, 0].tolist():
        near = (uniform[row] + torch.linspace(-1e-5, 1e-5, 101, dtype=torch.float64)).clamp(0, 1 - 2**-53)
        found = sampling.choose(logits[row].expand(len(near), -1), sampler.temperature, sampler.top_k, sampler.top_p,
                                near)
        if got[row] not in found or wanted[row] not in found:
            yield row


@pytest.mark.parametrize("bad", [[float("nan")], [float("inf")], None], ids=str)
def test_no_draw(bad):
    """A row that is no distribution gives BAD, wherever the number lies."""
    for V in (1, 16, 37, 1000):
        for at in {0, V // 2, V - 1}:
            logits = torch.randn(3, V)
            logits[1, at if bad else slice(None)] = bad[0] if bad else float("-inf")
            for options in SAMPLERS:
                sampler = sampling.Sampler(V, **{"top_k": None, "top_p": None, **options})
                got = sampler(logits, torch.full((3,), 0.3, dtype=torch.float64))
                assert (got == sampling.BAD).tolist() == [False, True, False]


def test_the_same_bits_whatever_the_threads():
    model, threads = make("even").bfloat16(), torch.get_num_threads()
    first = decoded(model, B=5)[1]
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(decoded(model, B=5)[1], first)
    finally:
        torch.set_num_threads(threads)


def test_a_row_does_not_depend_on_the_others():
    model = make("even")
    assert torch.equal(decoded(model, B=12)[1][0], decoded(model, B=3)[1][0])


def test_changed_weights_are_packed_anew():
    model = make("even")
    before = engine.packed(model)
    assert engine.packed(model) is before
    with torch.no_grad():
        model.transformer["h"][0].mlp.c_fc.weight.mul_(2)
    assert (again := engine.packed(model)) is not before
    model.transformer["wte"].weight.data.mul_(1.5)  # torch does not count this one
    assert engine.packed(model) is not again
    model.bfloat16()
    assert engine.packed(model).kind == "bf16"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("name", ["transformer.ln_f.bias", "transformer.h.1.mlp.c_proj.bias",
                                  "transformer.h.1.ln_2.bias", "transformer.h.1.mlp.c_fc.bias"])
def test_what_is_not_finite_is_not_lost(kind, value, name):
    model = make("even") if kind == "fp32" else quantise_(make("even"), kind)
    with torch.no_grad():
        model.get_parameter(name)[5] = value
    with pytest.raises(RuntimeError, match="hold NaN or infinity"):
        model.generate(PROMPTS, max_new_tokens=3)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("transposed", [False, True])
def test_quantised_weights(kind, transposed):
    w = torch.randn(150, 21).T.contiguous().T if transposed else torch.randn(150, 21)
    w[:, 3] = 0
    q, scale = quantise(w, kind)
    back = dequantise(q, scale)
    assert q.dtype == torch.int8 and q.abs().max() <= (127 if kind == "int8" else 8) and not back[:, 3].any()
    step = scale.abs().max() if kind == "int8" else scale.abs().repeat_interleave(64, 0)[:150]
    assert ((back - w).abs() <= step * (0.5 if kind == "int8" else 1.0) * 1.001).all()
    again, scale_again = quantise(back, kind)
    assert torch.equal(dequantise(again, scale_again), back)


def test_panels():
    """Each kind's panels hold the weights where csrc/cpu/products/packed.h says."""
    w = torch.randn(150, 21)
    panels, scale, sums = engine.pack(w, "fp32")
    assert scale is sums is None and panels.shape == (2, 150, 16, 1) and panels[1, 7, 3, 0] == w[7, 19]
    assert engine.pack(w.bfloat16(), "bf16")[0][1, 3, 3, 1] == w.bfloat16()[7, 19]
    q, s = quantise(w, "int8")
    panels, scale, sums = engine.pack(w, "int8")
    assert panels.shape == (2, 38, 16, 4) and panels[1, 1, 3, 3] == q[7, 19] and scale[19] == s[19]
    assert torch.equal(sums[:21], q.sum(0, dtype=torch.int32)) and len(sums) == len(scale) == 32
    q, s = quantise(w, "int4")
    panels = engine.pack(w, "int4")[0]
    assert panels.shape == (2, 3, 576) and panels[1, 1, :64].view(torch.float32)[3] == s[1, 19]
    steps = panels[..., 64:].view(2, 3, 8, 16, 4)
    k, n = 64 + 8 * 2 + 1, 19
    assert steps[1, 1, 2, 3, 1] == (q[k, n] + 8) + 16 * (q[k + 4, n] + 8)


def rounded(x):
    """Activations as int8 with a scale a row stand for."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale) * scale


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("T", [1, 9])
def test_quantised_models(model, kind, T, monkeypatch):
    """Against the model's own forward with every product's activations rounded as the engine rounds them."""
    model = quantise_(model, kind)
    tokens = torch.randint(16, (3, T), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.config, 3, T, device="cpu", dtype=model.dtype)
    with torch.inference_mode():
        got = engine.Engine(model, cache).every(tokens)
        plain = model(tokens)[0]
        product, head = Conv1D.forward, torch.nn.Linear.forward
        monkeypatch.setattr(Conv1D, "forward", lambda self, x, **bias: product(self, rounded(x), **bias))
        monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: head(self, rounded(x)))
        with fastlm.use(layer_norm="cpu"):  # the parts, not whole blocks
            wanted = model(tokens)[0]
    # A number that lies between two int8 falls to this side or that: 1/254 of the largest, in few.
    assert float((got - wanted).norm() / wanted.norm()) < 4e-3
    assert float((got - plain).norm() / plain.norm()) < 0.1
    assert engine.packed(model).kind == kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompts(model, dtype, monkeypatch):
    """Unequal prompts in one call, and cut into calls of few rows."""
    model = model.to(dtype)
    tokens = torch.randint(16, (3, 40), generator=torch.Generator().manual_seed(1))
    counts = torch.tensor([40, 3, 17], dtype=torch.int32)
    with torch.inference_mode():
        wanted = torch.stack([model.double()(row[None, :n])[0][0, -1] for row, n in zip(tokens, counts)])
        model.to(dtype)
        for rows in (engine.ROWS, 24, 1):
            monkeypatch.setattr(engine, "ROWS", rows)
            cache = KVCache(model.config, 3, 40, device="cpu", dtype=dtype, page=16)
            got = engine.Engine(model, cache)(tokens, counts)
            error = float((got - wanted).norm() / wanted.norm())
            assert error < (1e-5 if dtype == torch.float32 else 0.05) and torch.equal(cache.lengths, counts)


@pytest.mark.parametrize("kind, allowed", [("fp32", 1e-5), ("bf16", 0.05), ("int8", 0.1), ("int4", 0.1)])
def test_prompts_of_several_blocks_of_rows(kind, allowed):
    """Wide rows, of which fewer than the prompts' go through the panels at a time."""
    model = make("wide")
    model = quantise_(model, kind) if kind.startswith("int") else model.bfloat16() if kind == "bf16" else model
    tokens = torch.randint(16, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        got = engine.Engine(model, KVCache(model.config, 2, 50, device="cpu", dtype=model.dtype)).every(tokens)
        wanted = model(tokens)[0]
    assert float((got - wanted).norm() / wanted.norm()) < allowed


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("T", [1, 20])
def test_the_largest_sums(kind, T, sign):
    """Weights and activations that are all as large as their numbers can be: no sum may overflow on its way."""
    model = make("even")
    with torch.no_grad():
        for block in model.transformer.h:
            block.ln_1.weight.zero_(), block.ln_1.bias.fill_(1)
            block.attn.c_attn.weight.fill_(0.7 * sign), block.attn.c_attn.bias.zero_()
    model = quantise_(model, kind)
    tokens = torch.randint(16, (2, T), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        got = engine.Engine(model, KVCache(model.config, 2, T, device="cpu", dtype=model.dtype)).every(tokens)
        wanted = model(tokens)[0]
    assert float((got - wanted).norm() / wanted.norm()) < 0.05


def test_every_logit(model):
    tokens = torch.randint(16, (2, 23), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        cache = KVCache(model.config, 2, 23, device="cpu", dtype=torch.float32)
        torch.testing.assert_close(engine.Engine(model, cache).every(tokens), model(tokens)[0], rtol=1e-4, atol=1e-4)


def prepared(**changes):
    model = make("even")
    return model, KVCache(model.config, 2, 16, device="cpu", dtype=torch.float32, page=8, **changes)


def call(model, cache, tokens=((1, 2), (3, 4)), counts=(2, 1)):
    return engine.Engine(model, cache)(torch.tensor(tokens), torch.tensor(counts, dtype=torch.int32))


@pytest.mark.parametrize("name, given, told", [
    ("tokens", {"tokens": ((1, 257), (3, 4))}, "tokens of sequence 0 is 257, wanted 0 to 256"),
    ("tokens", {"tokens": ((1, 2), (-1, 4))}, "tokens of sequence 1 is -1"),
    ("counts", {"counts": (2, 3)}, "counts of sequence 1 is 3, wanted 0 to 2"),
    ("counts", {"counts": (-1, 1)}, "counts of sequence 0 is -1"),
])
def test_numbers_that_are_no_addresses_are_refused(name, given, told):
    with pytest.raises(ValueError, match=told):
        call(*prepared(), **given)
    call(*prepared(), tokens=((1, 2), (3, -4)))  # behind its count


@pytest.mark.parametrize("what, told", [
    ("lengths", "positions of sequence 1 is 16, wanted 0 to 15"), ("negative", "positions of sequence 0 is -1"),
    ("table", "block_table of sequence 1 is 4, wanted 0 to 3"), ("negative table", "block_table of sequence 0 is -1"),
    ("blocks", "pages for 1 blocks, the model has 3"), ("table's dtype", "block_table is torch.int64"),
    ("heads", r"v_pages\[1\] is torch.float32 \(4, 8, 4, 16\)"), ("dtype", r"k_pages\[1\] is torch.bfloat16"),
    ("strides", r"k_pages\[1\] is .* with strides"), ("lengths' dtype", "lengths is torch.int64"),
    ("tokens' dtype", "tokens is torch.int32"), ("rows", r"counts is torch.int32 \(1,\)"),
])
def test_a_cache_that_is_not_the_models_is_refused(what, told):
    model, cache = prepared(**{"layers": 1} if what == "blocks" else {})
    if "table" in what:
        cache.block_table = cache.block_table.clone()
    if what == "lengths":
        cache.lengths[1] = 16
    if what == "negative":
        cache.lengths[0] = -1
    if what == "table":
        cache.block_table[1, 0] = 4
        for pages in (cache.k_pages, cache.v_pages):  # one that is there, but not the cache's: a bug may write to it
            pages[:] = [torch.zeros(5, 2, 8, 32).transpose(1, 2)[:4] for _ in pages]
    if what == "negative table":
        cache.block_table[0, 0] = -1
    if what == "table's dtype":
        cache.block_table = cache.block_table.long()
    if what == "lengths' dtype":
        cache.lengths = cache.lengths.long()
    if what == "heads":
        cache.v_pages[1] = torch.zeros(4, 8, 4, 16)
    if what == "dtype":
        cache.k_pages[1] = cache.k_pages[1].bfloat16()
    if what == "strides":
        cache.k_pages[1] = cache.k_pages[1].contiguous()
    with pytest.raises(ValueError, match=told):
        if what == "tokens' dtype":
            engine.Engine(model, cache)(torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32))
        elif what == "rows":
            engine.Engine(model, cache)(torch.zeros(2, 2, dtype=torch.int64), torch.ones(1, dtype=torch.int32))
        else:
            call(model, cache)


def test_the_memory_of_a_cache_serves_the_next(monkeypatch):
    """What a call left in it changes nothing, nor does a call within another's; more than SPARE bytes are not kept."""
    model = make("even")
    long, short = [PROMPTS[3]] * 3, [PROMPTS[1]]

    def written(prompts):
        return [row.tolist() for row in model.generate(prompts, max_new_tokens=9, temperature=0, stop_at=None)]

    wanted = written(short)
    held = engine.packed(model)
    held.spare()
    written(long)
    (memory,) = held._spare
    with torch.inference_mode():
        memory.fill_(255)  # NaN
    assert written(short) == wanted and held._spare[0] is memory
    steps = fastlm.generation.stream_tokens(model, short, max_new_tokens=9, temperature=0, stop_at=None)
    first = next(steps)
    assert held._spare == [] and written(short) == wanted
    inner = held._spare[0]
    assert inner is not memory and [first, *steps] == [[token] for token in wanted[0][7:]]
    assert held._spare[0] is inner  # one is kept
    monkeypatch.setattr(engine, "SPARE", len(held.spare()) - 1)
    assert written(short) == wanted and held._spare == []


def test_decoding_stops_where_the_room_ends():
    """A step that is prepared once and run again and again checks anew."""
    model, cache = prepared()
    with torch.inference_mode():
        run = engine.Engine(model, cache)
        run(torch.zeros(2, 2, dtype=torch.int64), torch.tensor([2, 2], dtype=torch.int32))
        tokens, counts = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int32)
        sampler = sampling.Sampler(257, 0.0, None, None)
        decode = run.decoding(tokens, counts, sampler, torch.zeros(2, 100, dtype=torch.float64))
        for _ in range(14):
            decode()
        with pytest.raises(ValueError, match="positions of sequence 0 is 16"):
            decode()
        cache.lengths.fill_(2)
        tokens[1] = 400
        with pytest.raises(ValueError, match="tokens of sequence 1 is 400"):
            decode()
        tokens[1] = 0
        decode = run.decoding(tokens, counts, sampler, torch.zeros(2, 3, dtype=torch.float64))
        decode(), decode()
        with pytest.raises(ValueError, match="step of sequence 0 is 3, wanted 0 to 2"):
            decode()


def test_why_not():
    model = make("even")
    assert engine.why_not(model) is None
    assert "takes float32 and bfloat16" in engine.why_not(make("even").half())
    with fastlm.use("torch"):
        assert "torch is forced" in engine.why_not(model)
    handle = model.transformer["h"][0].mlp.register_forward_hook(lambda *_: None)
    assert engine.why_not(model).startswith("transformer.h.0.mlp has hooks")
    handle.remove()
    model.transformer["h"][1].mlp.__class__ = type("Mine", (MLP,), {})
    assert engine.why_not(model).startswith("transformer.h.1.mlp is of a class of its own, Mine")

    class Other(fastlm.GPT2):
        pass

    assert "a class of its own" in engine.why_not(Other(model.config))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_lower_instruction_sets(isa):
    """The same checks in a process that is held to fewer instructions."""
    environment = {**os.environ, "FASTLM_CPU_ISA": isa}
    tests = ["-k", "logit or numerics or quantised or prompts or bits"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, __file__],
                          capture_output=True, text=True, env=environment, cwd=Path(__file__).parent.parent)
    if "which this CPU does not have" in done.stdout + done.stderr:
        pytest.skip(f"this CPU has no {isa}")
    if "which was not built" in done.stdout + done.stderr and os.environ.get("FASTLM_TARGETS") != "all":
        pytest.skip(f"{isa} was not built: FASTLM_TARGETS=all pip install -e . builds it")
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("kind", cuts.DTYPES["gpt2_step"])
def test_the_same_bits_however_products_are_cut(kind):
    torch.manual_seed(0)
    config = fastlm.GPT2Config(vocab_size=300, n_positions=256, n_embd=256, n_layer=1, n_head=4)
    model = fastlm.GPT2(config).eval()
    model = quantise_(model, kind) if kind in ("int8", "int4") else model.bfloat16() if kind == "bf16" else model
    found = []
    for cut in cuts.every("gpt2_step"):
        with tuned.trying("gpt2_step", cut):
            found.append([])
            for B, T in ((1, 1), (3, 1), (5, 50), (1, 250)):
                cache = KVCache(config, B, T, device="cpu", dtype=engine.cache_dtype(model))
                found[-1].append(engine.Engine(model, cache).every(torch.arange(B * T).view(B, T) % 300).clone())
    assert len(found) == 12
    for logits in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(logits, found[0]))


@pytest.mark.parametrize("cut", cuts.every("gpt2_step"), ids=str)
@pytest.mark.parametrize("B", [2, 3, 4, 9])
def test_blocks_of_rows_that_one_row_of_activations_fills(B, cut):
    torch.manual_seed(0)
    config = fastlm.GPT2Config(vocab_size=20, n_positions=4, n_embd=192, n_layer=1, n_head=1, n_inner=26000,
                               bos_token_id=None, eos_token_id=None)  # of 192 outputs a chunk has several panels
    model = fastlm.GPT2(config).eval()

    def logits(tokens):
        cache = KVCache(config, len(tokens), 1, device="cpu", dtype=torch.float32)
        return engine.Engine(model, cache).every(tokens).clone()

    tokens = torch.arange(B)[:, None]
    with tuned.trying("gpt2_step", cut):
        assert torch.equal(logits(tokens), torch.cat([logits(tokens[b : b + 1]) for b in range(B)]))
