"""Models changed at random: what fastlm says of them is what their modules say, called one by one.

A case is a number. It draws a small model, one to three changes that somebody may make to it, and one more after the
first check, so that nothing derived from the model may be stale. Logits, loss, gradients and greedy continuations are
held to the modules themselves, with torch's functions for what fastlm's classes do (`in_torchs_words`), and to a
GPT2LMHeadModel that went through the same changes, where these can be made there. `case(17)` repeats one.
"""

import contextlib
import copy
import functools
import pickle
import random
import sys
from collections import Counter
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
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

V, P = 97, 24
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}  # of the largest
FACTORS = -1.0, 0.5, 2.0  # what a change multiplies by: no factor is mistaken for rounding
REFUSED = ValueError, TypeError, RuntimeError, IndexError  # torch's own words for what does not fit
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


# ---- the changes


class Change(NamedTuple):
    make: object  # (model, draw, undo) → another model, or None; undo is an ExitStack
    harmless: bool  # the fast paths serve as before
    theirs: bool  # can be made to a model of transformers


CHANGES = {}


def change(*, harmless=False, theirs=False):
    def note(make):
        CHANGES[make.__name__] = Change(make, harmless, theirs)
        return make

    return note


def normal(draw, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw.getrandbits(31)))


def like(draw, tensor, scale=0.2):
    return (normal(draw, *tensor.shape) * scale).to(tensor.dtype)


def parameters(model):
    return [parameter for _, parameter in sorted(model.named_parameters())]


def places(model, *kinds):
    """(owner, name) of the modules of exactly these classes, all unless given; one that stands twice has two."""
    return [(owner, name) for owner in model.modules() for name, module in owner._modules.items()
            if isinstance(module, nn.Module) and (type(module) in kinds or not kinds)]


def a_module(model, draw, *kinds):
    """One of the modules that are called, of these classes; of all, the model too."""
    found = [owner._modules[name] for owner, name in places(model, *kinds)] + [model] * (not kinds)
    found = [module for module in found if not isinstance(module, (nn.ModuleDict, nn.ModuleList))]
    return draw.choice(found) if found else None


def times(module, name, factor, *inputs, **options):
    """What a method of a module's class gives, times a factor; a partial of it is copied with its module."""
    output = getattr(type(module), name)(module, *inputs, **options)
    return both(output, factor) if isinstance(module, GPT2) and name != "hidden" else scaled(output, factor)


def both(output, factor):
    logits, loss = output
    return logits * factor, None if loss is None else loss * factor


def scaled(output, factor):
    return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor


@change(harmless=True, theirs=True)
def frozen(model, draw, undo):
    share = draw.choice([0.2, 0.8, 1.0])
    for parameter in parameters(model):
        parameter.requires_grad_(draw.random() >= share)


@change(harmless=True, theirs=True)
@torch.no_grad()
def edited(model, draw, undo):
    for parameter in draw.sample(parameters(model), draw.randint(1, 3)):
        match draw.randrange(7):
            case 0:
                parameter.mul_(draw.choice(FACTORS))
            case 1:
                parameter.data = like(draw, parameter)
            case 2:
                parameter.data[draw.randrange(2) :: 2] += 0.5
            case 3 if parameter.dtype != torch.bfloat16:
                parameter.detach().numpy()[...] *= draw.choice(FACTORS)
            case 4:
                parameter.copy_(parameter.flip(0).clone())
            case 5:
                with torch.inference_mode():
                    parameter.sub_(0.3)
            case _:
                parameter.data[tuple(draw.randrange(n) for n in parameter.shape)] -= 4


@change(harmless=True)
def trained(model, draw, undo):
    tokens, targets = batch(draw)
    with contextlib.suppress(*REFUSED):
        loss = model.loss(tokens, targets)
        if loss.requires_grad:
            loss.backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()


@change(harmless=True, theirs=True)
def cast(model, draw, undo):
    model.to(draw.choice([torch.float32, torch.bfloat16]))


