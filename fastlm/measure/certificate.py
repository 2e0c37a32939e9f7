"""The parity certificate: every op and a whole model, on every backend that runs here, against fp64 and transformers.

The truth is the `reference` backend in fp64, the measure the same backend in the dtype under test (numerics.py).
Where transformers is installed, fp32 logits and loss are also held to its GPT-2: allowed is four times the difference
between its own two attention implementations, at least 8 rounding units. Only dispatch refuses: a kernel that raises
has failed, and so has its line. What ran every torch op is recorded: a backend may leave part of an op to another.
"""

import copy
import importlib.util
import math
from collections import Counter
from dataclasses import asdict, dataclass, field

import torch

from fastlm import dispatch, ops
from fastlm.backends.machine import BACKENDS, devices, machine_why_not
from fastlm.dispatch.forcing import use
from fastlm.dispatch.refusal import Refused, failure
from fastlm.dispatch.table import backends_of
from fastlm.generation import KVCache
from fastlm.gpt2 import GPT2, GPT2Config
from fastlm.measure.numerics import DTYPES, compare, norm_ratio


@dataclass(frozen=True)
class Line:
    """One quantity on one backend in one dtype; it holds where ratio (error / allowed) is at most 1.

    A line that was refused has ratio 0, one whose kernel raised an infinite one; `note` says why, and the line stands
    for all quantities of an op, or of a model.
    """

    path: str  # op, model or transformers
    what: str
    backend: str  # that was asked for
    dtype: str
    ratio: float
    note: str = ""
    outcome: str = "measured"  # or refused or failed
    ran: dict[str, str] = field(default_factory=dict)  # torch op → the backend that ran it for this quantity

    @property
    def holds(self):
        return self.ratio <= 1

    @property
    def by(self):
        """What ran it, the backend that was asked for first, if at all: cuda+torch."""
        names = dict.fromkeys(name for names in self.ran.values() for name in names.split("+"))
        return "+".join(sorted(names, key=lambda name: name != self.backend)) or self.backend


def certify(*, model=None, device="cpu", backends=None, seed=0, say=lambda what: None):
    """Yields a Line for every quantity; `model`: a GPT2 to check in place of a small random one and the single ops.

    Each of `backends` (unless given, all that run on tensors of `device`) is forced in turn, in every dtype that it
    takes. say(what) tells progress. Raises ValueError for an unknown backend, `Refused` for one that this
    machine cannot run; what a kernel raises becomes a line.
    """
    names = [name for name in BACKENDS if name != "reference" and machine_why_not(name) is None
             and device in devices(name)]
    for name in backends or ():
        with use(name):  # raises where it cannot run, before anything is computed
            pass
    names = names if not backends else list(dict.fromkeys(backends))
    whole = _random_model(seed).to(device) if model is None else model
    for family, case in CASES.items() if model is None else ():
        for dtype in DTYPES:
            say(f"{family} in {dtype}")
            yield from _guarded(_op_lines(family, case, names, dtype, device, seed), "op", family, dtype)
    for dtype in ("fp32", "bf16"):
        yield from _guarded(_model_lines(whole, names, dtype, seed, say), "model", "all", dtype)
    yield from _transformers_lines(whole, names, seed, say)


def as_dict(line):
    """A line as JSON holds it; its ratio is None where it is no number."""
    ratio = line.ratio if math.isfinite(line.ratio) else None
    return {**asdict(line), "ratio": ratio, "by": line.by, "holds": line.holds}


def unmeasured(lines, backends):
    """backend → the sentence why nothing of it was measured, for those of `backends` of which that is so."""
    told = {}
    for name in backends:
        mine = [line for line in lines if line.backend == name]
        if any(line.outcome == "measured" and name in line.by.split("+") for line in mine):
            continue
        if not mine:
            why = "no op has it"
        elif all(line.outcome == "measured" for line in mine):
            why = f"what it was asked for ran on {' and '.join(dict.fromkeys(line.by for line in mine))}"
        else:
            first = next(line for line in mine if line.outcome != "measured")
            why = f"{first.what} in {first.dtype} {first.note}"
        told[name] = f"{name} measured nothing: {why}"
    return told


