"""What somebody may do to a GPT-2, each a function of a model, a generator that draws, and a list of what undoes it.

A change is harmless where the fast paths must serve still, and theirs where a GPT2LMHeadModel can be changed so, too.
"""

import contextlib
import copy
import functools
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import nn

from fastlm.activations import GELU
from fastlm.gpt2 import GPT2, MLP, Attention, Block, Conv1D, Embedding, LayerNorm

V, P = 97, 24
KINDS = Conv1D, Embedding, LayerNorm, Attention, MLP, Block, GELU, GPT2
FACTORS = -1.0, 0.5, 2.0  # what a change multiplies by: no factor is mistaken for rounding
REFUSED = ValueError, TypeError, RuntimeError, IndexError  # torch's own words for what does not fit


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


def batch(draw):
    tokens = torch.tensor([[draw.randrange(V - 12) for _ in range(13)] for _ in range(draw.randint(1, 3))])
    T = draw.randint(1, 12)
    targets = tokens[:, 1 : T + 1].clone()
    if T > 2:
        targets[0, -1] = -100
    return tokens[:, :T].contiguous(), targets


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
    kind, factor = draw.choice([*KINDS, nn.Linear, nn.Embedding]), draw.choice(FACTORS)
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