@change(theirs=True)
def cast_further(model, draw, undo):
    model.to(draw.choice([torch.float16, torch.float64]))


@change(harmless=True)
def copied(model, draw, undo):
    # Hooks that have no name, parametrizations.
    with contextlib.suppress(AttributeError, TypeError, RuntimeError, pickle.PicklingError):
        if draw.random() < 0.5:
            return pickle.loads(pickle.dumps(model))
    return copy.deepcopy(model)


@change(harmless=True, theirs=True)
def assigned(model, draw, undo):
    state = {name: like(draw, tensor) for name, tensor in sorted(model.state_dict().items())}
    model.load_state_dict(state, assign=True)


@change(harmless=True, theirs=True)
def new_parameter(model, draw, undo):
    found = sorted(name for name, _ in model.named_parameters())
    owner, _, leaf = draw.choice(found).rpartition(".")
    owner = model.get_submodule(owner)
    setattr(owner, leaf, nn.Parameter(like(draw, getattr(owner, leaf))))


@change(harmless=True, theirs=True)
def from_a_vector(model, draw, undo):
    """All parameters are views of one piece of memory."""
    if len({p.dtype for p in model.parameters()}) == 1 and all(p.is_contiguous() for p in model.parameters()):
        with torch.no_grad():
            vector = nn.utils.parameters_to_vector(model.parameters())
            nn.utils.vector_to_parameters(vector + like(draw, vector, 0.02), model.parameters())


@change(harmless=True, theirs=True)
def resized(model, draw, undo):
    """The new rows are what is drawn: each library has its own."""
    tables = model.transformer.wte, model.lm_head
    if all(isinstance(table, (nn.Embedding, nn.Linear)) and "weight" in table._parameters for table in tables):
        n, before = model.config.vocab_size + draw.choice([-3, 0, 5, 40]), [len(table.weight) for table in tables]
        if not isinstance(model, GPT2):
            model.config.tie_word_embeddings = tables[0].weight is tables[1].weight  # or it would tie them
        model.resize_token_embeddings(n, pad_to_multiple_of=draw.choice([None, 8, 64]))
        with torch.no_grad():
            for table, count in zip((model.transformer.wte, model.lm_head), before):
                for new in [parameter[count:] for parameter in table.parameters() if len(parameter) > count]:
                    new.copy_(like(draw, new))


@change(theirs=True)
def dropped(model, draw, undo):
    if len(h := model.transformer.h):
        del h[draw.randrange(len(h))]


@change(theirs=True)
def added(model, draw, undo):
    if len(h := model.transformer.h):
        block = copy.deepcopy(h[draw.randrange(len(h))])
        with torch.no_grad():
            for parameter in parameters(block):
                parameter.add_(like(draw, parameter, 0.05))
        h.insert(draw.randint(0, len(h)), block)


@change(theirs=True)
def shared_block(model, draw, undo):
    if len(h := model.transformer.h):
        h.insert(draw.randint(0, len(h)), h[draw.randrange(len(h))])


@change(theirs=True)
def shared_parameter(model, draw, undo):
    h, name = model.transformer.h, draw.choice(["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2"])
    leaf, several = draw.choice(["weight", "bias"]), draw.random() < 0.5
    with contextlib.suppress(IndexError, AttributeError, KeyError):  # fewer blocks, other modules
        one = h[0].get_submodule(name)
        for other in h[1:] if several else h[1:2]:
            setattr(other.get_submodule(name), leaf, getattr(one, leaf))


@change(theirs=True)
def untied(model, draw, undo):
    head = model.lm_head
    if isinstance(head, nn.Linear) and "weight" in head._parameters:
        head.weight = nn.Parameter(like(draw, head.weight))


@change(theirs=True)
def tied(model, draw, undo):
    with contextlib.suppress(AttributeError, KeyError):  # of another class, or parametrized
        model.lm_head.weight = model.transformer.wte.weight