def _guarded(lines, path, what, dtype):
    """The lines, and a failed one of `reference` where the truth could not be computed."""
    try:
        yield from lines
    except Exception as error:
        yield _raised(path, what, "reference", dtype, error, failed=True)


def _raised(path, what, backend, dtype, error, calls=None, *, failed=None):
    """The line of what raised: a refusal where dispatch did, else a failure, unless `failed` says."""
    ran = _ran(calls or {}, backward=True)
    if failed is None:
        failed = not isinstance(error, Refused)
    if failed:
        return Line(path, what, backend, dtype, math.inf, f"failed: {failure(error)}", "failed", ran)
    told = str(error) if isinstance(error, Refused) else failure(error)
    return Line(path, what, backend, dtype, 0.0, f"refused: {told}", "refused", ran)


def _ran(calls, *, backward):
    """torch op → backend (several joined by +) of recorded calls, without those of the backward unless asked for."""
    ran = {}
    for op, backend in calls:
        if backward or not op.endswith("_bwd"):
            ran[op] = f"{ran[op]}+{backend}" if op in ran else backend
    return ran


# ---- ops: what an op computes in its own example (fastlm/ops/<op>.py)


CASES = {family: ops.module(family).example for family in ops.FAMILIES}


def _op_lines(family, case, names, dtype, device, seed):
    def run(name, computed):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):  # rounded to the dtype under test: all compute on the same numbers
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPES[dtype])

        with use(**{family: name}):
            return case(random, lambda x: x.to(device, computed))

    truth, composed = run("reference", torch.float64), run("reference", DTYPES[dtype])
    for name in names:
        if name not in backends_of(family):
            continue
        lines = []
        with dispatch.record() as calls:
            try:
                for what, value in run(name, DTYPES[dtype]).items():
                    backward = what[0] == "d"
                    ratio = _ratio(value, composed[what], truth[what], backward=backward)
                    lines.append(Line("op", f"{family} {what}", name, dtype, ratio, ran=_ran(calls, backward=backward)))
            except Exception as error:
                lines = [_raised("op", family, name, dtype, error, calls)]
        yield from lines


def _ratio(got, composed, truth, *, backward=False):
    try:
        return compare(got.cpu(), composed.cpu(), truth.cpu().double(), backward=backward).ratio
    except AssertionError:  # NaN or infinity out of place
        return math.inf


# ---- the model


def _random_model(seed):
    """A small model without dropout, its weights large enough that a wrong scale shows."""
    off = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = GPT2(GPT2Config(vocab_size=257, n_positions=48, n_embd=64, n_layer=3, n_head=2, **off))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.2)
    return model.eval()


