"""The compiled kernels as functions: allocates the outputs and passes pointers, sizes and strides to fastlm._C.

`cpu` and `cuda` have a function per torch op; nothing else of fastlm touches _C.
"""

import torch

try:
    import fastlm._C as _C
except ImportError:  # the backend's why_not says what is missing
    _C = None

_DECODE_SPLIT = 128  # csrc/fastlm.h, kDecodeSplit
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/fastlm.h, DType


def _strides(letters, tensor):
    """{"stride_qb": ..., "stride_qt": ...} for letters "qb qt"; csrc/fastlm.h names them."""
    return {f"stride_{letter}": stride for letter, stride in zip(letters.split(), tensor.stride())}


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
        getattr(self._library, op)(**self._queue(tensor.device), dtype=_DTYPES[tensor.dtype], **fields)

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


    def gpt2_step(self, logits, layers, head, ln_f, wte, wpe, tokens, positions, counts, block_table, **fields):
        """One step of a whole GPT-2 (csrc/fastlm.h, Gpt2Step); head is (panels, scale or None, sums or None)."""
        panels, scale, sums = (0 if tensor is None else tensor.data_ptr() for tensor in head)
        self._run(
            "gpt2_step", wte, logits=logits.data_ptr(), layers=layers.data_ptr(), head=panels, head_scale=scale,
            head_sums=sums, ln_f_w=ln_f[0].data_ptr(), ln_f_b=ln_f[1].data_ptr(), wte=wte.data_ptr(),
            wpe=wpe.data_ptr(), tokens=tokens.data_ptr(), positions=positions.data_ptr(), counts=counts.data_ptr(),
            block_table=block_table.data_ptr(), B=tokens.shape[0], T=tokens.shape[1], L=layers.shape[0],
            V=wte.shape[0], max_pages=block_table.shape[1], **fields,
        )


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