@change(theirs=True)
def transposed(model, draw, undo):
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 2 and "wte" not in name and draw.random() < 0.6:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(parameter.detach().t().contiguous().t()))


@change(theirs=True)
def strided(model, draw, undo):
    """Parts of something wider, or one number that stands for all."""
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1 and draw.random() < 0.6:
            n = len(parameter)
            wide = draw.choice([normal(draw, n, 3)[:, 1], normal(draw, 1).expand(n), normal(draw, n + 1)[1:]]) * 0.3
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(wide.to(parameter.dtype)))


@change(theirs=True)
def reordered(model, draw, undo):
    model.transformer.h = nn.ModuleList(draw.sample(list(model.transformer.h), len(model.transformer.h)))


@change(theirs=True)
def norm_without_bias(model, draw, undo):
    for norm in [module for module in model.modules() if isinstance(module, nn.LayerNorm)]:
        if draw.random() < 0.3:
            norm.bias = None
            norm.weight = norm.weight if draw.random() < 0.8 else None


@change(theirs=True)
def head_bias(model, draw, undo):
    if isinstance(model.lm_head, nn.Linear):
        model.lm_head.bias = nn.Parameter(like(draw, model.lm_head.weight[:, 0], 1))


@change(theirs=True)
def other_epsilon(model, draw, undo):
    for norm in [module for module in model.modules() if isinstance(module, nn.LayerNorm)]:
        if draw.random() < 0.5:
            norm.eps = 0.3


@change()
def other_activation(model, draw, undo):
    for mlp in [module for module in model.modules() if isinstance(module, MLP)]:
        if draw.random() < 0.7:
            mlp.act = draw.choice([nn.ReLU(), nn.GELU(), GELU()])


@change()
def other_scale(model, draw, undo):
    for attention in [module for module in model.modules() if isinstance(module, Attention)]:
        if draw.random() < 0.7:
            attention.scale = draw.choice([None, 0.1])


@change(theirs=True)
def other_mode(model, draw, undo):
    module = a_module(model, draw)
    (model if module is None or draw.random() < 0.5 else module).train(draw.random() < 0.7)


@change()
def cast_one(model, draw, undo):
    a_module(model, draw).to(draw.choice([torch.float32, torch.bfloat16, torch.float64]))


@change()
def no_parameter(model, draw, undo):
    """A weight that is a buffer, or the product of two others."""
    module = a_module(model, draw, Conv1D, LayerNorm, nn.Embedding)
    if module is not None and module._parameters.get("weight") is not None:
        weight = module.weight.detach().clone()
        del module.weight
        if draw.random() < 0.5:
            module.register_buffer("weight", weight)
        else:
            module.factor = nn.Parameter(torch.ones_like(weight[0]))
            module.weight = (weight * module.factor).detach()


@change()
def untrue_config(model, draw, undo):
    """Of what modules are, they tell themselves."""
    sizes = {"n_head": draw.choice([1, 4]), "n_layer": 7, "n_inner": 10, "layer_norm_epsilon": 0.5}
    model.config = model.config.model_copy(update=dict(draw.sample(list(sizes.items()), 2)))


@change()
def fewer_rows(model, draw, undo):
    """Than config tells of."""
    embedding = draw.choice([model.transformer.wte, model.transformer.wpe])
    if isinstance(embedding, nn.Embedding) and "weight" in embedding._parameters:
        embedding.weight = nn.Parameter(embedding.weight.detach()[: draw.choice([5, 15, 60])].clone())


@change()
def other_head(model, draw, undo):
    """Over other tokens: fewer than config tells of, or more."""
    if isinstance(model.lm_head, nn.Linear):
        outputs, C = draw.choice([40, V - 5, V + 30]), model.lm_head.weight.shape[1]
        model.lm_head = nn.Linear(C, outputs, bias=False, dtype=model.lm_head.weight.dtype)


class OwnConv1D(Conv1D):
    def forward(self, x, **options):
        return super().forward(x, **options) * 0.5


