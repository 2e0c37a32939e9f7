"""GPT-2 on one page: the model of Radford et al. 2019, its names and files those of Hugging Face.

    tokens (B, T) → x = wte + wpe (B, T, C) → L × [x += attn(ln_1(x)); x += mlp(ln_2(x))] → ln_f → logits (B, T, V)
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from fastlm import fast_path, heads, masks
from fastlm.activations import GELU, activation
from fastlm.config import GPT2Config
from fastlm.likeness import AlikeConv1D
from fastlm.ops import attention_qkv, layer_norm, softmax_xent
from fastlm.ops.checks import beneath
from fastlm.ops.once import transformed

__all__ = ["GPT2", "GPT2Config"]


@fast_path.plain()
class Conv1D(AlikeConv1D):
    """x W + b with W (in, out), the layout of OpenAI's checkpoints."""

    def __init__(self, inputs, outputs, std):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs).normal_(std=std))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x, bias=True):
        flat = x.reshape(-1, x.shape[-1])
        flat = torch.addmm(self.bias, flat, self.weight) if bias else torch.mm(flat, self.weight)
        return flat.view(*x.shape[:-1], self.weight.shape[1])


@fast_path.plain()
class Embedding(nn.Embedding):
    def forward(self, tokens, sparse=False):
        return F.embedding(tokens, self.weight, sparse=sparse)


@fast_path.plain()
class LayerNorm(nn.LayerNorm):
    """x (B, T, C) normalised, in autocast's dtype where that is on; with a residual x + x_bias + residual, and the sum.
    """

    def forward(self, x, residual=None, x_bias=None):
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        flat = None if residual is None else residual.reshape(-1, x.shape[-1])
        weight = x.new_ones(x.shape[-1]) if self.weight is None else self.weight  # as torch's norm may lack them
        bias = torch.zeros_like(weight) if self.bias is None else self.bias
        y = layer_norm(x.reshape(-1, x.shape[-1]), weight, bias, residual=flat, x_bias=x_bias, epsilon=self.eps,
                       dtype=dtype)
        return y.view(x.shape) if residual is None else (y[0].view(x.shape), y[1].view(x.shape))


@fast_path.plain(c_attn=Conv1D, c_proj=Conv1D)
class Attention(nn.Module):
    """`scale` is what scores are multiplied by, None for 1/√D."""

    def __init__(self, config, layer):
        super().__init__()
        C, L = config.n_embd, config.n_layer
        self.n_head = config.n_head
        self.scale = None
        if not config.scale_attn_weights or (config.scale_attn_by_inverse_layer_idx and layer):
            scale = (C // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
            self.scale = scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale
        self.dropout, self.residual_dropout = config.attn_pdrop, config.resid_pdrop
        self.c_attn = Conv1D(C, 3 * C, config.initializer_range)
        self.c_proj = Conv1D(C, C, config.initializer_range / (2 * L) ** 0.5)

    def forward(self, x, attend, seed):
        return F.dropout(self.c_proj(self._mixed(x, attend, seed)), self.residual_dropout, self.training)

    def unbiased(self, x, attend, seed):
        """(y, bias), whose sum is forward's."""
        return _unbiased(self, self._mixed(x, attend, seed))

    def _mixed(self, x, attend, seed):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        if attend is not None:
            o = attend(qkv) if self.scale is None else attend(qkv, scale=self.scale)
        elif seed is None or not self.training:
            o = attention_qkv(qkv, scale=self.scale)
        else:
            o = attention_qkv(qkv, scale=self.scale, dropout=self.dropout, seed=seed)
        return o.reshape(B, T, C)


@fast_path.plain(c_fc=Conv1D, act=GELU, c_proj=Conv1D)
class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, inner, L = config.n_embd, config.n_inner or 4 * config.n_embd, config.n_layer
        self.residual_dropout = config.resid_pdrop
        self.c_fc = Conv1D(C, inner, config.initializer_range)
        self.act = activation(config.activation_function)
        self.c_proj = Conv1D(inner, C, config.initializer_range / (2 * L) ** 0.5)

    def forward(self, x):
        return F.dropout(self.c_proj(self._inner(x)), self.residual_dropout, self.training)

    def unbiased(self, x):
        """(y, bias), whose sum is forward's."""
        return _unbiased(self, self._inner(x))

    def _inner(self, x):
        if fast_path.is_plain(self.c_fc, Conv1D) and fast_path.is_plain(self.act, GELU):
            return self.act(self.c_fc(x, bias=False), self.c_fc.bias)
        return self.act(self.c_fc(x))


def _unbiased(part, x):
    """(y, bias) of a part's plain c_proj, whose sum is what the part returns; a dropout takes both."""
    bias, dropout = part.c_proj.bias, part.residual_dropout if part.training else 0
    if dropout or bias is None or bias.dim() != 1:
        return F.dropout(part.c_proj(x), dropout), None
    return part.c_proj(x, bias=False), part.c_proj.bias


@fast_path.plain(ln_1=LayerNorm, attn=Attention, ln_2=LayerNorm, mlp=MLP)
class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, attend, seed):
        """x (B, T, C) behind the block; attend: qkv (B, T, 3, H, D) → o (B, T, H, D), in causal attention's place.

        It is called with scale=…, too, where the attention has one of its own.
        """
        added = self.attn(self.ln_1(x), attend, seed)
        if fast_path.is_plain(self.ln_2, LayerNorm):
            normed, x = self.ln_2(added, x)
        else:
            x = x + added
            normed = self.ln_2(x)
        return x + self.mlp(normed)

    def unadded(self, x, added, bias, attend, seed):
        """(x, added, bias) behind the block of x + added + bias, a sum that the next norm makes in its own pass.

        All modules are plain; added is None before the first block, bias where there is none.
        """
        normed, x = (self.ln_1(x), x) if added is None else self.ln_1(added, x, bias)
        added, bias = self.attn.unbiased(normed, attend, seed)
        normed, x = self.ln_2(added, x, bias)
        return x, *self.mlp.unbiased(normed)

    def weights(self):
        """The weights in gpt2_blocks' order."""
        found, attn, mlp = [], self.attn, self.mlp
        for part in self.ln_1, attn.c_attn, attn.c_proj, self.ln_2, mlp.c_fc, mlp.c_proj:
            held = part._parameters
            for name in "weight", "bias":
                found.append(held[name] if name in held else getattr(part, name))
        return found


