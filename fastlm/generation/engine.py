"""The engine of a CPU: a whole GPT-2 step, prompts or newest tokens, in one native call over weights packed once.

    (K, N) → panels (N/16, K/g, 16, g)     g = 1 fp32, 2 bf16, 4 int8: 64 bytes a step down a panel; int4 see `_int4`

The model's own forward is its reference: same cache, same tokens, sums in another order. A quantised model's weights
are packed as int8 or int4, and meet activations that are rounded to int8, a scale a row.
"""

import mmap

import torch
import torch.nn.functional as F

from fastlm import fast_path
from fastlm.backends import native
from fastlm.backends.machine import machine_why_not
from fastlm.dispatch.forcing import forced
from fastlm.generation import derived
from fastlm.generation.cache import KVCache
from fastlm.measure import tuned
from fastlm.quantised import GROUP, head_kind, quantise

HUGE = 2**21  # bytes of a huge page
PANEL = 16  # csrc/fastlm.h, kPanel
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # how a model's weights are packed
SPARE = 2**27  # bytes of a cache that is kept for the next: 28 sequences of 64 positions of GPT-2 124M in fp32
ROWS = 2048  # most new tokens of one call: what it works on takes 27 KB a row at C = 768
WORTH_READING = 100  # new tokens: all weights are read once more to see that they are the same, as long as one takes
NARROWER = {"int8": 4, "int4": 8}  # as they are packed than as they are held
_NUMBERS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}  # csrc/fastlm.h, Weights
_GROUPS = {"fp32": 1, "bf16": 2, "int8": 4}


def why_not(model):
    """None where the engine can run a model, else a sentence."""
    return serving(model)[1]


def serving(model):
    """(fast_path.Sizes, None) of a model that the engine can run, or (None, the sentence why not)."""
    if model.device.type != "cpu":
        return None, f"the engine runs on the CPU, the model is on {model.device}"
    if (reason := machine_why_not("cpu")) is not None:
        return None, reason
    if (backend := forced("decode_attention")) is not None:
        return None, f"the backend {backend} is forced: the model's own ops run"
    if model.dtype not in KINDS:
        return None, f"the engine takes float32 and bfloat16, the model is {model.dtype}"
    if (reason := fast_path.why_not(model)) is not None:
        return None, reason
    return fitting(model)


def fitting(model):
    """(Sizes, None) of a plain model whose parameters are as the engine's kernels read them, or (None, a sentence)."""
    fit, told = fast_path.sizes(model)
    if told is not None:
        return None, told
    parts, config = model.transformer, model.config
    wte, wpe, head = parts.wte.weight, parts.wpe.weight, model.lm_head.weight
    V, P, C = len(wte), len(wpe), fit.C
    for name, weight, shape in (("transformer.wte.weight", wte, (V, C)), ("transformer.wpe.weight", wpe, (P, C)),
                                ("transformer.ln_f.weight", parts.ln_f.weight, (C,)),
                                ("transformer.ln_f.bias", parts.ln_f.bias, (C,)), ("lm_head.weight", head, (V, C))):
        if weight is None or weight.shape != shape or weight.dtype != fit.dtype or weight.device != wte.device:
            told = "missing" if weight is None else f"{tuple(weight.shape)} {weight.dtype} on {weight.device}"
            return None, f"{name} is {told}, wanted {shape} {fit.dtype} on {wte.device}"
    if V < config.vocab_size or P < config.n_positions:
        return None, (f"there are {V} tokens and {P} positions, but config has {config.vocab_size} and "
                      f"{config.n_positions}")
    if parts.ln_f.eps != fit.epsilon or model.lm_head.bias is not None or parts.wpe.max_norm is not None:
        return None, "the last norm has another epsilon than blocks, the head a bias, or the positions a largest norm"
    if model.quantised and head is not wte:
        return None, "lm_head.weight is not transformer.wte.weight, as it is where a model is quantised"
    for weight in _weights(model, fit.weights):
        if type(weight.data) is not torch.Tensor or weight.layout != torch.strided:
            name = next((name for name, parameter in model.named_parameters() if parameter is weight), "a weight")
            return None, f"{name} is a {type(weight.data).__name__}, of which the kernels know no layout"
    return fit, None


def cache_dtype(model):
    """The dtype of the keys and values that the engine keeps: those of quantised weights are rounded to bf16."""
    return torch.bfloat16 if model.quantised else model.dtype


