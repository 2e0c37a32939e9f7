"""KVCache: the keys and values of every layer, in pages, with a length per sequence.

    k_pages[layer], v_pages[layer] (B · n, page, H, D)    block_table (B, n)    lengths (B,)

In memory a page is (H, page, D): a head's keys lie one behind the other. Every sequence owns n pages from the start,
so the cache does not grow with the text. A step is announced with `begin`, run through the model, whose layers call
`attend`, and closed with `end`; what the engine appends it counts itself.
"""

import torch

from fastlm.ops import attention_qkv, cache_append_, decode_attention

PAGE = 64  # positions a page


class KVCache:
    """Room for `capacity` positions of `batch` sequences of a model with `config`."""

    def __init__(self, config, batch, capacity, *, device, dtype, page=PAGE):
        H, n = config.n_head, -(-capacity // page)
        shape = (batch * n, H, page, config.n_embd // H)
        self.k_pages, self.v_pages = (
            [torch.empty(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(config.n_layer)]
            for _ in range(2)
        )
        self.block_table = torch.arange(batch * n, dtype=torch.int32, device=device).view(batch, n)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._empty = True

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

    def attend(self, layer, qkv):
        """The attention of q over all keys and values appended so far, those of qkv (B, T, 3, H, D) too."""
        q, k, v = qkv.unbind(2)
        pages = self.k_pages[layer], self.v_pages[layer]
        cache_append_(*pages, k, v, self.block_table, self._written)
        if self._empty:  # pads stand on the right, where no real token looks
            return attention_qkv(qkv)
        return decode_attention(q, *pages, self.block_table, self._total)

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
