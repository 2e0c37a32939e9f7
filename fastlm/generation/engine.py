"""The decode engine of a CPU: a whole GPT-2 step in one native call, over weights that were packed once.

    (K, N) → panels (N/16, K/g, 16, g)     g = 1 fp32, 2 bf16, 4 int8: 64 bytes a step down a panel

The model's own forward is its reference: same cache, same tokens, sums in another order.
"""

import weakref

import torch
import torch.nn.functional as F

from fastlm import dispatch, native
from fastlm.gpt2 import GPT2

PANEL = 16  # csrc/cpu/panel.h, kPanel
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # how a model's weights are packed
_NUMBERS = {"fp32": 0, "bf16": 1, "int8": 2}  # csrc/fastlm.h, Weights
_GROUPS = {"fp32": 1, "bf16": 2, "int8": 4}
_packed = weakref.WeakKeyDictionary()  # model → (state of its parameters, Packed)


def why_not(model):
    """None where the engine can decode for a model, else a sentence."""
    if model.device.type != "cpu":
        return f"the decode engine runs on the CPU, the model is on {model.device}"
    if (reason := dispatch.machine_why_not("cpu")) is not None:
        return reason
    if (forced := dispatch.forced("decode_attention")) is not None:
        return f"the backend {forced} is forced: the model's own ops decode"
    if model.dtype not in KINDS or any(p.dtype != model.dtype for p in model.parameters()):
        return f"the decode engine takes float32 and bfloat16, the model is {model.dtype}"
    if type(model) is not GPT2 or any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "the model is not plain: a class of its own, or hooks that the engine would not call"
    return None


class Engine:
    """Decodes for a model over a KVCache, which it fills as the model would."""

    def __init__(self, model, cache):
        B, V = len(cache.lengths), model.config.vocab_size
        self._weights, self._cache, self._model = packed(model), cache, model
        self._logits = torch.zeros(B, -(-V // (2 * PANEL)) * 2 * PANEL)
        pages = zip(cache.k_pages, cache.v_pages)
        addresses = [[*norms, k.data_ptr(), v.data_ptr(), *matrices]
                     for (norms, matrices), (k, v) in zip(self._weights.addresses, pages)]
        self._layers = torch.tensor(addresses, dtype=torch.int64)  # (L, 22)

    def __call__(self, new, counts):
        """Logits (B, V) fp32, valid until the next call, behind new (B,) int64; a row whose count (B,) is 0 waits."""
        weights, cache, config = self._weights, self._cache, self._model.config
        parts = self._model.transformer
        native.cpu.gpt2_step(
            self._logits, self._layers, weights.head, weights.ln_f, parts["wte"].weight, parts["wpe"].weight,
            new[:, None], cache.lengths, counts, cache.block_table, H=config.n_head, D=config.n_embd // config.n_head,
            inner=config.n_inner or 4 * config.n_embd, page=cache.k_pages[0].shape[1],
            epsilon=config.layer_norm_epsilon, weights=_NUMBERS[weights.kind], head_weights=_NUMBERS[weights.kind],
        )
        cache.lengths += counts
        return self._logits[:, : config.vocab_size]


class Packed:
    """The weights of a model as the engine reads them; `addresses`: of norms and matrices, a pair a layer."""

    def __init__(self, model, kind):
        self.kind, self._kept = kind, []
        parts = model.transformer
        self.addresses = [self._layer(block, kind) for block in parts["h"]]
        self.ln_f = [self._keep(parameter.detach().float()) for parameter in (parts["ln_f"].weight, parts["ln_f"].bias)]
        self.head = pack(parts["wte"].weight.detach().T, kind)

    def _layer(self, block, kind):
        norms = [self._keep(p.detach().float()).data_ptr() for ln in (block.ln_1, block.ln_2) for p in (ln.weight, ln.bias)]
        matrices = []
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            panels, scale, sums = pack(linear.weight.detach(), kind)
            bias = F.pad(linear.bias.detach().float(), (0, -len(linear.bias) % PANEL))
            matrices += [0 if tensor is None else self._keep(tensor).data_ptr() for tensor in (panels, bias, scale, sums)]
        return norms, matrices

    def _keep(self, tensor):
        self._kept.append(tensor)
        return tensor


def packed(model):
    """The Packed weights of a model, made anew when a parameter has changed."""
    state = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]
    found = _packed.get(model)
    if found is None or found[0] != state:
        found = _packed[model] = state, Packed(model, KINDS[model.dtype])
    return found[1]


def pack(w, kind):
    """(panels, scale, sums) of w (K, N): int8 has a scale an output, fp32 (N,), and sums over K, int32 (N,)."""
    (K, N), group = w.shape, _GROUPS[kind]
    w = F.pad(w, (0, -N % PANEL, 0, -K % group))
    scale = sums = None
    if kind == "int8":
        w = w.float()
        scale = w.abs().amax(0) / 127
        w = torch.round(w / scale.clamp(min=torch.finfo(torch.float32).tiny)).to(torch.int8)
        sums = w.sum(0, dtype=torch.int32)
    panels = w.view(w.shape[0] // group, group, -1, PANEL).permute(2, 0, 3, 1).contiguous()
    return panels, scale, sums