class OwnEmbedding(Embedding):
    def forward(self, tokens):
        return super().forward(tokens) * 2


class OwnNorm(LayerNorm):
    def forward(self, x):
        return -super().forward(x)


class OwnAttention(Attention):
    def forward(self, x, *rest):
        return super().forward(x * 0.5, *rest)


class OwnMLP(MLP):
    def forward(self, x):
        return super().forward(x) - x


class OwnBlock(Block):
    def forward(self, x, attend, seed):
        return super().forward(-x, attend, seed) * 0.5


class OwnLinear(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


class AlikeMLP(MLP):
    """Nothing is other."""


class OwnGPT2(GPT2):
    def forward(self, tokens, *rest, **options):
        return both(super().forward(tokens, *rest, **options), -1)


class OwnHidden(GPT2):
    def hidden(self, tokens, **options):
        return super().hidden(tokens, **options) * 2


OWN = {Conv1D: [OwnConv1D], Embedding: [OwnEmbedding], LayerNorm: [OwnNorm], Attention: [OwnAttention],
       MLP: [OwnMLP, AlikeMLP], Block: [OwnBlock], nn.Linear: [OwnLinear]}


@change()
def of_another_class(model, draw, undo):
    if (module := a_module(model, draw, *OWN)) is not None:
        module.__class__ = draw.choice(OWN[type(module)])


@change()
def more_than_its_parts(model, draw, undo):
    """The model itself: its class, its forward, its hooks."""
    factor = draw.choice(FACTORS)
    match draw.randrange(3):
        case 0 if type(model) is GPT2:
            model.__class__ = draw.choice([OwnGPT2, OwnHidden])
        case 1 if "forward" not in vars(model):
            model.forward = functools.partial(times, model, "forward", factor)
        case _:
            model.register_forward_hook(lambda _, inputs, output: both(output, factor))


class Positionless(nn.Module):
    """In the place of an attention or a block: mixes nothing."""

    def __init__(self, C, draw):
        super().__init__()
        self.weight = nn.Parameter(normal(draw, C, C) * 0.2)

    def forward(self, x, attend, seed):
        return torch.tanh(x @ self.weight)


class Sinusoids(nn.Module):
    """Positions without a parameter, or the table of an embedding without one."""

    def __init__(self, C, dtype, table=None):
        super().__init__()
        waves = torch.arange(P)[:, None] / 10 ** (torch.arange(C) / C)
        self.register_buffer("table", waves.sin().to(dtype) if table is None else table)

    def forward(self, at):
        return self.table[at]


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs):
        return torch.utils.checkpoint.checkpoint(self.inner, *inputs, use_reentrant=False)


def as_linear(conv, draw):
    linear = nn.Linear(*conv.weight.shape, dtype=conv.weight.dtype)
    linear.weight.data, linear.bias.data = conv.weight.detach().t().contiguous(), conv.bias.detach().clone()
    return linear


def as_torchs_norm(norm, draw):
    other = nn.LayerNorm(norm.weight.shape, norm.eps)
    other.load_state_dict(norm.state_dict())
    return other.to(norm.weight.dtype)


STANDS_IN = {
    Conv1D: [as_linear], LayerNorm: [as_torchs_norm, lambda norm, draw: nn.Identity()],
    Embedding: [lambda wte, draw: nn.Embedding.from_pretrained(wte.weight.detach().clone(), freeze=False),
                lambda wte, draw: Sinusoids(0, None, wte.weight.detach().clone())],
    nn.Embedding: [lambda wpe, draw: Sinusoids(wpe.weight.shape[1], wpe.weight.dtype)],
    MLP: [lambda mlp, draw: nn.Sequential(as_linear(mlp.c_fc, draw), nn.GELU(), as_linear(mlp.c_proj, draw))],
    Attention: [lambda attn, draw: Positionless(attn.c_proj.weight.shape[1], draw).to(attn.c_proj.weight.dtype)],
    Block: [lambda block, draw: Checkpointed(block),
            lambda block, draw: Positionless(block.ln_1.weight.shape[0], draw).to(block.ln_1.weight.dtype)],
    GELU: [lambda gelu, draw: nn.Tanh()],
    nn.Linear: [lambda head, draw: nn.Sequential(copy.deepcopy(head), nn.Tanh())],
}


