"""linear_xent in chunks of rows, so that logits exist for a chunk alone: products by PyTorch's libraries, losses and
gradients over the logits of a chunk in place, by a backend's softmax_xent_.

`cpu` and `torch_` have the functions of linear_xent. The products are in h's dtype, and so are logits; what adds up
over chunks, w's gradient, adds up in fp32.
"""

import torch

from fastlm import native, vendor

# Rows, by device: with fewer, packing w for every product (on a CPU) and filling the device (a GPU) cost time. As many
# logits are few beside what else a step holds.
CHUNK, FEW = {"cpu": 512, "cuda": 4096}, 2**20


class Chunked:
    """The functions of linear_xent over those of `softmax`, an object with softmax_xent_fwd, _bwd and softmax_xent_."""

    def __init__(self, softmax):
        self.softmax = softmax

    def linear_xent_fwd(self, h, w, y, ignore):
        N, (V, _), w = len(h), w.shape, w.to(h.dtype)
        loss = h.new_empty(N, dtype=torch.promote_types(h.dtype, torch.float32))
        lse, logits = torch.empty_like(loss), _logits(h, V)
        for rows in _chunks(h, V):
            x = torch.mm(h[rows], w.t(), out=logits[: rows.stop - rows.start])
            loss[rows], lse[rows] = self.softmax.softmax_xent_fwd(x, y[rows], ignore)
        return loss, lse

    def linear_xent_bwd(self, dloss, h, w, y, lse, ignore):
        def gradient(x, rows):
            x.copy_(self.softmax.softmax_xent_bwd(dloss[rows].contiguous(), x, y[rows], lse[rows], ignore))

        return self._gradients(h, w, gradient)

    def linear_xent_grad(self, h, w, y, ignore, mean):
        N = len(h)
        loss = h.new_empty(N, dtype=torch.promote_types(h.dtype, torch.float32))
        count = (y != ignore).sum()
        dloss = (1 / count.to(loss.dtype)).expand(N).contiguous() if mean else torch.ones_like(loss)

        def gradient(x, rows):
            loss[rows], _ = self.softmax.softmax_xent_(x, dloss[rows], y[rows], ignore)

        dh, dw = self._gradients(h, w, gradient)
        return loss.sum() / count if mean else loss.sum(), dh, dw

    def _gradients(self, h, w, gradient):
        """(dh, dw); gradient(x, rows) puts that of the logits x of some rows in their place."""
        (V, C), narrow = w.shape, w.to(h.dtype)
        dh, dw, logits = torch.empty_like(h, memory_format=torch.contiguous_format), None, _logits(h, V)
        chunks, wide = _chunks(h, V), h.dtype == torch.promote_types(h.dtype, torch.float32)
        part = None if wide or len(chunks) <= 1 else h.new_empty(V, C)
        for rows in chunks:
            x = torch.mm(h[rows], narrow.t(), out=logits[: rows.stop - rows.start])
            gradient(x, rows)
            torch.mm(x, narrow, out=dh[rows])
            if part is None:
                dw = torch.mm(x.t(), h[rows]) if dw is None else dw.addmm_(x.t(), h[rows])
            else:
                torch.mm(x.t(), h[rows], out=part)
                dw = part.to(torch.float32, copy=True) if dw is None else dw.add_(part)
        return dh, (w.new_zeros(V, C) if dw is None else dw.to(w.dtype))


def _rows(h, V):
    return max(CHUNK.get(h.device.type, CHUNK["cpu"]), FEW // max(V, 1))


def _chunks(h, V):
    rows = _rows(h, V)
    return [slice(first, min(first + rows, len(h))) for first in range(0, len(h), rows)]


def _logits(h, V):
    return h.new_empty(min(_rows(h, V), len(h)), V)


cpu, torch_ = Chunked(getattr(native, "cpu", None)), Chunked(vendor)
