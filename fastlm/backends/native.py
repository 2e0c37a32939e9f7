"""The compiled kernels as functions: allocates the outputs and passes fastlm._C what csrc/fastlm.h declares.

`cpu` and `cuda` have a function per torch op; nothing else of fastlm touches _C.
"""

import torch

from fastlm.measure import tuned

try:
    import fastlm._C as _C
except ImportError:  # the backend's why_not says what is missing
    _C = None

_BLOCKS = "between", "h1", "qkv", "o", "lse", "s", "h2", "slope", "g", "statistics"  # what gpt2_blocks keeps
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/fastlm.h, DType


class Launchers:
    """The ops of one compiled library; `queue(device)` gives the arguments that say where a launch goes.

    split_decoding: decode_attention cuts the positions into splits and needs scratch for their results.
    """

    def __init__(self, library, queue, *, split_decoding=False):
        self._library = library
        self._ops = library.ops
        library.dtypes.update(_DTYPES)
        self._queue = queue
        self._split_decoding = split_decoding

    def _run(self, op, device, **given):
        self._ops[op](given, **self._queue(device))

    def softmax_xent_fwd(self, x, y, ignore):
        (N, V), device = x.shape, x.device
        loss = torch.empty(N, dtype=torch.float32, device=device)
        lse = torch.empty_like(loss)
        self._run("softmax_xent_fwd", device, loss=loss, lse=lse, x=x, y=y, N=N, V=V, ignore=ignore, dtype=x.dtype)
        return loss, lse

    def softmax_xent_bwd(self, dloss, x, y, lse, ignore):
        N, V = x.shape
        dx = torch.empty(N, V, dtype=x.dtype, device=x.device)
        self._run("softmax_xent_bwd", x.device, dx=dx, dloss=dloss, x=x, y=y, lse=lse, N=N, V=V, ignore=ignore,
                  dtype=x.dtype)
        return dx

    def softmax_xent_(self, x, dloss, y, ignore):
        (N, V), device = x.shape, x.device
        loss = torch.empty(N, dtype=torch.float32, device=device)
        lse = torch.empty_like(loss)
        self._run("softmax_xent_", device, loss=loss, lse=lse, x=x, dloss=dloss, y=y, N=N, V=V, ignore=ignore,
                  dtype=x.dtype)
        return loss, lse

    def gpt2_blocks_fwd(self, x, weights, heads, epsilon):
        (B, T, C), L, F = x.shape, len(weights) // 12, weights[8].shape[1]
        N, y, cut = B * T, torch.empty(B, T, C, dtype=x.dtype, device=x.device), tuned.cut("gpt2_blocks", "fp32")
        addresses = torch.tensor([weight.data_ptr() for weight in weights], dtype=torch.int64, device="cpu")
        kept = [torch.empty(shape, dtype=x.dtype, device=x.device) for shape in (
            (L - 1, N, C), (L, N, C), (L, N, 3 * C), (L, N, C), (L, B, heads, T), (L, N, C), (L, N, C), (L, N, F),
            (L, N, F), (L, 4, N))]
        self._run("gpt2_blocks_fwd", x.device, y=y, **dict(zip(_BLOCKS, kept, strict=True)), x=x, weights=addresses,
                  L=L, B=B, T=T, H=heads, D=C // heads, F=F, epsilon=epsilon, cut_rows=cut["cut_rows"])
        return y, *kept

    def gpt2_blocks_bwd(self, dy, x, saved, weights, heads):
        (B, T, C), L, F = x.shape, len(weights) // 12, weights[8].shape[1]
        dx = torch.empty(B, T, C, dtype=x.dtype, device=x.device)
        gradients = torch.empty(sum(weight.numel() for weight in weights), dtype=x.dtype, device=x.device)
        bands = -(-B * T // self._library.kGpt2BlockRows)
        scratch = torch.empty(B * T * (8 * C + F) + B * heads * T + bands * 8 * C, dtype=x.dtype, device=x.device)
        addresses = torch.tensor([weight.data_ptr() for weight in weights], dtype=torch.int64, device="cpu")
        self._run("gpt2_blocks_bwd", x.device, dx=dx, gradients=gradients, scratch=scratch, dy=dy, x=x,
                  **dict(zip(_BLOCKS, saved, strict=True)), weights=addresses, L=L, B=B, T=T, H=heads, D=C // heads,
                  F=F, **tuned.cut("gpt2_blocks", "fp32"))
        return dx, gradients

    def bias_gelu_fwd(self, x, bias):
        N, C = x.shape
        y = torch.empty(N, C, dtype=x.dtype, device=x.device)
        self._run("bias_gelu_fwd", x.device, y=y, x=x, bias=bias.float().contiguous(), N=N, C=C, dtype=x.dtype)
        return y

    def bias_gelu_bwd(self, dy, x, bias):
        N, C = x.shape
        dx = torch.empty(N, C, dtype=x.dtype, device=x.device)
        dbias, scratch = self._column_sums(N, C, x.device)
        self._run("bias_gelu_bwd", x.device, dx=dx, dbias=dbias, scratch=scratch, dy=dy, x=x,
                  bias=bias.float().contiguous(), N=N, C=C, dtype=x.dtype)
        return dx, dbias.to(bias.dtype)

    def layer_norm_fwd(self, x, residual, x_bias, weight, bias, epsilon, dtype):
        (N, C), device = x.shape, x.device
        y = torch.empty(N, C, dtype=dtype, device=device)
        mean = torch.empty(N, dtype=torch.float32, device=device)
        rstd = torch.empty_like(mean)
        like = x if residual is None else residual
        s = torch.empty((0,) if residual is None else (N, C), dtype=like.dtype, device=device)
        x_bias = None if x_bias is None else x_bias.float().contiguous()
        self._run("layer_norm_fwd", device, y=y, s=s, mean=mean, rstd=rstd, x=x, residual=residual, x_bias=x_bias,
                  weight=weight.float().contiguous(), bias=bias.float().contiguous(), N=N, C=C, epsilon=epsilon,
                  dtype=x.dtype, s_dtype=s.dtype, y_dtype=dtype)
        return y, s, mean, rstd

    def layer_norm_bwd(self, dy, ds, s, weight, mean, rstd, dtype, x_bias):
        (N, C), count = s.shape, 3 if x_bias else 2
        dx = torch.empty(N, C, dtype=dtype, device=s.device)
        dresidual = torch.empty(N if dtype != s.dtype else 0, C, dtype=s.dtype, device=s.device)
        sums, scratch = self._column_sums(N, count * C, s.device)
        self._run("layer_norm_bwd", s.device, dx=dx, dresidual=dresidual if dtype != s.dtype else None,
                  sums=sums, scratch=scratch, dy=dy, ds=ds, s=s, weight=weight.float().contiguous(), mean=mean,
                  rstd=rstd, N=N, C=C, count=count, dtype=dtype, s_dtype=s.dtype, y_dtype=dy.dtype)
        dweight, dbias, dx_bias = (sums[i * C : (i + 1) * C].clone() for i in range(3))  # empty beyond count
        return dx, dresidual, dweight.to(weight.dtype), dbias.to(weight.dtype), dx_bias

    def _column_sums(self, N, width, device):
        """(sums (width,), scratch) of what adds up over N rows."""
        blocks = -(-N // self._library.kColumnRows)
        return (torch.empty(width, dtype=torch.float32, device=device),
                torch.empty(blocks, width, dtype=torch.float32, device=device))

    def adamw_(self, p, g, exp_avg, exp_avg_sq, scale, rates, step, learning_rate, beta1, beta2, epsilon, weight_decay):
        rates = (learning_rate, 1 - beta1**step, 1 - beta2**step) if rates is None else rates.tolist()
        self._run("adamw_", p.device, p=p, g=g, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, scale=scale, n=p.numel(),
                  learning_rate=rates[0], one_minus_beta1=1 - beta1, beta2=beta2, one_minus_beta2=1 - beta2,
                  epsilon=epsilon, weight_decay=weight_decay, bias_correction1=rates[1], bias_correction2=rates[2])

    def grad_norm(self, g):
        norm = torch.empty((), dtype=torch.float32, device=g.device)
        scratch = torch.empty(-(-g.numel() // self._library.kNormPiece), dtype=torch.float32, device=g.device)
        self._run("grad_norm", g.device, norm=norm, scratch=scratch, g=g, n=g.numel())
        return norm

    def attention_fwd(self, q, k, v, causal, scale, dropout, seed):
        (B, T, H, D), S = q.shape, k.shape[1]
        o = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
        lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
        self._run("attention_fwd", q.device, o=o, lse=lse, q=q, k=k, v=v, **_dropped(dropout, seed), B=B, T=T, S=S, H=H,
                  D=D, causal=causal, scale=scale, dtype=q.dtype)
        return o, lse

    def attention_bwd(self, do, q, k, v, o, lse, causal, scale, dropout, seed):
        dq, dk, dv = (torch.empty(like.shape, dtype=q.dtype, device=q.device) for like in (q, k, v))
        self._attention_bwd(dq, dk, dv, do, q, k, v, o, lse, causal, scale, dropout, seed)
        return dq, dk, dv

    def _attention_bwd(self, dq, dk, dv, do, q, k, v, o, lse, causal, scale, dropout, seed):
        (B, T, H, D), S = q.shape, k.shape[1]
        delta = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
        self._run("attention_bwd", q.device, dq=dq, dk=dk, dv=dv, delta=delta, do_=do, q=q, k=k, v=v, o=o, lse=lse,
                  **_dropped(dropout, seed), B=B, T=T, S=S, H=H, D=D, causal=causal, scale=scale, dtype=q.dtype)

    def attention_qkv_fwd(self, qkv, causal, scale, dropout, seed):
        return self.attention_fwd(*qkv.unbind(2), causal, scale, dropout, seed)

    def attention_qkv_bwd(self, do, qkv, o, lse, causal, scale, dropout, seed):
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        self._attention_bwd(*dqkv.unbind(2), do, *qkv.unbind(2), o, lse, causal, scale, dropout, seed)
        return dqkv

    def decode_attention(self, q, k_pages, v_pages, block_table, lengths, scale):
        B, T, H, D = q.shape
        o = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
        page, max_pages = k_pages.shape[1], block_table.shape[1]
        splits = -(-max_pages * page // self._library.kDecodeSplit) if self._split_decoding else 0
        scratch = torch.empty(B, H, T, splits, D + 2, dtype=torch.float32, device=q.device)
        self._run("decode_attention", q.device, o=o, scratch=scratch, q=q, k_pages=k_pages, v_pages=v_pages,
                  block_table=block_table, lengths=lengths, B=B, T=T, H=H, D=D, page=page, max_pages=max_pages,
                  scale=scale, dtype=q.dtype)
        return o

    def cache_append_(self, k_pages, v_pages, k, v, block_table, positions):
        B, T, H, D = k.shape
        self._run("cache_append_", k.device, k_pages=k_pages, v_pages=v_pages, k=k, v=v, block_table=block_table,
                  positions=positions, B=B, T=T, H=H, D=D, page=k_pages.shape[1], max_pages=block_table.shape[1],
                  dtype=k.dtype)

    def draw(self, logits, uniform, temperature, top_k, top_p):
        """The next token of every row, int64 (B,), as fastlm.generation.sampling.choose says; logits (B, V) fp32."""
        ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        self._run("draw", logits.device, ids=ids, logits=logits, uniform=uniform, stride_lb=logits.stride(0),
                  stride_u=uniform.stride(0), B=logits.shape[0], choices=logits.shape[1], temperature=temperature,
                  top_k=top_k, top_p=top_p)
        return ids

    def checksum(self, spans, only=None):
        """The checksums, a list of int, of spans (count, 3) int64 (csrc/fastlm.h); all but number `only` are 0."""
        sums = torch.empty(self._library.kChecksums, dtype=torch.int64, device="cpu")
        self._run("checksum", None, sums=sums, spans=spans, count=len(spans), only=-1 if only is None else only)
        return sums.tolist()

    def gpt2_step(self, fields):
        """A function without arguments: one step of a whole GPT-2; fields name all of Gpt2Step (csrc/fastlm.h)."""
        return self._ops["gpt2_step"].prepared(fields, **self._queue(None))


def _dropped(dropout, seed):
    drop = round(dropout * 256)
    return {"drop": drop, "seed": seed.contiguous() if drop else None}


if _C is not None and hasattr(_C.cpu, "dtypes"):  # without: of another version
    cpu = Launchers(_C.cpu, lambda device: {"threads": torch.get_num_threads()})
    if hasattr(_C, "cuda"):
        cuda = Launchers(
            _C.cuda,
            lambda device: {
                "device": device.index, "stream": torch.cuda.current_stream(device).cuda_stream
            },
            split_decoding=True,
        )


def keep_heap(*, large=True):
    """Memory that is freed stays with this process, as a training step wants it on a CPU: the next step takes it again.

    large: blocks above 32 MiB too, which are else mapped, and filled with zeros by the system, at every allocation.
    False where the kernels are not built or the C library cannot; nothing is changed then.
    """
    return _C is not None and _C.cpu.keep_heap(large=large)
