"""Models changed at random: what fastlm says of them is what their modules say, called one by one.

A case is a number. It draws a small model, one to three changes that somebody may make to it, and one more after the
first check, so that nothing derived from the model may be stale. Logits, loss, gradients and greedy continuations are
held to the modules themselves, with torch's functions for what fastlm's classes do (`in_torchs_words`), and to a
GPT2LMHeadModel that went through the same changes, where these can be made there. `case(17)` repeats one.
"""

import contextlib
import copy
import functools
import random
import sys
from collections import Counter
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from changes import CHANGES, REFUSED, Doubled, P, Sinusoids, V, batch
from conftest import DEVICE
from torch import nn

import fastlm
from fastlm import fast_path
from fastlm.activations import GELU
from fastlm.backends.machine import machine_why_not
from fastlm.generation import engine
from fastlm.generation.perplexity import perplexity
from fastlm.gpt2 import GPT2, MLP, Attention, Block, Conv1D, Embedding, LayerNorm

if DEVICE != "cpu" or machine_why_not("cpu") is not None:
    pytest.skip("needs the CPU kernels, and a CPU to run on", allow_module_level=True)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}  # of the largest
SERVED = 0.95  # of the cases with harmless changes, at least


# ---- the modules in torch's words


def _conv1d(self, x, bias=True):
    return x @ self.weight + self.bias if bias else x @ self.weight


def _embedding(self, tokens, sparse=False):
    return F.embedding(tokens, self.weight)


def _norm(self, x):
    return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


def _gelu(self, u, bias=None):
    return F.gelu(u if bias is None else u + bias, approximate="tanh")


def _attention(self, x, attend=None, seed=None):
    q, k, v = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    dropped = self.dropout if self.training else 0.0
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropped, scale=self.scale)
    return F.dropout(self.c_proj(o.transpose(1, 2).flatten(2)), self.residual_dropout, self.training)


def _mlp(self, x):
    return F.dropout(self.c_proj(self.act(self.c_fc(x))), self.residual_dropout, self.training)


def _block(self, x, attend=None, seed=None):
    x = x + self.attn(self.ln_1(x), attend, seed)
    return x + self.mlp(self.ln_2(x))


def _hidden(self, tokens, seed=None, attention_mask=None):
    x = self.transformer.wte(tokens) + self.transformer.wpe(torch.arange(tokens.shape[1]))
    for block in self.transformer.h:
        x = block(x, None, None)
    return self.transformer.ln_f(x)


def _gpt2(self, tokens, targets=None):
    logits = self.lm_head(self.hidden(tokens))
    return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


WORDS = {Conv1D: _conv1d, Embedding: _embedding, LayerNorm: _norm, Attention: _attention, MLP: _mlp, Block: _block,
         GELU: _gelu, GPT2: _gpt2}
OURS = {kind: kind.forward for kind in WORDS}
OUR_HIDDEN = GPT2.hidden


@contextlib.contextmanager
def in_torchs_words():
    """fastlm's classes with forwards of torch's functions, but where somebody has replaced the forward."""
    with pytest.MonkeyPatch.context() as patch:
        for kind, forward in WORDS.items():
            if kind.forward is OURS[kind]:
                patch.setattr(kind, "forward", forward)
        if GPT2.hidden is OUR_HIDDEN:
            patch.setattr(GPT2, "hidden", _hidden)
        yield


def by_hand(model, tokens, targets=None):
    """(logits (B, T, V), loss) of a model's modules."""
    with in_torchs_words():
        return model(tokens, targets)


# ---- a case


class Plan(NamedTuple):
    """What a number draws."""

    sizes: dict
    names: list  # of the changes; the last one is made after the first check
    gradients: bool

    @property
    def harmless(self):
        return all(CHANGES[name].harmless for name in self.names)

    @property
    def theirs(self):
        return all(CHANGES[name].theirs for name in self.names)


class Result(NamedTuple):
    plan: Plan
    served: list  # of every check: (dtype, what ran of the fast paths, why not)
    refused: int
    compared: int  # with transformers