def _batch(model, seed):
    """tokens and targets (2, T), a part of the targets ignored."""
    T = min(model.config.n_positions, 128) - 1
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (2, T + 1), generator=generator).to(model.device)
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].clone()
    targets[1, T // 2 :] = -100
    return tokens, targets


def _step(model, tokens, targets, calls=None):
    """Layers, logits, loss and gradients of a step, and the logits of the last token decoded through a cache.

    Returns (quantity → value, quantity → the torch ops that ran for it), the latter of `calls`, a record that is open.
    """
    layers, hooks, calls = {}, [], Counter() if calls is None else calls
    for index, block in enumerate(model.transformer["h"]):
        hooks.append(block.register_forward_hook(
            lambda module, inputs, output, index=index: layers.update({f"layer {index}": output.detach()})))
    model.zero_grad()
    try:
        logits = model(tokens)[0]
    finally:
        for hook in hooks:
            hook.remove()
    forward = Counter(calls)
    loss = model.loss(tokens, targets)  # without hooks: in whole blocks, where the model takes them so
    loss.backward()
    training = calls - forward
    gradients = {f"gradient {name}": p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.inference_mode():
        B, T = tokens.shape
        cache = KVCache(model.config, B, T, device=model.device, dtype=model.dtype)
        for part in tokens.split([T - 1, 1], dim=1):
            counts = torch.full((B,), part.shape[1], dtype=torch.int32, device=model.device)
            positions = cache.begin(counts, part.shape[1])
            hidden = model.hidden(part, positions=positions, cache=cache)
            cache.end()
        decoded = model.lm_head(hidden[:, -1])
    quantities = {"logits": logits.detach(), "loss": loss.detach()[None], "decoded logits": decoded.clone()}
    ran = {
        "logits": _ran(forward, backward=False), "decoded logits": _ran(calls - forward - training, backward=False),
        "loss": _ran(training, backward=False), "gradients": _ran(training, backward=True),
    }
    return {**layers, **quantities, **gradients}, ran


def _model_lines(model, names, dtype, seed, say):
    tokens, targets = _batch(model, seed)
    ours = copy.deepcopy(model).to(DTYPES[dtype])
    say(f"a model in {dtype}: the truth in fp64")
    with use("reference"):
        truth, _ = _step(copy.deepcopy(ours).double(), tokens, targets)
        composed, _ = _step(ours, tokens, targets)
    for name in names:
        say(f"a model in {dtype} on {name}")
        with dispatch.record() as calls:
            try:
                with use(name):
                    got, ran = _step(ours, tokens, targets, calls)
                lines = list(_quantities(got, composed, truth, ran, name, dtype))
            except Exception as error:
                lines = [_raised("model", "all", name, dtype, error, calls)]
        yield from lines


def _quantities(got, composed, truth, ran, name, dtype):
    """The lines of a step."""
    layers = {what: norm_ratio(got[what], composed[what], truth[what]) for what in got if what.startswith("layer")}
    astray = next((what for what, ratio in layers.items() if not ratio <= 1), None)
    for what in ("logits", "loss", "decoded logits"):
        # A loss is a mean over tokens: what is left of their rounding is a 64th of the dtype's unit.
        least = torch.finfo(DTYPES[dtype]).eps / 64 if what == "loss" else 0.0
        ratio = norm_ratio(got[what], composed[what], truth[what], least=least)
        note = f"first astray in {astray}" if astray and ratio > 1 else ""
        yield Line("model", what, name, dtype, ratio, note, ran=ran[what])
    # The key bias has no effect on the loss: its gradient is rounding.
    worst = max((what for what in got if what.startswith("gradient") and not what.endswith("c_attn.bias")),
                key=lambda what: norm_ratio(got[what], composed[what], truth[what]))
    ratio = norm_ratio(got[worst], composed[worst], truth[worst])
    yield Line("model", "gradients", name, dtype, ratio, worst if ratio > 1 else "", ran=ran["gradients"])


def transformers_twin(model, **options):
    """transformers' GPT2LMHeadModel with a model's config, weights and device; options go to its config."""
    import transformers

    values = {key: value for key, value in model.config.dump().items() if key != "dtype"}
    twin = transformers.GPT2LMHeadModel(transformers.GPT2Config(**values, **options))
    twin.load_state_dict(model.state_dict())
    return twin.to(model.device)


def _transformers_lines(model, names, seed, say):
    if importlib.util.find_spec("transformers") is None:
        return
    try:
        ours = copy.deepcopy(model).float()
        tokens, targets = _batch(model, seed)
        eager, sdpa = (_theirs(ours, tokens, targets, attention, say) for attention in ("eager", "sdpa"))
    except Exception as error:  # theirs, not ours
        yield _raised("transformers", "all", "transformers", "fp32", error, failed=False)
        return
    for name in names:
        with dispatch.record() as calls:
            try:
                with use(name), torch.no_grad():
                    logits, loss = ours(tokens, targets)
                ratios = {what: _against(value, eager[what], sdpa[what])
                          for what, value in {"logits": logits, "loss": loss[None]}.items()}
                ran = _ran(calls, backward=False)
                lines = [Line("transformers", what, name, "fp32", ratio, ran=ran) for what, ratio in ratios.items()]
            except Exception as error:
                lines = [_raised("transformers", "all", name, "fp32", error, calls)]
        yield from lines


def _theirs(model, tokens, targets, attention, say):
    say(f"transformers' GPT-2, {attention} attention")
    with torch.no_grad():
        logits = transformers_twin(model, attn_implementation=attention).eval()(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return {"logits": logits, "loss": loss[None]}


def _against(got, eager, sdpa):
    """The distance from eager, over four times that of sdpa."""
    largest, between = float(eager.abs().max()), float((sdpa - eager).abs().max())
    allowed = 4 * max(between, 8 * torch.finfo(torch.float32).eps * largest)
    error = float((got - eager).abs().max())
    return error / allowed if error == error else math.inf
