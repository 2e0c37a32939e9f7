"""The compiled kernels as functions: allocates the outputs and passes pointers, sizes and strides to fastlm._C.

`cpu` and `cuda` have a function per torch op; nothing else of fastlm touches _C.
"""

import torch

try:
    import fastlm._C as _C
except ImportError:  # the backend's why_not says what is missing
    _C = None

_DECODE_SPLIT = 128  # csrc/fastlm.h, kDecodeSplit
_COLUMN_ROWS = 32  # kColumnRows
_BLOCK_ROWS = 48  # kGpt2BlockRows
_NORM_PIECE = 65536  # kNormPiece
_BLOCKS = "between", "h1", "qkv", "o", "lse", "s", "h2", "slope", "g", "statistics"  # what gpt2_blocks keeps
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/fastlm.h, DType


def _strides(letters, tensor):
    """{"stride_qb": ..., "stride_qt": ...} for letters "qb qt"; csrc/fastlm.h names them."""
    return {f"stride_{letter}": stride for letter, stride in zip(letters.split(), tensor.stride())}


def _pointers(names, tensors):
    return {name: tensor.data_ptr() for name, tensor in zip(names, tensors, strict=True)}


def _seed(dropout, seed):
    drop = round(dropout * 256)
    return {"drop": drop, "seed": seed.contiguous().data_ptr() if drop else 0}