@fast_path.plain(
    transformer={"wte": Embedding, "wpe": nn.Embedding, "h": [Block], "ln_f": LayerNorm}, lm_head=nn.Linear
)
class GPT2(nn.Module):
    """`model(tokens, targets)` → (logits (B, T, V), loss); `loss`, `generate`, `from_pretrained`, `save_pretrained`.

    Parameter names and shapes are those of transformers' GPT2LMHeadModel. Unless the config says otherwise the head is
    tied: lm_head.weight is transformer.wte.weight. `quantised` is "int8" or "int4" where the weights are of that form
    (fastlm.quantised). `recomputes`: a backward computes what lies within a block again, a third more work, and keeps
    what lies between blocks alone. `residual` is the dtype that the sums which go through the blocks have under
    autocast, unless it is None: in bf16 they take half the memory, and are rounded at every block.
    """

    quantised: str | None = None
    recomputes: bool = False
    residual: torch.dtype | None = None

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        V, C, std = config.vocab_size, config.n_embd, config.initializer_range
        self.transformer = nn.ModuleDict({
            "wte": Embedding.from_pretrained(torch.empty(V, C).normal_(std=std), freeze=False),
            "wpe": nn.Embedding.from_pretrained(torch.empty(config.n_positions, C).normal_(std=std), freeze=False),
            "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            "ln_f": LayerNorm(C, eps=config.layer_norm_epsilon),
        })
        self.lm_head = nn.Linear(C, V, bias=False, device="meta")
        if config.tie_word_embeddings:
            self.tie_weights()
        else:
            self.lm_head.weight = nn.Parameter(torch.empty(V, C).normal_(std=std))

    def tie_weights(self):
        self.lm_head.weight = self.transformer.wte.weight

    @property
    def device(self):
        return self._first_weight().device

    @property
    def dtype(self):
        return self._first_weight().dtype

    def _first_weight(self):
        """wte's, or of what stands in its place, or the next one's."""
        wte = self.transformer.wte
        return wte.weight if isinstance(wte, nn.Embedding) else next(self.transformer.parameters())

    def hidden(self, tokens, *, positions=None, cache=None, seed=None, sparse=False, attention_mask=None):
        """The final hidden states (B, T, C), normalised, of tokens (B, T) int64.

        positions (B, T) int64, 0 … T-1 unless given; cache, an object whose `attend(layer, qkv)` returns (B, T, H, D),
        takes the place of causal attention, and of its dropout; seed (4,) int64 names that (drawn where it is needed);
        sparse: the embedding's gradient is a sparse tensor, for a caller that adds it to a dense one. attention_mask
        (B, T), 1 where a token is real and 0 where none looks, as in transformers: positions are what they are without
        it, and what stands behind a pad means nothing.
        """
        if attention_mask is not None:
            return self._masked(tokens, attention_mask, positions, cache, seed=seed, sparse=sparse)
        self.check_tokens(tokens, positions)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        blocks, attends = self.transformer.h, [None] * len(self.transformer.h)
        seeds = list(attends)
        if cache is not None:
            attends = [partial(cache.attend, layer) for layer in range(len(blocks))]
        elif self.drops_attention():
            seeds = self._layer_seeds(seed)
        wte = self.transformer.wte
        x = (wte(tokens, sparse=True) if sparse else wte(tokens)) + self.transformer.wpe(positions)
        x = F.dropout(x, self.config.embd_pdrop, self.training)
        if self.residual is not None and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.residual)
        if (fast := fast_path.hidden(self, x, attends, seeds)) is not None:
            return fast
        call = fast_path.calls(self, attends)
        for block, attend, seed in zip(blocks, attends, seeds, strict=True):
            x = call(block, x, attend, seed)
        return self.transformer.ln_f(x)

    def _masked(self, tokens, mask, positions, cache, **options):
        mask = masks.check("GPT2", mask, tokens)
        if cache is not None:
            raise ValueError("GPT2: got attention_mask and cache; a cache's counts say which tokens are real")
        self.check_tokens(tokens, positions)  # where they stand
        order, back = masks.order(mask)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        positions = positions.expand(tokens.shape).gather(1, order)
        hidden = self.hidden(tokens.gather(1, order), positions=positions, **options)
        return hidden.gather(1, back[..., None].expand_as(hidden))

    def drops_attention(self):
        """Whether some attention has dropout, in the mode and with the share that it has itself."""
        return any(isinstance(part, Attention) and part.training and part.dropout
                   for part in self.transformer.h.modules())

    def _layer_seeds(self, seed):
        """The dropout seed of every layer, (4,) each: seed, step, layer, first sequence."""
        if seed is None:
            seed = F.pad(torch.randint(2**31, (2,), device=self.device), (0, 2))
        layers = torch.arange(len(self.transformer.h), device=seed.device)
        return (seed + F.pad(layers[:, None], (2, 1))).unbind(0)

    def forward(self, tokens, targets=None, *, attention_mask=None, seed=None):
        """(logits (B, T, V), loss) of tokens (B, T) int64; loss, in nats per token, is None without targets.

        targets (B, T) int64 are already shifted: targets[b, t] follows tokens[b, t]; -100 is ignored. attention_mask
        (B, T) is 0 where a token is a pad, which no other looks at. seed (4,) int64 names this step's attention
        dropout; without it one is drawn from torch's generator. Raises ValueError for wrong shapes, for sequences
        longer than n_positions and for ids outside the vocabulary.
        """
        if targets is not None:
            self._check_targets(tokens, targets)
        hidden, head = self.hidden(tokens, seed=seed, attention_mask=attention_mask), self.lm_head
        strict = not torch.is_autocast_enabled(hidden.device.type) and fast_path.is_plain(head, nn.Linear)
        if strict and head.weight.dtype != hidden.dtype:
            raise TypeError(f"GPT2: lm_head.weight is {head.weight.dtype}, but the hidden states are {hidden.dtype}")
        logits = head(hidden)
        if targets is None:
            return logits, None
        return logits, softmax_xent(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    def loss(self, tokens, targets, *, attention_mask=None, seed=None, scale=None):
        """The loss of `model(tokens, targets)` without its logits, which never exist as a whole: what to train with.

        scale, a number or a tensor () on the model's device, multiplies it: its weight in a sum over micro-batches.
        """
        self._check_targets(tokens, targets)
        if fast_path.own_call(self):
            options = {"attention_mask": attention_mask, "seed": seed}
            given = {name: value for name, value in options.items() if value is not None}
            logits, loss = fast_path.called(self, tokens, targets, **given)
            if loss is None:
                loss = softmax_xent(logits.view(-1, logits.shape[-1]), targets.reshape(-1))
            return heads.scaled(loss, scale)
        hidden = self.hidden(tokens, seed=seed, sparse=self.adds_few_rows(tokens), attention_mask=attention_mask)
        return heads.loss_of(self.lm_head, hidden, targets, self.config.vocab_size, scale)

    def adds_few_rows(self, tokens):
        """Whether the embedding of tokens (B, T) adds few rows to wte's gradient, to which the head's is there first,
        dense: then a sparse tensor of them is the cheaper one.
        """
        wte, head = self.transformer.wte, self.lm_head
        known = fast_path.is_plain(wte, Embedding) and fast_path.is_plain(head, nn.Linear)
        tied = known and head.weight is wte.weight
        few = tokens.device.type == "cpu" and tokens.numel() < self.config.vocab_size
        return tied and few and not transformed()

    def _check_targets(self, tokens, targets):
        if targets.shape != tokens.shape:
            raise ValueError(f"GPT2: targets have shape {tuple(targets.shape)}, but tokens {tuple(tokens.shape)}")

    def check_tokens(self, tokens, positions=None):
        """Raises ValueError unless tokens are int64 (B, T) with ids and length that this model has."""
        if tokens.dtype != torch.int64 or tokens.dim() != 2:
            raise ValueError(f"GPT2: tokens are {tokens.dtype} {tuple(tokens.shape)}, wanted int64 (B, T)")
        if tokens.device != self.device:
            raise ValueError(f"GPT2: tokens are on {tokens.device}, but the model is on {self.device}")
        V, P = self._rows("wte", self.config.vocab_size), self._rows("wpe", self.config.n_positions)
        length = tokens.shape[1] if positions is None else 0
        if positions is not None and positions.device.type == "cpu" and not torch.compiler.is_compiling():
            length = 1 + int(beneath(positions).max()) if positions.numel() else 0
        if length > P:
            raise ValueError(f"GPT2: {length} tokens a sequence, but the model has n_positions={P}")
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            tokens = beneath(tokens)
            low, high = (int(value) for value in torch.aminmax(tokens))
            if low < 0 or high >= V:
                wrong = ((tokens < 0) | (tokens >= V)).nonzero()[0].tolist()
                raise ValueError(
                    f"GPT2: token id {int(tokens[tuple(wrong)])} at {wrong}, wanted 0 ≤ id < "
                    f"vocab_size {V}; was the text tokenised with another vocabulary?"
                )

    def _rows(self, name, told):
        """Of an embedding: as many as config tells of, or fewer, if it has not so many."""
        embedding = self.transformer[name]
        return min(told, len(embedding.weight)) if isinstance(embedding, nn.Embedding) else told

    def generate(self, tokens, **options):
        """Continues each prompt; see `fastlm.generation.generate_tokens` for the options."""
        from fastlm.generation import generate_tokens

        return generate_tokens(self, tokens, **options)

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None):
        """Makes the vocabulary new_num_tokens long, of as many as there are unless given, and returns the embedding.

        With pad_to_multiple_of there are as many rows as make a multiple of it; what is beyond new_num_tokens is never
        drawn. New rows are the mean of the old ones (Hewitt 2021), ends of text that are cut off become None. The
        parameters are new ones: an optimizer is made after.
        """
        return heads.resize(self, new_num_tokens, pad_to_multiple_of)

    def why_slow(self):
        """None where the model is what the fast paths take it for, else the sentence which module is not, and why.

        These then run as they are: a forward of somebody's own, hooks, sizes that do not fit each other.
        """
        from fastlm.generation.engine import fitting

        return fast_path.why_not(self) or fitting(self)[1]

    @classmethod
    def from_pretrained(cls, name, *, device=None, dtype=torch.float32):
        """The model of a directory in Hugging Face's format, or of a hub id such as "gpt2" (needs a network)."""
        from fastlm.pretrained import load

        return load(cls, name, device=device, dtype=dtype)

    def save_pretrained(self, directory, *, tokenizer=None):
        """Writes config.json and model.safetensors (fp32), and the tokenizer's files, as transformers would."""
        from fastlm.pretrained import save

        save(self, directory, tokenizer=tokenizer)
