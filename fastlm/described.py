"""What a model is, by its modules: the config and the weights that stand for it in files."""

import warnings

import torch
from torch import nn

from fastlm import fast_path
from fastlm.activations import kind, name_of

WTE, HEAD, UP = "transformer.wte.weight", "lm_head.weight", "transformer.h.0.mlp.c_fc.weight"


def described(model):
    """(GPT2Config, {name: weight in fp32 on the CPU}) that say what a model is, whatever its own config says.

    Raises ValueError naming the first weight, or number, that no GPT-2 has: files would lose it. What classes of
    somebody's own make of their weights is lost too, of which a warning tells.
    """
    weights = _weights(model)
    config = _config(model, weights)
    with torch.device("meta"):
        plain = fast_path.plain_kind(model)(config)
        if HEAD in weights and len(weights[HEAD]) < config.vocab_size:
            raise ValueError(f"{NOT_SAVED}, lm_head has {len(weights[HEAD])} rows for {config.vocab_size} tokens")
        odd_head = HEAD in weights and weights[HEAD].shape != plain.lm_head.weight.shape
        if odd_head or "lm_head.bias" in weights:
            plain.lm_head = nn.Linear(config.n_embd, len(weights.get(HEAD, weights[WTE])), "lm_head.bias" in weights)
    wanted = {name: weight.shape for name, weight in plain.named_parameters()}
    if config.tie_word_embeddings:
        wanted.pop(HEAD, None)
    for name in sorted({*wanted, *weights}):
        if wanted.get(name) != (shape := weights[name].shape if name in weights else None):
            has = f"has shape {tuple(shape or ())}" if name in wanted else "is none of its"
            raise ValueError(f"{NOT_SAVED}, {name} {'is missing' if shape is None else has}: merge adapters before, or "
                             "keep everything with torch.save(model.state_dict(), PATH)")
    for name, found, as_config in _facts(model.transformer, plain.transformer):
        if found != as_config:
            raise ValueError(f"{NOT_SAVED}, transformer.{name} is {found}, but its config.json makes that {as_config}")
    if odd_head or "lm_head.bias" in weights:
        _warn("lm_head has a bias, or more rows than there are tokens: transformers' GPT-2 has none such")
    for name, module in plain.named_modules():
        own = model.get_submodule(name)
        if name and type(own) is not type(module) and not name.endswith(".act"):
            _warn(f"{name} is of a class of its own, {type(own).__name__}: its weights are saved, what it does is not")
            break
    return config, weights


NOT_SAVED = "this model cannot be saved as a GPT-2"


def _warn(told):
    warnings.warn(f"fastlm: {told}", stacklevel=5)


def _tied(model):
    weight = getattr(model.lm_head, "weight", None)
    return weight is not None and weight is getattr(model.transformer.wte, "weight", None)


def _weights(model):
    """Every parameter by name, those that stand in several places in each, and a tied head in wte's alone."""
    found, seen = {}, set()
    tied = _tied(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not (tied and name == HEAD):
            weight = parameter.detach().to("cpu", torch.float32).contiguous()
            if weight.untyped_storage().data_ptr() in seen:
                weight = weight.clone()
            seen.add(weight.untyped_storage().data_ptr())
            found[name] = weight
    return found


def _config(model, weights):
    config, blocks = model.config, model.transformer.h
    changes = {"n_layer": len(blocks), "tie_word_embeddings": _tied(model)}
    for name, weight in (("vocab_size", WTE), ("n_positions", "transformer.wpe.weight")):
        changes[name] = len(weights[weight]) if weight in weights else getattr(config, name)
    inner = weights[UP].shape[-1] if UP in weights else config.n_inner
    if inner != (config.n_inner or 4 * config.n_embd):
        changes["n_inner"] = inner
    if len(blocks):
        changes["n_head"] = getattr(blocks[0].attn, "n_head", config.n_head)
        changes["layer_norm_epsilon"] = getattr(blocks[0].ln_1, "eps", config.layer_norm_epsilon)
        changes["attn_pdrop"] = getattr(blocks[0].attn, "dropout", config.attn_pdrop)
        changes["resid_pdrop"] = getattr(blocks[0].attn, "residual_dropout", config.resid_pdrop)
        changes["activation_function"] = name_of(getattr(blocks[0].mlp, "act", None), config.activation_function)
    if (config.unpadded_vocab_size or 0) > changes["vocab_size"]:
        changes["unpadded_vocab_size"] = None
    return config.changed(**changes)


def _facts(parts, plain):
    """(name, what it is, what the config makes it) of all that a model's parts have beside weights."""
    names = [f"h.{layer}.{name}" for layer in range(len(parts.h)) for name in OF_A_BLOCK]
    for name in (*names, "ln_f.eps"):
        part, _, attribute = name.rpartition(".")
        own = getattr(plain.get_submodule(part), attribute)
        found = getattr(parts.get_submodule(part), attribute, own)
        yield name, *((_class(found), _class(own)) if isinstance(own, nn.Module) else (found, own))


def _class(act):
    return f"{kind(act).__module__}.{kind(act).__name__}"


OF_A_BLOCK = "attn.n_head", "attn.scale", "ln_1.eps", "ln_2.eps", "mlp.act"