def plan(number):
    draw = random.Random(number)
    harmless = [name for name, one in CHANGES.items() if one.harmless]
    pool = draw.choice([harmless, [name for name, one in CHANGES.items() if one.theirs], list(CHANGES), list(CHANGES)])
    names = [draw.choice(pool) for _ in range(draw.randint(0, 2))] + [draw.choice([*pool, *["edited"] * 4])]
    names.insert(draw.randint(0, len(names) - 1), pool[number % len(pool)])  # so that few cases have all of them
    sizes = {"n_embd": draw.choice([32, 64]), "n_layer": draw.randint(1, 3), "n_head": draw.choice([2, 4])}
    return Plan(sizes, names, draw.random() < 0.5)


def make(number, sizes):
    torch.manual_seed(number)
    off = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    ends = {"eos_token_id": None, "bos_token_id": None}
    model = fastlm.GPT2(fastlm.GPT2Config(vocab_size=V, n_positions=P, **sizes, **off, **ends)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@functools.cache
def transformers():
    with contextlib.suppress(ImportError):
        import transformers

        return transformers
    return None


def twin(model):
    """transformers' model of the same weights."""
    values = model.config.dump()
    values.pop("dtype")
    theirs = transformers().GPT2LMHeadModel(transformers().GPT2Config(**values, use_cache=False))
    theirs.load_state_dict(model.state_dict())
    return theirs.eval()


@contextlib.contextmanager
def counted():
    """Counts the calls of the fast paths."""
    ran = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((fast_path, "_whole"), (engine.Engine, "decoding")):
            patch.setattr(owner, name, _counting(ran, name, getattr(owner, name)))
        yield ran


def _counting(ran, name, run):
    def counting(*inputs, **options):
        ran[name] += 1
        return run(*inputs, **options)

    return counting


def near(told, got, wanted, tolerance, largest=None):
    """Raises AssertionError unless got is wanted but for rounding, a part of the largest number."""
    got, wanted = got.double(), wanted.double()
    assert got.shape == wanted.shape, f"{told}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    largest = wanted.abs().max().clamp(min=1) if largest is None else largest
    off = float((got - wanted).abs().max() / largest)
    assert off <= tolerance, f"{told} is {off:.1e} of the largest number off, allowed are {tolerance:.0e}"


def computed(run, *inputs, **options):
    """What it returns, or None where it is refused."""
    try:
        return run(*inputs, **options)
    except REFUSED:
        return None


def drawn_below(model):
    return model.config.unpadded_vocab_size or model.config.vocab_size


def greedy_by_hand(model, prompt):
    text = torch.as_tensor(prompt)[None]
    for _ in range(4):
        logits = by_hand(model, text)[0][0, -1, : drawn_below(model)]
        text = F.pad(text, (0, 1), value=int(logits.argmax()))
    return text


def greedy(model, prompts, tolerance):
    """Holds what a model writes to the largest logit of its modules, as far as that is told by more than rounding."""
    rows = computed(model.generate, prompts, max_new_tokens=4, temperature=0, stop_at=None)
    if rows is None:
        assert any(computed(greedy_by_hand, model, prompt) is None for prompt in prompts), "generate refused"
        return
    for prompt, row in zip(prompts, rows):
        assert row[: len(prompt)].tolist() == list(prompt) and len(row) == len(prompt) + 4
        logits = by_hand(model, row[None, :-1])[0][0, len(prompt) - 1 :, : drawn_below(model)].double()  # (4, V)
        chosen = logits.gather(1, row[len(prompt) :, None])[:, 0]
        short = float((logits.amax(1) - chosen).max() / logits.abs().max().clamp(min=1))
        assert short <= 2 * tolerance, f"generate: a token {short:.1e} of the largest logit below the best"


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    found = [None if p.grad is None else p.grad.to_dense().clone() for p in model.parameters()]
    model.zero_grad()
    return found


def refused(model, tokens):
    """Holds a model that torch refuses to an error that names what does not fit, where all modules are fastlm's.

    Mixed dtypes that torch's norm does not take and fastlm's does are computed as in fp64.
    """
    try:
        got = model(tokens)[0]
    except REFUSED as error:
        named = isinstance(error, (ValueError, TypeError)) or fast_path.why_not(model) is not None
        assert named, f"refused, but not told: {error}"
        return
    if (wanted := computed(by_hand, copy.deepcopy(model).double(), tokens)) is not None:  # no hook that stayed behind
        near("model(tokens), which torch refuses", got, wanted[0], TOLERANCE[torch.bfloat16])


def check(model, draw, with_gradients, theirs):
    """(dtype, what ran of the fast paths, why not), or None where neither the modules nor fastlm can compute it."""
    tokens, targets = batch(draw)
    prompts = [row[: draw.randint(1, len(row))] for row in tokens.tolist()]
    seed, training = draw.getrandbits(31), model.training
    torch.manual_seed(seed)
    with torch.no_grad():
        if (wanted := computed(by_hand, model, tokens)) is None:
            refused(model, tokens)
            return None
        torch.manual_seed(seed)
        if (with_loss := computed(by_hand, model, tokens, targets)) is None:  # a head over fewer tokens
            for name in "forward", "loss":
                with pytest.raises(ValueError, match="wanted 0 ≤ label <"):
                    getattr(model, name)(tokens, targets)
            targets = torch.full_like(targets, 3)
            with_loss = by_hand(model, tokens, targets)
    (wanted, _), (_, wanted_loss) = wanted, with_loss
    drops = any(isinstance(part, Attention) and part.training and part.dropout for part in model.modules())
    dtypes = {p.dtype for p in model.parameters()} | {wanted.dtype}
    tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
    largest = wanted.double().abs().max().clamp(min=1)
    with counted() as ran:
        torch.manual_seed(seed)
        with torch.no_grad():
            logits, first_loss = model(tokens, targets)
        torch.manual_seed(seed)
        loss = model.loss(tokens, targets)
        if drops:  # with a mask of another generator
            assert tokens.shape[1] < 4 or not torch.equal(logits, model(tokens)[0]), "attention drops nothing"
        else:
            near("model(tokens)", logits, wanted, tolerance)
            near("model(tokens, targets)", first_loss, wanted_loss, tolerance, largest)
            near("model.loss", loss.detach(), wanted_loss, tolerance, largest)
        if theirs is not None:
            with torch.no_grad():
                near("transformers' logits", theirs(tokens).logits, wanted, tolerance)
        if with_gradients and loss.requires_grad and not drops:
            ours = gradients(model, loss)
            torch.manual_seed(seed)
            with in_torchs_words():
                wanted = gradients(model, model(tokens, targets)[1])
            for (name, _), got, one in zip(model.named_parameters(), ours, wanted):
                assert (got is None) == (one is None), f"the gradient of {name} is {'' if one is None else 'not '}there"
                if one is not None:
                    near(f"the gradient of {name}", got, one, 10 * tolerance, one.double().abs().max().clamp(min=0.1))
        model.eval()
        with torch.no_grad():
            for asked in (tokens, prompts):
                greedy(model, asked, tolerance)
            ids = torch.randint(V - 12, (P,))
            got, wanted = computed(perplexity, model, ids), computed(by_hand, model, ids[None, :-1], ids[None, 1:])
            assert (got is None) == (wanted is None), f"perplexity is {got}, wanted {wanted}"
            if got is not None:
                wanted = F.cross_entropy(wanted[0][0].double(), ids[1:])
                near("perplexity's logarithm", torch.tensor(got, dtype=torch.float64).log(), wanted, tolerance, largest)
        model.train(training)
    reason = engine.why_not(model)
    assert (ran["decoding"] == 2) == (reason is None), f"the engine served {ran['decoding']} of 2, although {reason}"
    return model.dtype, ran, reason


def case(number):
    """The Result of a case; raises AssertionError where fastlm and the modules differ."""
    drawn = plan(number)
    model = make(number, drawn.sizes)
    theirs = twin(model) if drawn.theirs and transformers() else None
    model.generate([[1, 2, 3]], max_new_tokens=2, temperature=0)  # what is derived of the model must not stay
    served, draw = [], random.Random(number)
    with contextlib.ExitStack() as undo:
        for turn, name in enumerate(drawn.names):
            make_change = CHANGES[name].make
            model = make_change(model, random.Random(f"{number} {turn}"), undo) or model
            if theirs is not None:
                make_change(theirs, random.Random(f"{number} {turn}"), undo)
            if turn >= len(drawn.names) - 2:
                served.append(check(model, draw, drawn.gradients, theirs))
    checks = [one for one in served if one is not None]
    return Result(drawn, checks, len(served) - len(checks), 0 if theirs is None else len(checks))


def run(numbers, tell):
    results, wrong = [], []
    for number in numbers:
        try:
            results.append(case(number))
        except Exception as error:
            wrong.append(f"case({number}), {', '.join(plan(number).names)}: {type(error).__name__}: {error}")
    harmless = [one for result in results if result.plan.harmless for one in result.served]
    single = [ran for dtype, ran, _ in harmless if dtype == torch.float32]
    generated = sum(ran["decoding"] == 2 for _, ran, _ in harmless) / max(1, len(harmless))
    whole = sum(ran["_whole"] >= 2 for ran in single) / max(1, len(single))
    everywhere = [one for result in results for one in result.served]
    tell(f"{len(numbers)} models changed at random: {len(wrong)} wrong, {sum(r.refused for r in results)} refused by "
         f"torch too, {sum(r.compared for r in results)} of {len(everywhere)} checks beside transformers; fast paths "
         f"served {generated:.0%} of {len(harmless)} harmless ones, {whole:.0%} of {len(single)} in fp32 whole, and "
         f"{sum(reason is None for *_, reason in everywhere) / max(1, len(everywhere)):.0%} of all")
    assert not wrong, f"{len(wrong)} of {len(numbers)} cases:\n" + "\n".join(wrong)
    assert harmless and min(generated, whole) >= SERVED, Counter(reason for *_, reason in harmless)


@pytest.fixture(autouse=True)
def one_thread():
    """Of so small models two would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
def test_some_changed_models(tell):
    run(range(100), tell)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(0, 2000, 200))
def test_many_changed_models(first, tell):
    run(range(first, first + 200), tell)


# ---- what was found

TOKENS = torch.arange(24).view(2, 12) * 7 % V
SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 2}


@pytest.fixture
def model():
    return make(5, SIZES)


def says(model, tokens, **options):
    return [row.tolist() for row in model.generate(tokens, max_new_tokens=6, temperature=0, **options)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whose", ["a module's", "all modules'"])
def test_a_call_below_call_counts(model, whose, monkeypatch):
    before, wanted = model(TOKENS)[0], by_hand(model, TOKENS)[0]
    torch.testing.assert_close(before, wanted, rtol=1e-4, atol=1e-4)
    call, mlp = nn.Module._call_impl, model.transformer.h[1].mlp
    doubled = lambda self, *inputs: call(self, *inputs) * (2 if self is mlp else 1)  # noqa: E731
    if whose == "a module's":
        mlp._call_impl = functools.partial(doubled, mlp)
    else:
        monkeypatch.setattr(nn.Module, "_call_impl", lambda self, *inputs, **options: (
            doubled(self, *inputs) if self is mlp else call(self, *inputs, **options)))
    assert model.why_slow() is not None
    wanted = by_hand(model, TOKENS)[0]
    assert (wanted - before).abs().max() > 0.1
    torch.testing.assert_close(model(TOKENS)[0], wanted, rtol=1e-4, atol=1e-4)
    greedy(model, TOKENS, 1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["hook", "forward", "class"])
def test_a_model_that_is_more_than_its_parts(model, what):
    """In its loss, in what it generates, of prompts of any lengths and several times, and in its perplexity."""
    plain, last = copy.deepcopy(model), 2 * model(TOKENS, TOKENS)[1]
    shift = 3 * torch.randn(V)

    def shifted(output):
        return output[0] + shift, None if output[1] is None else output[1] * 2

    class Shifted(GPT2):
        def forward(self, *inputs, **options):
            return shifted(super().forward(*inputs, **options))

    if what == "hook":
        model.register_forward_hook(lambda _, inputs, output: shifted(output))
    elif what == "forward":
        model.forward = lambda *inputs, **options: shifted(GPT2.forward(model, *inputs, **options))
    else:
        model.__class__ = Shifted
    torch.testing.assert_close(model.loss(TOKENS, TOKENS), last)
    plain.lm_head.bias = nn.Parameter(shift)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    assert says(model, prompts) == says(plain, prompts) and says(model, prompts) != says(make(5, SIZES), prompts)
    drawn = [says(one, prompts, num_return_sequences=2, batch_size=2) for one in (model, plain)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 6
    stop = says(plain, prompts)[0][4]
    assert says(model, prompts, stop_at=stop) == says(plain, prompts, stop_at=stop)
    assert perplexity(model, range(60)) == pytest.approx(perplexity(plain, range(60)), rel=1e-4)


def test_an_attentions_own_dropout(model):
    wanted = model(TOKENS)[0]
    for block in model.transformer.h:
        block.attn.dropout = 0.5
    assert torch.equal(model(TOKENS)[0], wanted)
    model.train()
    assert not torch.equal(model(TOKENS)[0], model(TOKENS)[0])
    model.transformer.h[0].attn.eval()
    model.transformer.h[1].attn.dropout = 0.0
    torch.testing.assert_close(model(TOKENS)[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lacking", ["bias", "weight"])
def test_a_norm_without_weight_or_bias(model, lacking):
    same = copy.deepcopy(model)
    for name in "ln_1", "ln_2":
        norm, other = (getattr(one.transformer.h[0], name) for one in (model, same))
        setattr(norm, lacking, None)
        getattr(other, lacking).data.fill_(lacking == "weight")
    torch.testing.assert_close(model(TOKENS)[0], same(TOKENS)[0])
    assert says(model, TOKENS) == says(same, TOKENS)


@pytest.mark.filterwarnings("ignore")
def test_an_embedding_without_a_parameter(model):
    wanted = model(TOKENS)[0]
    model.transformer.wte = Sinusoids(0, None, model.transformer.wte.weight.detach().clone())
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    torch.testing.assert_close(model(TOKENS)[0], wanted)
    greedy(model, TOKENS, 1e-4)


@pytest.mark.parametrize("known", [True, False])
def test_parametrizations_that_are_taken_back(model, known, monkeypatch):
    """Where transformers is imported, whose Conv1D a parametrized one is of, too."""
    if known:
        pytest.importorskip("transformers.pytorch_utils")
    else:
        monkeypatch.delitem(sys.modules, "transformers.pytorch_utils", raising=False)
    layer = model.transformer.h[0].mlp.c_fc
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    assert model.why_slow() is not None
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is Conv1D and model.why_slow() is None


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_named(model):
    cases = {
        r"transformer.h.1.mlp.c_fc.weight is \(32, 128\) torch.bfloat16": lambda m: m.transformer.h[1].mlp.c_fc,
        "the blocks are torch.float32, what comes from the embeddings is torch.float64": lambda m: m.transformer.wpe,
        "lm_head.weight is torch.bfloat16, but the hidden states are torch.float32": lambda m: m.lm_head}
    for told, part in cases.items():
        changed = copy.deepcopy(model)
        changed.lm_head.weight = nn.Parameter(changed.lm_head.weight.detach().clone())
        part(changed).to(torch.float64 if "float64" in told else torch.bfloat16)
        with pytest.raises((ValueError, TypeError), match=told):
            changed(TOKENS)
    for name, told in (("wte", "token id 63 at .*, wanted 0 ≤ id < vocab_size 60"), ("wpe", "n_positions=5")):
        changed = copy.deepcopy(model)
        table = changed.transformer[name]
        table.weight = nn.Parameter(table.weight.detach()[: 60 if name == "wte" else 5].clone())
        for run in changed, changed.generate:
            with pytest.raises(ValueError, match=told):
                run(TOKENS)