@change()
def replaced(model, draw, undo):
    if found := places(model, *STANDS_IN):
        owner, name = draw.choice(found)
        module = owner._modules[name]
        with contextlib.suppress(AttributeError):  # of a module whose parts were replaced already
            setattr(owner, name, draw.choice(STANDS_IN[type(module)])(module, draw))


class Scaled(nn.Module):
    def __init__(self, inner, factor):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, *inputs):
        return self.inner(*inputs) * self.factor


class Lora(nn.Module):
    """x W + b + x A B; shown: with the weight and the bias of what it wraps."""

    def __init__(self, layer, draw, shown):
        super().__init__()
        self.layer, dtype = layer, layer.weight.dtype
        inputs, outputs = layer.weight.shape
        self.a = nn.Parameter((normal(draw, inputs, 2) * 0.3).to(dtype))
        self.b = nn.Parameter((normal(draw, 2, outputs) * 0.3).to(dtype))
        if shown:
            self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        return self.layer(x) + x @ self.a @ self.b


@change()
def wrapped(model, draw, undo):
    found = [place for place in places(model) if place[1] not in ("transformer", "h")]
    owner, name = draw.choice(found)
    setattr(owner, name, Scaled(owner._modules[name], draw.choice(FACTORS)))


@change()
def lora(model, draw, undo):
    shown, found = draw.random() < 0.5, places(model, Conv1D)
    for owner, name in draw.sample(found, min(len(found), draw.randint(1, 4))):
        if isinstance(owner._modules[name], Conv1D):
            setattr(owner, name, Lora(owner._modules[name], draw, shown))


@change()
def hooked(model, draw, undo):
    module, factor = a_module(model, draw), draw.choice(FACTORS)
    of_numbers = not isinstance(module, (nn.Embedding, GPT2))
    match draw.choice("forward pre backward before with".split()):
        case "pre" if of_numbers:
            module.register_forward_pre_hook(lambda _, inputs: scaled(inputs, factor))
        case "backward" if of_numbers:
            module.register_full_backward_hook(
                lambda _, inputs, outputs: tuple(None if g is None else g * factor for g in inputs))
        case "before" if of_numbers:
            module.register_full_backward_pre_hook(
                lambda _, outputs: tuple(None if g is None else g * factor for g in outputs))
        case "with":
            module.register_forward_hook(lambda _, inputs, options, output: scaled(output, factor), with_kwargs=True)
        case _:
            module.register_forward_hook(lambda _, inputs, output: scaled(output, factor))


@change(theirs=True)
def gradient_hooked(model, draw, undo):
    for parameter in draw.sample(parameters(model), 3):
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * 2)


@change()
def hooked_everywhere(model, draw, undo):
    kind, factor = draw.choice([Conv1D, LayerNorm, MLP, Attention, Block, Embedding, nn.Linear]), draw.choice(FACTORS)
    if kind is not Embedding and draw.random() < 0.5:
        register = nn.modules.module.register_module_forward_pre_hook
        hook = register(lambda module, inputs: scaled(inputs, factor) if type(module) is kind else None)
    else:
        register = nn.modules.module.register_module_forward_hook
        hook = register(lambda module, inputs, output: scaled(output, factor) if type(module) is kind else None)
    undo.callback(hook.remove)


@change()
def forward_of_an_instance(model, draw, undo):
    module, factor = a_module(model, draw), draw.choice(FACTORS)
    if "forward" not in vars(module):
        module.forward = functools.partial(times, module, "forward", factor)


