"""The decode step: a token for every row. On a GPU it is a CUDA graph, replayed: nothing is allocated, one launch."""

import torch


class Step:
    """`step(new, left)` → logits (B, V) behind the tokens `new` (B,), which the cache then holds too.

    left: how many tokens each row may still write; a row with none goes along, but waits. With `captured` every call
    returns the same tensor, and the cache must not be replaced while the step lives.
    """

    def __init__(self, model, cache, *, captured):
        self._model, self._cache = model, cache
        self._new = torch.zeros(len(cache.lengths), dtype=torch.int64, device=model.device)
        self._counts = torch.zeros_like(self._new, dtype=torch.int32)
        self._run = capture(self._decode) if captured else self._decode

    def __call__(self, new, left):
        self._new.copy_(new)
        self._counts.copy_(torch.tensor(left, dtype=torch.int32).clamp(max=1))
        return self._run()

    def _decode(self):
        model = self._model
        last = model.config.n_positions - 1  # an ended row may be full
        positions = self._cache.begin(self._counts, 1).clamp(max=last)
        hidden = model.hidden(self._new[:, None], positions=positions, cache=self._cache)  # (B, 1, C)
        self._cache.end()
        return model.lm_head(hidden[:, 0])


def capture(run):
    """A function that repeats `run` as a CUDA graph and returns its output, always the same tensor.

    `run` must have no effect yet: it is called once before, so that every kernel is chosen, compiled and loaded.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay():
        graph.replay()
        return output

    return replay
