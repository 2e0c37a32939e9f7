"""The engine of a CPU: a whole GPT-2 step, prompts or newest tokens, in one native call over weights packed once.

    (K, N) → panels (N/16, K/g, 16, g)     g = 1 fp32, 2 bf16, 4 int8: 64 bytes a step down a panel; int4 see `_int4`

The model's own forward is its reference: same cache, same tokens, sums in another order. A quantised model's weights
are packed as int8 or int4, and meet activations that are rounded to int8, a scale a row.
"""

import mmap
import weakref

import torch
import torch.nn.functional as F

from fastlm import fast_path
from fastlm.backends import native
from fastlm.backends.machine import machine_why_not
from fastlm.dispatch.forcing import forced
from fastlm.measure import tuned
from fastlm.quantised import GROUP, head_kind, quantise

HUGE = 2**21  # bytes of a huge page
PANEL = 16  # csrc/fastlm.h, kPanel
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # how a model's weights are packed
ROWS = 2048  # most new tokens of one call: what it works on takes 27 KB a row at C = 768
SOME = 32  # elements, or a few more, that are kept of every parameter
_NUMBERS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}  # csrc/fastlm.h, Weights
_GROUPS = {"fp32": 1, "bf16": 2, "int8": 4}
_packed = weakref.WeakKeyDictionary()  # model → (state of its parameters, some of their elements, Packed)


def why_not(model):
    """None where the engine can run a model, else a sentence."""
    if model.device.type != "cpu":
        return f"the engine runs on the CPU, the model is on {model.device}"
    if (reason := machine_why_not("cpu")) is not None:
        return reason
    if (backend := forced("decode_attention")) is not None:
        return f"the backend {backend} is forced: the model's own ops run"
    if model.dtype not in KINDS or any(p.dtype != model.dtype for p in model.parameters()):
        return f"the engine takes float32 and bfloat16, the model is {model.dtype}"
    return fast_path.why_not(model)


def cache_dtype(model):
    """The dtype of the keys and values that the engine keeps: those of quantised weights are rounded to bf16."""
    return torch.bfloat16 if model.quantised else model.dtype