@change()
def call_of_an_instance(model, draw, undo):
    module, factor = a_module(model, draw), draw.choice(FACTORS)
    if "_call_impl" not in vars(module):
        module._call_impl = functools.partial(times, module, "_call_impl", factor)


@change()
def hidden_of_the_model(model, draw, undo):
    factor = draw.choice(FACTORS)
    if "hidden" not in vars(model):
        model.hidden = functools.partial(times, model, "hidden", factor)


@change()
def forward_of_a_class(model, draw, undo):
    kind, factor = draw.choice([*WORDS, nn.Linear, nn.Embedding]), draw.choice(FACTORS)
    before, patch = kind.forward, undo.enter_context(pytest.MonkeyPatch.context())

    def forward(self, *inputs, **options):
        return scaled(before(self, *inputs, **options), factor)

    patch.setattr(kind, "forward", forward)


@change()
def call_of_all_modules(model, draw, undo):
    kind, factor = draw.choice([Conv1D, LayerNorm, MLP, Attention, Block, Embedding, nn.Linear]), draw.choice(FACTORS)
    name, patch = draw.choice(["__call__", "_call_impl"]), undo.enter_context(pytest.MonkeyPatch.context())
    before = getattr(nn.Module, name)

    def call(self, *inputs, **options):
        output = before(self, *inputs, **options)
        return scaled(output, factor) if type(self) is kind else output

    patch.setattr(nn.Module, name, call)


@change()
def other_heads(model, draw, undo):
    for attention in [module for module in model.modules() if isinstance(module, Attention)]:
        attention.n_head = draw.choice([1, 2, 4])


@change()
def dropout(model, draw, undo):
    for module in model.modules():
        if isinstance(module, (Attention, MLP)) and draw.random() < 0.6:
            module.residual_dropout = 0.5
            if isinstance(module, Attention) and draw.random() < 0.5:
                module.dropout = 0.5
    model.train(draw.random() < 0.7)


def _prune(module, inputs):
    module.weight.data.mul_(module.mask)


@change()
def pruned(model, draw, undo):
    if (module := a_module(model, draw, Conv1D, nn.Linear)) is not None and "weight" in module._parameters:
        mask = (normal(draw, *module.weight.shape) > -0.5).to(module.weight.dtype)
        module.mask = mask  # no part of its state
        module.register_forward_pre_hook(_prune)
        _prune(module, None)


@change()
def narrower(model, draw, undo):
    found = [module for module in model.modules() if type(module) is MLP]
    inner = draw.choice([16, 40])
    for mlp in found if draw.random() < 0.5 else found[:1]:
        if type(mlp.c_fc) is type(mlp.c_proj) is Conv1D:
            mlp.c_fc.weight = nn.Parameter(mlp.c_fc.weight.detach()[:, :inner].clone())
            mlp.c_fc.bias = nn.Parameter(mlp.c_fc.bias.detach()[:inner].clone())
            mlp.c_proj.weight = nn.Parameter(mlp.c_proj.weight.detach()[:inner].clone())


@change(harmless=True)
def parametrized_and_back(model, draw, undo):
    if (module := a_module(model, draw, Conv1D, nn.Linear)) is not None and "weight" in module._parameters:
        tied = [other for other in model.modules() if other._parameters.get("weight") is module.weight]
        nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
        nn.utils.parametrize.remove_parametrizations(module, "weight", leave_parametrized=draw.random() < 0.5)
        for other in tied:
            other.weight = module.weight


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@change()
def parametrized(model, draw, undo):
    if (module := a_module(model, draw, Conv1D, nn.Linear)) is not None and "weight" in module._parameters:
        nn.utils.parametrize.register_parametrization(module, "weight", Doubled())


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


def batch(draw):
    tokens = torch.tensor([[draw.randrange(V - 12) for _ in range(13)] for _ in range(draw.randint(1, 3))])
    T = draw.randint(1, 12)
    targets = tokens[:, 1 : T + 1].clone()
    if T > 2:
        targets[0, -1] = -100
    return tokens[:, :T].contiguous(), targets


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
