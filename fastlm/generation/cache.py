"""KVCache: the keys and values of every layer, in pages, with a length per sequence.

    k_pages[layer], v_pages[layer] (B · n, page, H, D)    block_table (B, n)    lengths (B,)

In memory a page is (H, page, D): a head's keys lie one behind the other. Every sequence owns n pages from the start,
so the cache does not grow with the text. A step is announced with `begin`, run through the model, whose layers call
`attend`, and closed with `end`; what the engine appends it counts itself.
"""

import math

import torch

from fastlm.ops import attention_qkv, cache_append_, decode_attention

PAGE = 64  # positions a page


class KVCache:
    """Room for `capacity` positions of `batch` sequences of a model with `config`.

    layers: of as many blocks, heads: (H, D) of them; config's unless given. Where a model's modules append other heads,
    or another dtype, the pages become such before anything is in them. memory: that of a cache which is done with
    (uint8), taken where it is large enough: fresh memory costs a page fault every 4 KiB.
    """

    def __init__(
        self, config, batch, capacity, *, device, dtype, page=PAGE, layers=None, heads=None, memory=None
    ):
        n = -(-capacity // page)
        self._batch, self._page = batch * n, page
        H, D = (config.n_head, config.n_embd // config.n_head) if heads is None else heads
        shape = 2, config.n_layer if layers is None else layers, batch * n, H, page, D
        size = math.prod(shape) * dtype.itemsize
        if memory is None or len(memory) < size:
            memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.memory = memory
        k_pages, v_pages = memory[:size].view(dtype).view(shape).transpose(3, 4)
        self.k_pages, self.v_pages = list(k_pages), list(v_pages)
        self.block_table = torch.arange(batch * n, dtype=torch.int32, device=device).view(batch, n)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._empty = True

    def _pages(self, H, D, device, dtype):
        return torch.empty(self._batch, H, self._page, D, device=device, dtype=dtype).transpose(1, 2)

    def begin(self, counts, T):
        """Positions (B, T) int64, for the model, of a step of T columns.

        The first counts (B,) int32 columns of a row are real. The others are appended nowhere, and what the
        model says of them means nothing. After the first step, the prompts, a count is T, or 0: the row waits.
        """
        columns = torch.arange(T, dtype=torch.int32, device=self.lengths.device)
        positions = self.lengths[:, None] + columns
        self._written = torch.where(columns < counts[:, None], positions, -1)  # (B, T)
        self._total = self.lengths + counts
        return positions.long()

    def attend(self, layer, qkv, scale=None):
        """The attention of q over all keys and values appended so far, those of qkv (B, T, 3, H, D) too."""
        q, k, v = qkv.unbind(2)
        held = self.k_pages[layer]
        if self._empty and (held.shape[2:], held.dtype) != (k.shape[2:], k.dtype):
            for pages in (self.k_pages, self.v_pages):
                pages[layer] = self._pages(*k.shape[2:], k.device, k.dtype)
        pages = self.k_pages[layer], self.v_pages[layer]
        cache_append_(*pages, k, v, self.block_table, self._written)
        if self._empty:  # pads stand on the right, where no real token looks
            return attention_qkv(qkv, scale=scale)
        return decode_attention(q, *pages, self.block_table, self._total, scale=scale)

    def end(self):
        """Closes a step: what was appended counts."""
        self.lengths.copy_(self._total)  # in place, so that a captured step finds it
        self._empty = False

    def filled(self):
        """Says that somebody else has appended to the pages, and counted it in `lengths`."""
        self._empty = False

    def repeat(self, times):
        """Makes every sequence `times` sequences with pages of their own, neighbours in the batch."""
        batch, n = self.block_table.shape
        for pages in (self.k_pages, self.v_pages):
            for layer, cache in enumerate(pages):
                held = cache.transpose(1, 2)  # as it lies in memory
                rows = held.view(batch, n, *held.shape[1:]).repeat_interleave(times, 0)
                pages[layer] = rows.view(batch * times * n, *held.shape[1:]).transpose(1, 2)
        table = torch.arange(batch * times * n, dtype=torch.int32, device=self.block_table.device)
        self.block_table = table.view(batch * times, n)
        self.lengths = self.lengths.repeat_interleave(times)