class Launchers:
    """The ops of one compiled library; `queue(device)` gives the arguments that say where a launch goes.

    split_decoding: decode_attention cuts the positions into splits and needs scratch for their results.
    """

    def __init__(self, library, queue, *, split_decoding=False):
        self._library = library
        self._queue = queue
        self._split_decoding = split_decoding

    def _run(self, op, tensor, **fields):
        self._plain(op, tensor.device, dtype=_DTYPES[tensor.dtype], **fields)

    def _plain(self, op, device, **fields):
        getattr(self._library, op)(**self._queue(device), **fields)

    def softmax_xent_fwd(self, x, y, ignore):
        N, V = x.shape
        loss = torch.empty(N, dtype=torch.float32, device=x.device)
        lse = torch.empty(N, dtype=torch.float32, device=x.device)
        self._run(
            "softmax_xent_fwd", x, loss=loss.data_ptr(), lse=lse.data_ptr(), x=x.data_ptr(), stride_xn=x.stride(0),
            y=y.data_ptr(), N=N, V=V, ignore=ignore,
        )
        return loss, lse

    def softmax_xent_bwd(self, dloss, x, y, lse, ignore):
        N, V = x.shape
        dx = torch.empty(N, V, dtype=x.dtype, device=x.device)
        self._run(
            "softmax_xent_bwd", x, dx=dx.data_ptr(), stride_dxn=dx.stride(0), dloss=dloss.data_ptr(), x=x.data_ptr(),
            stride_xn=x.stride(0), y=y.data_ptr(), lse=lse.data_ptr(), N=N, V=V, ignore=ignore,
        )
        return dx

    def softmax_xent_(self, x, dloss, y, ignore):
        N, V = x.shape
        loss = torch.empty(N, dtype=torch.float32, device=x.device)
        lse = torch.empty(N, dtype=torch.float32, device=x.device)
        self._run(
            "softmax_xent_", x, loss=loss.data_ptr(), lse=lse.data_ptr(), x=x.data_ptr(), stride_xn=x.stride(0),
            dloss=dloss.data_ptr(), y=y.data_ptr(), N=N, V=V, ignore=ignore,
        )
        return loss, lse

    def gpt2_blocks_fwd(self, x, weights, heads, epsilon):
        (B, T, C), L, F = x.shape, len(weights) // 12, weights[8].shape[1]
        N, y = B * T, torch.empty(B, T, C, dtype=x.dtype)
        addresses = torch.tensor([weight.data_ptr() for weight in weights])
        kept = [torch.empty(shape, dtype=x.dtype) for shape in (
            (L - 1, N, C), (L, N, C), (L, N, 3 * C), (L, N, C), (L, B, heads, T), (L, N, C), (L, N, C), (L, N, F),
            (L, N, F), (L, 4, N))]
        self._plain(
            "gpt2_blocks_fwd", x.device, y=y.data_ptr(), **_pointers(_BLOCKS, kept), x=x.data_ptr(),
            weights=addresses.data_ptr(), L=L, B=B, T=T, H=heads, D=C // heads, F=F, epsilon=epsilon,
        )
        return y, *kept

    def gpt2_blocks_bwd(self, dy, x, saved, weights, heads):
        (B, T, C), L, F = x.shape, len(weights) // 12, weights[8].shape[1]
        dx = torch.empty(B, T, C, dtype=x.dtype)
        gradients = torch.empty(sum(weight.numel() for weight in weights), dtype=x.dtype)
        scratch = torch.empty(B * T * (8 * C + F) + B * heads * T + -(-B * T // _BLOCK_ROWS) * 8 * C, dtype=x.dtype)
        addresses = torch.tensor([weight.data_ptr() for weight in weights])
        self._plain(
            "gpt2_blocks_bwd", x.device, dx=dx.data_ptr(), gradients=gradients.data_ptr(),
            scratch=scratch.data_ptr(), dy=dy.data_ptr(), x=x.data_ptr(), **_pointers(_BLOCKS, saved),
            weights=addresses.data_ptr(), L=L, B=B, T=T, H=heads, D=C // heads, F=F,
        )
        return dx, gradients

    def bias_gelu_fwd(self, x, bias):
        N, C = x.shape
        y, wide = torch.empty(N, C, dtype=x.dtype, device=x.device), bias.float().contiguous()
        self._run("bias_gelu_fwd", x, y=y.data_ptr(), x=x.data_ptr(), stride_xn=x.stride(0), bias=wide.data_ptr(),
                  N=N, C=C)
        return y

    def bias_gelu_bwd(self, dy, x, bias):
        N, C = x.shape
        dx, wide = torch.empty(N, C, dtype=x.dtype, device=x.device), bias.float().contiguous()
        dbias, scratch = self._column_sums(N, C, x.device)
        self._run(
            "bias_gelu_bwd", x, dx=dx.data_ptr(), dbias=dbias.data_ptr(), scratch=scratch.data_ptr(),
            dy=dy.data_ptr(), stride_dyn=dy.stride(0), x=x.data_ptr(), stride_xn=x.stride(0), bias=wide.data_ptr(),
            N=N, C=C,
        )
        return dx, dbias.to(bias.dtype)

    def layer_norm_fwd(self, x, residual, weight, bias, epsilon, dtype):
        N, C = x.shape
        y = torch.empty(N, C, dtype=dtype, device=x.device)
        mean, rstd = (torch.empty(N, dtype=torch.float32, device=x.device) for _ in range(2))
        s = torch.empty(0, dtype=x.dtype, device=x.device)
        if residual is not None:
            s = torch.empty(N, C, dtype=residual.dtype, device=x.device)
        w, b = weight.float().contiguous(), bias.float().contiguous()
        self._run(
            "layer_norm_fwd", x, y=y.data_ptr(), s=s.data_ptr(), mean=mean.data_ptr(), rstd=rstd.data_ptr(),
            x=x.data_ptr(), stride_xn=x.stride(0), residual=0 if residual is None else residual.data_ptr(),
            stride_rn=0 if residual is None else residual.stride(0), weight=w.data_ptr(), bias=b.data_ptr(), N=N, C=C,
            epsilon=epsilon, s_dtype=_DTYPES[x.dtype if residual is None else residual.dtype], y_dtype=_DTYPES[dtype],
        )
        return y, s, mean, rstd

    def layer_norm_bwd(self, dy, ds, s, weight, mean, rstd, dtype):
        N, C = s.shape
        dx = torch.empty(N, C, dtype=dtype, device=s.device)
        dresidual = torch.empty(N if dtype != s.dtype else 0, C, dtype=s.dtype, device=s.device)
        sums, scratch = self._column_sums(N, 2 * C, s.device)
        w = weight.float().contiguous()
        self._run(
            "layer_norm_bwd", dx, dx=dx.data_ptr(), dresidual=dresidual.data_ptr() if dtype != s.dtype else 0,
            dweight_dbias=sums.data_ptr(), scratch=scratch.data_ptr(), dy=dy.data_ptr(), stride_dyn=dy.stride(0),
            ds=0 if ds is None else ds.data_ptr(), stride_dsn=0 if ds is None else ds.stride(0), s=s.data_ptr(),
            stride_sn=s.stride(0), weight=w.data_ptr(), mean=mean.data_ptr(), rstd=rstd.data_ptr(), N=N, C=C,
            s_dtype=_DTYPES[s.dtype], y_dtype=_DTYPES[dy.dtype],
        )
        dweight, dbias = sums.to(weight.dtype).split(C)
        return dx, dresidual, dweight.clone(), dbias.clone()

    def _column_sums(self, N, width, device):
        """(sums (width,), scratch) of what adds up over N rows."""
        blocks = -(-N // _COLUMN_ROWS)
        return (torch.empty(width, dtype=torch.float32, device=device),
                torch.empty(blocks, width, dtype=torch.float32, device=device))

    def adamw_(self, p, g, exp_avg, exp_avg_sq, scale, step, learning_rate, beta1, beta2, epsilon, weight_decay):
        self._plain(
            "adamw_", p.device, p=p.data_ptr(), g=g.data_ptr(), exp_avg=exp_avg.data_ptr(),
            exp_avg_sq=exp_avg_sq.data_ptr(), scale=0 if scale is None else scale.data_ptr(), n=p.numel(),
            learning_rate=learning_rate, one_minus_beta1=1 - beta1, beta2=beta2, one_minus_beta2=1 - beta2,
            epsilon=epsilon, weight_decay=weight_decay, bias_correction1=1 - beta1**step,
            bias_correction2=1 - beta2**step,
        )

    def grad_norm(self, g):
        norm = torch.empty((), dtype=torch.float32, device=g.device)
        scratch = torch.empty(-(-g.numel() // _NORM_PIECE), dtype=torch.float32, device=g.device)
        self._plain("grad_norm", g.device, norm=norm.data_ptr(), scratch=scratch.data_ptr(), g=g.data_ptr(),
                    n=g.numel())
        return norm

    def attention_fwd(self, q, k, v, causal, scale, dropout, seed):
        (B, T, H, D), S = q.shape, k.shape[1]
        o = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
        lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
        self._run(
            "attention_fwd", q, o=o.data_ptr(), **_strides("ob ot oh", o), lse=lse.data_ptr(),
            q=q.data_ptr(), **_strides("qb qt qh", q), k=k.data_ptr(), **_strides("kb ks kh", k),
            v=v.data_ptr(), **_strides("vb vs vh", v), B=B, T=T, S=S, H=H, D=D, causal=causal, scale=scale,
            **_seed(dropout, seed),
        )
        return o, lse

    def attention_bwd(self, do, q, k, v, o, lse, causal, scale, dropout, seed):
        dq, dk, dv = (torch.empty(like.shape, dtype=q.dtype, device=q.device) for like in (q, k, v))
        self._attention_bwd(dq, dk, dv, do, q, k, v, o, lse, causal, scale, dropout, seed)
        return dq, dk, dv

    def _attention_bwd(self, dq, dk, dv, do, q, k, v, o, lse, causal, scale, dropout, seed):
        (B, T, H, D), S = q.shape, k.shape[1]
        delta = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
        self._run(
            "attention_bwd", q, dq=dq.data_ptr(), **_strides("dqb dqt dqh", dq), dk=dk.data_ptr(),
            **_strides("dkb dks dkh", dk), dv=dv.data_ptr(), **_strides("dvb dvs dvh", dv), delta=delta.data_ptr(),
            do_=do.data_ptr(), **_strides("dob dot doh", do), q=q.data_ptr(), **_strides("qb qt qh", q),
            k=k.data_ptr(), **_strides("kb ks kh", k), v=v.data_ptr(), **_strides("vb vs vh", v), o=o.data_ptr(),
            **_strides("ob ot oh", o), lse=lse.data_ptr(), B=B, T=T, S=S, H=H, D=D, causal=causal, scale=scale,
            **_seed(dropout, seed),
        )

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
        splits = -(-max_pages * page // _DECODE_SPLIT) if self._split_decoding else 0
        scratch = torch.empty(B, H, T, splits, D + 2, dtype=torch.float32, device=q.device)
        self._run(
            "decode_attention", q, o=o.data_ptr(), scratch=scratch.data_ptr(),
            q=q.data_ptr(), **_strides("qb qt qh", q),
            k_pages=k_pages.data_ptr(), **_strides("kp ks kh", k_pages),
            v_pages=v_pages.data_ptr(), **_strides("vp vs vh", v_pages),
            block_table=block_table.data_ptr(), stride_tb=block_table.stride(0), lengths=lengths.data_ptr(),
            B=B, T=T, H=H, D=D, page=page, max_pages=max_pages, scale=scale,
        )
        return o

    def cache_append_(self, k_pages, v_pages, k, v, block_table, positions):
        B, T, H, D = k.shape
        self._run(
            "cache_append_", k, k_pages=k_pages.data_ptr(), **_strides("kpp kps kph", k_pages),
            v_pages=v_pages.data_ptr(), **_strides("vpp vps vph", v_pages), k=k.data_ptr(),
            **_strides("kb kt kh", k), v=v.data_ptr(), **_strides("vb vt vh", v),
            block_table=block_table.data_ptr(), stride_tb=block_table.stride(0), positions=positions.data_ptr(),
            stride_pb=positions.stride(0), B=B, T=T, H=H, D=D, page=k_pages.shape[1],
            max_pages=block_table.shape[1],
        )

    def draw(self, logits, uniform, temperature, top_k, top_p):
        """The next token of every row, int64 (B,), as fastlm.generation.sampling.choose says; logits (B, V) fp32."""
        ids = torch.empty(len(logits), dtype=torch.int64)
        self._plain(
            "draw", logits.device, ids=ids.data_ptr(), logits=logits.data_ptr(), uniform=uniform.data_ptr(),
            stride_lb=logits.stride(0), stride_u=uniform.stride(0), B=logits.shape[0], choices=logits.shape[1],
            temperature=temperature, top_k=top_k, top_p=top_p,
        )
        return ids

    def gpt2_step(self, fields):
        """A function without arguments: one step of a whole GPT-2; fields name all of Gpt2Step (csrc/fastlm.h)."""
        return self._library.gpt2_step(**self._queue(None), **fields)


def dtype_number(dtype):
    """How the kernels name a dtype."""
    return _DTYPES[dtype]


if _C is not None:
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