class Engine:
    """Runs a model over a KVCache, which it fills as the model would; the cache must not be replaced meanwhile."""

    def __init__(self, model, cache):
        weights, config, parts = packed(model), model.config, model.transformer
        layers = torch.tensor([[*norms, k.data_ptr(), v.data_ptr(), *matrices]
                               for (norms, matrices), k, v in zip(weights.addresses, cache.k_pages, cache.v_pages)],
                              dtype=torch.int64)  # (L, 22)
        self._kept = weights, model, layers
        self._cache, self._V = cache, config.vocab_size
        self._logits = self._room(len(cache.lengths))
        panels, scale, sums = (0 if tensor is None else tensor.data_ptr() for tensor in weights.head)
        stride_p, stride_s, stride_h, _ = cache.k_pages[0].stride()
        self._fields = {  # csrc/fastlm.h, Gpt2Step: what no call changes
            "layers": layers.data_ptr(), "head": panels, "head_scale": scale, "head_sums": sums,
            "ln_f_w": weights.ln_f[0].data_ptr(), "ln_f_b": weights.ln_f[1].data_ptr(),
            "wte": parts["wte"].weight.data_ptr(), "wpe": parts["wpe"].weight.data_ptr(),
            "positions": cache.lengths.data_ptr(), "block_table": cache.block_table.data_ptr(),
            "stride_p": stride_p, "stride_s": stride_s, "stride_h": stride_h, "L": config.n_layer, "H": config.n_head,
            "D": config.n_embd // config.n_head, "V": self._V, "inner": config.n_inner or 4 * config.n_embd,
            "page": cache.k_pages[0].shape[1], "max_pages": cache.block_table.shape[1],
            "epsilon": config.layer_norm_epsilon, "weights": _NUMBERS[weights.kind],
            "head_weights": _NUMBERS[head_kind(weights.kind)], "dtype": model.dtype,
            "page_dtype": cache.k_pages[0].dtype, **tuned.cut("gpt2_step", weights.kind),
        } | _NO_DRAW

    def __call__(self, tokens, counts):
        """Logits (B, V) fp32 behind the last of counts (B,) int32 tokens (B, T) int64, valid until the next call.

        A row whose count is 0 waits. Ids, counts and the room in the cache are the caller's to check.
        """
        taken = 0
        while taken < len(tokens):  # as many sequences at once as ROWS allows, one at least
            rows = counts[taken:].cumsum(0)
            many = max(1, int((rows <= ROWS).sum()))
            now = torch.zeros_like(counts)
            now[taken : taken + many] = counts[taken : taken + many]
            self._step(tokens, now, self._logits)
            taken += many
        return self._logits[:, : self._V]

    def decoding(self, tokens, counts, sampler, uniform):
        """A function without arguments: a step of tokens (B,) int64, which become those drawn as a Sampler says.

        Its first call draws with column 1 of uniform (B, steps) fp64. A row whose count, of (B,) int32, is 0 waits and
        keeps its token.
        """
        step = torch.ones(1, dtype=torch.int64)
        run = self._prepared(tokens[:, None], counts, self._logits, ids=tokens.data_ptr(), uniform=uniform.data_ptr(),
                             step=step.data_ptr(), stride_u=uniform.stride(0), choices=sampler.choices,
                             **sampler.fields)
        self._cache.filled()

        def decode(kept=(self, tokens, counts, uniform, step)):
            run()

        return decode

    def every(self, tokens):
        """Logits (B, T, V) fp32 behind every one of tokens (B, T)."""
        B, T = tokens.shape
        logits = self._room(B * T)
        self._step(tokens, torch.full((B,), T, dtype=torch.int32), logits, every=1)
        return logits[:, : self._V].view(B, T, self._V)

    def _room(self, rows):
        return torch.zeros(rows, -(-self._V // (2 * PANEL)) * 2 * PANEL)

    def _step(self, tokens, counts, logits, **fields):
        tokens = tokens.contiguous()
        self._prepared(tokens, counts, logits, **fields)()
        self._cache.filled()

    def _prepared(self, tokens, counts, logits, **fields):
        B, T = tokens.shape
        return native.cpu.gpt2_step(self._fields | {"logits": logits.data_ptr(), "tokens": tokens.data_ptr(),
                                                    "counts": counts.data_ptr(), "B": B, "T": T} | fields)


_NO_DRAW = {"every": 0, "ids": 0, "uniform": 0, "step": 0, "stride_u": 0, "choices": 0, "temperature": 0.0, "top_k": 0,
            "top_p": 1.0}


class Packed:
    """The weights of a model as the engine reads them; `addresses`: of norms and matrices, a pair a layer."""

    def __init__(self, model, kind):
        self.kind, self._kept = kind, []
        parts = model.transformer
        self.addresses = [self._layer(block, kind) for block in parts["h"]]
        self.ln_f = [self._keep(p.detach().float()) for p in (parts["ln_f"].weight, parts["ln_f"].bias)]
        panels, scale, sums = pack(parts["wte"].weight.detach().T, head_kind(kind))
        self.head = on_huge_pages(panels), scale, sums

    def _layer(self, block, kind):
        norms = [self._keep(parameter.detach().float()).data_ptr()
                 for ln in (block.ln_1, block.ln_2) for parameter in (ln.weight, ln.bias)]
        matrices = []
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            panels, scale, sums = pack(linear.weight.detach(), kind)
            bias = F.pad(linear.bias.detach().float(), (0, -len(linear.bias) % PANEL))
            matrices += [0 if tensor is None else self._keep(tensor).data_ptr()
                         for tensor in (panels, bias, scale, sums)]
        return norms, matrices

    def _keep(self, tensor):
        tensor = on_huge_pages(tensor)
        self._kept.append(tensor)
        return tensor


def on_huge_pages(tensor):
    """The tensor, or a copy in pages of 2 MiB where it is that large and the system has them: fewer to look up."""
    if tensor.nbytes < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    memory = mmap.mmap(-1, tensor.nbytes + HUGE)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return tensor
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the memory
    start = -whole.data_ptr() % HUGE
    return whole[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def packed(model):
    """The Packed weights of a model, made anew when a parameter has changed.

    torch counts changes in place, but for those through `.data`: these show where they reach one of some elements that
    are kept of every parameter.
    """
    parameters = [p.detach() for p in model.parameters()]
    state = [model.quantised, *((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())]
    some = torch.cat([p.reshape(-1)[:: max(1, p.numel() // SOME)] for p in parameters])
    found = _packed.get(model)
    if found is None or found[0] != state or not torch.equal(found[1], some):
        found = _packed[model] = state, some, Packed(model, model.quantised or KINDS[model.dtype])
    return found[2]


def pack(w, kind):
    """(panels, scale, sums) of w (K, N): int8 has a scale an output, fp32 (N,), and sums over K, int32 (N,)."""
    if kind == "int4":
        return _int4(w), None, None
    scale = sums = None
    if kind == "int8":
        w, scale = quantise(w, kind)
        scale = F.pad(scale, (0, -len(scale) % PANEL))
    (K, N), group = w.shape, _GROUPS[kind]
    w = F.pad(w, (0, -N % PANEL, 0, -K % group))
    if kind == "int8":
        sums = w.sum(0, dtype=torch.int32)
    return w.view(-1, group, w.shape[1] // PANEL, PANEL).permute(2, 0, 3, 1).contiguous(), scale, sums


def _int4(w):
    """Panels (N/16, K/64, 576) uint8: of a group the 16 scales, fp32, then 8 steps of 16 outputs by 8 k, a half byte
    each: k = 0 … 3 in the low halves of an output's 4 bytes, 4 … 7 in the high ones.
    """
    q, scale = quantise(w, "int4")
    K, N = q.shape
    q = F.pad(q, (0, -N % PANEL, 0, -K % GROUP)) + 8  # 0 … 15
    scale = F.pad(scale, (0, -N % PANEL))
    groups, panels = len(scale), scale.shape[1] // PANEL
    q = q.view(groups, 8, 2, 4, panels, PANEL).permute(4, 0, 1, 5, 2, 3).to(torch.uint8)  # (…, 8 steps, 16, 2, 4)
    bytes = (q[..., 0, :] | q[..., 1, :] << 4).reshape(panels, groups, 512)
    scale = scale.view(groups, panels, PANEL).transpose(0, 1).contiguous().view(torch.uint8)  # (panels, groups, 64)
    return torch.cat([scale, bytes], 2)