def make_cache(model, weights, batch, capacity):
    """A KVCache for an Engine of these Packed weights, or, None, for the model's own modules."""
    options = {"device": model.device, "layers": len(model.transformer.h)}
    if weights is None:
        return KVCache(model.config, batch, capacity, dtype=model.dtype, **options)
    heads = weights.sizes.heads, weights.sizes.C // weights.sizes.heads
    return KVCache(model.config, batch, capacity, dtype=cache_dtype(model), heads=heads, memory=weights.spare(),
                   **options)


class Engine:
    """Runs a model over a KVCache, which it fills as the model would; the cache must not be replaced meanwhile.

    weights: its Packed ones, where the caller has them. Raises ValueError for a cache that is not the model's.
    """

    def __init__(self, model, cache, weights=None):
        weights = packed(model) if weights is None else weights
        fit, first = weights.sizes, cache.k_pages[0]
        D = fit.C // fit.heads
        _check_cache(cache, len(weights.addresses), fit.heads, D)
        layers = torch.tensor([[*norms, k.data_ptr(), v.data_ptr(), *matrices]
                               for (norms, matrices), k, v in zip(weights.addresses, cache.k_pages, cache.v_pages,
                                                                  strict=True)],
                              dtype=torch.int64, device="cpu")  # (L, 22)
        self._kept = weights, layers, tuple(cache.k_pages), tuple(cache.v_pages), cache.block_table, cache.lengths
        self._cache, self._B, self._V = cache, len(cache.lengths), len(weights.wte)
        self._logits = self._room(self._B)
        panels, scale, sums = (0 if tensor is None else tensor.data_ptr() for tensor in weights.head)
        stride_p, stride_s, stride_h, _ = first.stride()
        self._fields = {  # csrc/fastlm.h, Gpt2Step: what no call changes
            "layers": layers.data_ptr(), "head": panels, "head_scale": scale, "head_sums": sums,
            "ln_f_w": weights.ln_f[0].data_ptr(), "ln_f_b": weights.ln_f[1].data_ptr(),
            "wte": weights.wte.data_ptr(), "wpe": weights.wpe.data_ptr(),
            "positions": cache.lengths.data_ptr(), "block_table": cache.block_table.data_ptr(),
            "stride_p": stride_p, "stride_s": stride_s, "stride_h": stride_h, "L": len(weights.addresses),
            "H": fit.heads, "D": D, "V": self._V, "inner": fit.inner, "page": first.shape[1],
            "max_pages": cache.block_table.shape[1], "pages": len(first), "P": len(weights.wpe),
            "epsilon": fit.epsilon, "weights": _NUMBERS[weights.kind],
            "head_weights": _NUMBERS[head_kind(weights.kind)], "dtype": weights.wte.dtype,
            "page_dtype": first.dtype, **tuned.cut("gpt2_step", weights.kind),
        } | _NO_DRAW

    def __call__(self, tokens, counts):
        """Logits (B, V) fp32 behind the last of counts (B,) int32 tokens (B, T) int64, valid until the next call.

        A row whose count is 0 waits. Raises ValueError for ids, counts and positions that model or cache have not.
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
        step = torch.ones(1, dtype=torch.int64, device="cpu")
        _check_tensor("uniform", uniform, torch.float64, (self._B, uniform.shape[-1]))
        run = self._prepared(tokens[:, None], counts, self._logits, ids=tokens.data_ptr(), uniform=uniform.data_ptr(),
                             step=step.data_ptr(), stride_u=uniform.stride(0), steps=uniform.shape[1],
                             choices=sampler.choices, **sampler.fields)
        self._cache.filled()

        def decode(kept=(self, tokens, counts, uniform, step)):
            run()

        return decode

    def every(self, tokens):
        """Logits (B, T, V) fp32 behind every one of tokens (B, T)."""
        B, T = tokens.shape
        logits = self._room(B * T)
        self._step(tokens, torch.full((B,), T, dtype=torch.int32, device="cpu"), logits, every=1)
        return logits[:, : self._V].view(B, T, self._V)

    def _room(self, rows):
        return torch.zeros(rows, -(-self._V // (2 * PANEL)) * 2 * PANEL, dtype=torch.float32, device="cpu")

    def _step(self, tokens, counts, logits, **fields):
        tokens = tokens.contiguous()
        self._prepared(tokens, counts, logits, **fields)()
        self._cache.filled()

    def _prepared(self, tokens, counts, logits, **fields):
        B, T = self._B, tokens.shape[-1]
        _check_tensor("tokens", tokens, torch.int64, (B, T))
        _check_tensor("counts", counts, torch.int32, (B,))
        return native.cpu.gpt2_step(self._fields | {"logits": logits.data_ptr(), "tokens": tokens.data_ptr(),
                                                    "counts": counts.data_ptr(), "B": B, "T": T} | fields)


_NO_DRAW = {"every": 0, "ids": 0, "uniform": 0, "step": 0, "steps": 0, "stride_u": 0, "choices": 0, "temperature": 0.0,
            "top_k": 0, "top_p": 1.0}


def _check_cache(cache, layers, H, D):
    """Raises ValueError unless a cache's tensors are as the kernel will read them, which checks what they hold."""
    if (len(cache.k_pages), len(cache.v_pages)) != (layers, layers):
        raise ValueError(f"engine: the cache has pages for {len(cache.k_pages)} blocks, the model has {layers}")
    first = cache.k_pages[0]
    for name, pages in (("k_pages", cache.k_pages), ("v_pages", cache.v_pages)):
        for layer, held in enumerate(pages):
            _check_tensor(f"{name}[{layer}]", held, first.dtype, (len(first), first.shape[1], H, D), first.stride())
    if first.dtype not in KINDS or first.stride(3) != 1:
        raise ValueError(f"engine: k_pages are {first.dtype} with strides {first.stride()}, wanted float32 or "
                         "bfloat16, a head's numbers side by side")
    _check_tensor("block_table", cache.block_table, torch.int32, (len(cache.lengths), cache.block_table.shape[-1]))
    _check_tensor("lengths", cache.lengths, torch.int32, (len(cache.lengths),))


