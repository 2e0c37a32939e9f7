"""linear_xent in chunks of rows, so that logits exist for a chunk alone: products by PyTorch's libraries, losses and
gradients over the logits of a chunk in place, by a backend's softmax_xent_.

`cpu`, `torch_`, `cuda` and `triton` have the functions of linear_xent. The products are in h's dtype, and so are
logits; what adds up over chunks, w's gradient, adds up in fp32. On a GPU w is cast into a copy with rows of zeros
behind it, a multiple of PAD in all, so that rows of logits lie that far apart and every product is aligned.
"""

import torch

from fastlm.backends import native, vendor

# On a CPU rows of a chunk: with fewer, packing w for every product costs time. As many logits are few beside what else
# a step holds. On a GPU they are a multiple of its number, with as many bytes of logits as fill the device for long.
CHUNK, FEW, LARGE = {"cpu": 512, "cuda": 1024}, 2**20, 1_700_000_000
PAD = 64


class Chunked:
    """The functions of linear_xent over those of `softmax`, an object with softmax_xent_fwd, _bwd and softmax_xent_.

    padded: as on a GPU, on every device. share: the part of LARGE for logits; the rest is for its copies of them.
    """

    def __init__(self, softmax, *, padded=False, share=1.0):
        self.softmax, self.padded, self.share = softmax, padded, share

    def linear_xent_fwd(self, h, w, y, ignore):
        V, head = len(w), self._head(h, w)
        loss = h.new_empty(len(h), dtype=torch.promote_types(h.dtype, torch.float32))
        lse = torch.empty_like(loss)
        for rows, x in self._chunks(h, head, V):
            loss[rows], lse[rows] = self.softmax.softmax_xent_fwd(x[:, :V], y[rows], ignore)
        return loss, lse

    def linear_xent_bwd(self, dloss, h, w, y, lse, ignore):
        def gradient(x, rows):
            if self._gpu(h):  # where a second gradient of a chunk is memory, and a pass more
                self.softmax.softmax_xent_(x, dloss[rows].contiguous(), y[rows], ignore)
            else:
                x.copy_(self.softmax.softmax_xent_bwd(dloss[rows].contiguous(), x, y[rows], lse[rows], ignore))

        return self._gradients(h, w, gradient)

    def linear_xent_grad(self, h, w, y, ignore, factor):
        loss = h.new_empty(len(h), dtype=torch.promote_types(h.dtype, torch.float32))
        dloss = torch.ones_like(loss) if factor is None else factor.to(loss.dtype).expand(len(h)).contiguous()

        def gradient(x, rows):
            loss[rows], _ = self.softmax.softmax_xent_(x, dloss[rows], y[rows], ignore)

        wide = torch.promote_types(w.dtype, torch.float32) if factor is None else w.dtype
        gradients = self._gradients(h, w, gradient, wide)
        return loss.sum(), *gradients

    def _gradients(self, h, w, gradient, dtype=None):
        """(dh, dw), dw in dtype, or w's; gradient(x, rows) puts that of the logits x of some rows in their place."""
        dtype = w.dtype if dtype is None else dtype
        (V, C), head = w.shape, self._head(h, w)
        dh, dw = torch.empty_like(h, memory_format=torch.contiguous_format), None
        narrow = h.dtype != torch.promote_types(h.dtype, torch.float32)
        part = h.new_empty(head.shape) if narrow and not h.is_cuda and len(h) > self._rows(h, len(head)) else None
        for rows, x in self._chunks(h, head, V):
            gradient(x[:, :V], rows)
            torch.mm(x, head, out=dh[rows])
            dw = _add_product(dw, x.t(), h[rows], part)
        return dh, (w.new_zeros(V, C, dtype=dtype) if dw is None else dw.resize_(V, C).to(dtype))

    def _gpu(self, h):
        return self.padded or h.is_cuda

    def _head(self, h, w):
        """w (V, C) in h's dtype; on a GPU (Vp, C)."""
        V, C = w.shape
        if not self._gpu(h) or V % PAD == 0:
            return w.to(h.dtype)
        head = h.new_empty(V + -V % PAD, C)
        head[:V].copy_(w)
        head[V:].zero_()
        return head

    def _rows(self, h, Vp):
        """Rows of a chunk."""
        if not self._gpu(h):
            return max(CHUNK["cpu"], FEW // max(Vp, 1))
        step, row = CHUNK["cuda"], max(Vp * h.element_size(), 1)
        return max(int(self.share * LARGE) // row // step, 1) * step

    def _chunks(self, h, head, V):
        """(rows, logits (rows, Vp)) of one chunk after the other, all in the same memory; columns from V on are 0."""
        N, step = len(h), self._rows(h, len(head))
        logits = h.new_empty(min(step, N), len(head))
        for first in range(0, N, step):
            rows = slice(first, min(first + step, N))
            x = torch.mm(h[rows], head.t(), out=logits[: rows.stop - first])
            if V < len(head):
                x[:, V:].zero_()  # an infinity in h times the zeros of head is NaN
            yield rows, x


def _add_product(total, a, b, part):
    """total + a b, in place where there is a total; in fp32 at least, but for a product that nothing is added to.

    part: room for a product that is narrower than the total; None where there is none to add, or where the product
    itself can be added in fp32.
    """
    if part is not None:
        torch.mm(a, b, out=part)
        return part.to(torch.float32, copy=True) if total is None else total.add_(part)
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        options = {"out_dtype": torch.float32}  # of CUDA alone
        return torch.mm(a, b, **options) if total is None else torch.addmm(total, a, b, out=total, **options)
    return torch.mm(a, b) if total is None else total.addmm_(a, b)


cpu, torch_ = Chunked(getattr(native, "cpu", None)), Chunked(vendor, share=0.25)
cuda = Chunked(getattr(native, "cuda", None), padded=True)


def __getattr__(name):
    if name != "triton":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastlm.kernels import softmax_xent  # imports Triton

    return Chunked(softmax_xent, padded=True)
