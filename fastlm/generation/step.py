"""A step of generation: decode a token for every row, draw the next. On a GPU it is a CUDA graph, replayed: one launch,
nothing allocated, one small copy to the host.
"""

import torch

from fastlm.generation.sampling import BAD

ENDED = -1  # in place of a token: the row has ended


class Step:
    """`first(logits, left)` draws the tokens behind the prompts, every call after it those of the next step.

    Both return a list of B ids, ENDED where a row has ended. A row ends after left[row] tokens or with the token `stop`
    (None: never); it then goes along, but waits. draw(logits (B, V), uniform (B,)) → ids (B,), as `choose` does;
    uniform is (B, steps). With `captured` the cache must not be replaced while the step lives. Raises RuntimeError for
    logits of which there is no draw. An engine, where one is given, decodes in the model's place.
    """

    def __init__(self, model, cache, draw, uniform, stop, *, captured, engine=None):
        self._model, self._cache, self._draw, self._uniform = model, cache, draw, uniform
        self._engine = engine
        self._stop = ENDED if stop is None else stop
        self._new = torch.zeros(len(cache.lengths), dtype=torch.int64, device=model.device)  # what the step decodes
        self._left = torch.zeros_like(self._new, dtype=torch.int32)  # tokens that each row may still write
        self._at = torch.zeros(1, dtype=torch.int64, device=model.device)  # the column of uniform
        self._ids = torch.zeros_like(self._new)
        self._told = torch.zeros(len(self._ids), dtype=torch.int64, pin_memory=model.device.type == "cuda")
        self._run = capture(self._decode) if captured else self._decode

    def first(self, logits, left):
        self._left.copy_(torch.tensor(left, dtype=torch.int32))
        self._at.zero_()
        self._next(logits)
        return self._tell()

    def __call__(self):
        self._run()
        return self._tell()

    def _decode(self):
        model = self._model
        if self._engine is not None:
            self._next(self._engine(self._new[:, None], self._left.clamp(max=1)))
            return
        last = model.config.n_positions - 1  # an ended row may be full
        positions = self._cache.begin(self._left.clamp(max=1), 1).clamp(max=last)
        hidden = model.hidden(self._new[:, None], positions=positions, cache=self._cache)  # (B, 1, C)
        self._cache.end()
        self._next(model.lm_head(hidden[:, 0]))

    def _next(self, logits):
        drawn = self._draw(logits, self._uniform.index_select(1, self._at)[:, 0])
        alive = self._left > 0
        self._ids.copy_(torch.where(alive, drawn, ENDED))
        self._new.copy_(drawn.clamp(min=0))
        self._left.copy_(torch.where(alive & (drawn != self._stop), self._left - 1, 0))
        self._at.add_(1)

    def _tell(self):
        ids = self._told.copy_(self._ids).tolist()
        if BAD in ids:
            row = ids.index(BAD)
            raise RuntimeError(f"the logits of row {row} hold NaN or infinity; are the model's weights good?")
        return ids


def capture(run):
    """A function that repeats `run` as a CUDA graph.

    `run` must have no lasting effect yet: it is called once before, so that every kernel is chosen, compiled, loaded.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