def _check_tensor(name, tensor, dtype, shape, stride=None):
    fits = stride == tensor.stride() if stride is not None else tensor.is_contiguous()
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device.type != "cpu" or not fits:
        raise ValueError(f"engine: {name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on "
                         f"{tensor.device}, wanted {dtype} {shape}{' dense' if stride is None else ''} on cpu")


class Packed:
    """The weights of a model as the engine reads them; `addresses`: of norms and matrices, a pair a layer.

    `done` takes the memory of a cache that nobody reads any more, `spare` gives it to the next, or None.
    """

    def __init__(self, model, sizes, kind):
        self.sizes, self.kind, self._kept, self._spare = sizes, kind, [], []
        parts = model.transformer
        self.addresses = [self._layer(block, kind) for block in parts["h"]]
        self.ln_f = [self._keep(p.detach().float().contiguous()) for p in (parts["ln_f"].weight, parts["ln_f"].bias)]
        self.wte, self.wpe = (parts[name].weight.detach().contiguous() for name in ("wte", "wpe"))  # no copies, mostly
        panels, scale, sums = pack(model.lm_head.weight.detach().T, head_kind(kind))
        self.head = on_huge_pages(panels), scale, sums

    def _layer(self, block, kind):
        norms = [self._keep(parameter.detach().float().contiguous()).data_ptr()
                 for ln in (block.ln_1, block.ln_2) for parameter in (ln.weight, ln.bias)]
        matrices = []
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            panels, scale, sums = pack(linear.weight.detach(), kind)
            bias = F.pad(linear.bias.detach().float(), (0, -len(linear.bias) % PANEL))
            matrices += [0 if tensor is None else self._keep(tensor).data_ptr()
                         for tensor in (panels, bias, scale, sums)]
        return norms, matrices

    def spare(self):
        try:
            return self._spare.pop()
        except IndexError:
            return None

    def done(self, cache):
        if len(cache.memory) <= SPARE and not self._spare:
            self._spare.append(cache.memory)

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


def packed(model, tokens=1, fit=None):
    """The Packed weights of a model, made anew where its weights have changed; tokens: how many a row they are for."""
    fit = fast_path.sizes(model)[0] if fit is None else fit
    sizes, kind = fit._replace(weights=[]), model.quantised or KINDS[model.dtype]  # weights belong to the model
    return derived.of(model, _weights(model, fit.weights), lambda: Packed(model, sizes, kind),
                      note=(model.quantised, sizes), whole=tokens >= WORTH_READING * NARROWER.get(kind, 1))


def _weights(model, blocks):
    parts = model.transformer
    ends = parts.wte.weight, parts.wpe.weight, parts.ln_f.weight, parts.ln_f.bias
    head = [] if model.lm_head.weight is parts.wte.weight else [model.lm_head.weight]
    return [*ends, *head, *(weight for own in blocks for weight in own)]


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
