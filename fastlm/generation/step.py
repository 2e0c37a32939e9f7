"""A step of generation: decode a token for every row, draw the next.

    Step         the model's own forward; on a GPU a CUDA graph, replayed: one launch, nothing allocated, one small copy
    EngineStep   the engine of a CPU: one native call
    reread       the whole model, of a forward or with hooks of its own, over all that is written

The first two have the same two calls. `first(logits, left)` draws the tokens behind the prompts, every call after it
those of the next step; each returns a list of B ids, ENDED where a row has ended. A row ends after left[row] tokens or
with the token `stop` (None: never); it then goes along, but waits. Logits of which there is no draw raise RuntimeError.
"""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from fastlm import fast_path
from fastlm.generation.inference import inference
from fastlm.generation.sampling import BAD

ENDED = -1  # in place of a token: the row has ended
PAD = 64  # what a head's rows on a GPU are a multiple of


class Step:
    """draw(logits (B, V), uniform (B,)) → ids (B,), as `choose` does; uniform is (B, steps).

    With `captured` the cache must not be replaced while the step lives.
    """

    def __init__(self, model, cache, draw, uniform, stop, *, captured):
        self._model, self._cache, self._draw, self._uniform = model, cache, draw, uniform
        self._stop = ENDED if stop is None else stop
        self._new = torch.zeros(len(cache.lengths), dtype=torch.int64, device=model.device)  # what the step decodes
        self._left = torch.zeros_like(self._new, dtype=torch.int32)  # tokens that each row may still write
        self._at = torch.zeros(1, dtype=torch.int64, device=model.device)  # the column of uniform
        self._ids = torch.zeros_like(self._new)
        self._head = head_of(model, padded=model.device.type == "cuda")
        self._told = torch.zeros(len(self._ids), dtype=torch.int64, device="cpu",
                                 pin_memory=model.device.type == "cuda")
        self._run = capture(self._decode) if captured else self._decode

    def first(self, logits, left):
        self._left.copy_(torch.tensor(left, dtype=torch.int32, device="cpu"))
        self._at.zero_()
        self._next(logits)
        return self._tell()

    def __call__(self):
        self._run()
        return self._tell()

    def _decode(self):
        model = self._model
        last = model.config.n_positions - 1  # an ended row may be full
        positions = self._cache.begin(self._left.clamp(max=1), 1).clamp(max=last)
        hidden = model.hidden(self._new[:, None], positions=positions, cache=self._cache)  # (B, 1, C)
        self._cache.end()
        self._next(self._head(hidden[:, 0]))

    def _next(self, logits):
        drawn = self._draw(logits, self._uniform.index_select(1, self._at)[:, 0])
        alive = self._left > 0
        self._ids.copy_(torch.where(alive, drawn, ENDED))
        self._new.copy_(drawn.clamp(min=0))
        self._left.copy_(torch.where(alive & (drawn != self._stop), self._left - 1, 0))
        self._at.add_(1)

    def _tell(self):
        return checked(self._told.copy_(self._ids).tolist())


def head_of(model, *, padded):
    """What makes logits (B, V) of hidden states (B, C): the model's head, or, padded, one over a copy of its weight.

    The copy has rows of zeros behind, so that a product is aligned as a GPU's fast kernels want it: on an H200 64 rows
    take 155 µs with 50257 columns, cuBLAS's slowest way. A head of another class, or with hooks, stays as it is.
    """
    head = model.lm_head
    if not padded or fast_path.why_not(model, "lm_head") is not None or head.bias is not None:
        return head
    if (V := len(weight := head.weight)) % PAD == 0:
        return head
    wide = F.pad(weight.detach(), (0, 0, 0, -len(weight) % PAD))  # (Vp, C)
    return lambda hidden: F.linear(hidden, wide)[:, :V]


class EngineStep:
    """The steps of an Engine; sampler is a Sampler, uniform (B, steps) fp64."""

    def __init__(self, engine, sampler, uniform, stop):
        self._sampler, self._uniform, self._stop = sampler, uniform, stop
        self._new = torch.zeros(len(uniform), dtype=torch.int64, device="cpu")  # what it decodes, then what it drew
        self._counts = torch.ones(len(uniform), dtype=torch.int32, device="cpu")
        self._decode = engine.decoding(self._new, self._counts, sampler, uniform)
        self._left = None

    def first(self, logits, left):
        self._left = list(left)
        self._new.copy_(self._sampler(logits, self._uniform[:, 0]))
        return self._told()

    def __call__(self):
        self._decode()
        return self._told()

    def _told(self):
        ids = checked([token if left else ENDED for token, left in zip(self._new.tolist(), self._left)])
        for row, token in enumerate(ids):
            if self._left[row]:
                self._left[row] = 0 if token == self._stop else self._left[row] - 1
                if not self._left[row]:
                    self._counts[row] = 0
        return ids


def reread(model, texts, left, draw, uniform, stop):
    """Yields what a Step returns, of a model that is more than its parts: nothing is known of a cache.

    texts: a prompt (T,) for every row; model(tokens) reads it, and what is written behind it, again and again.
    """
    for step in range(max(left)):
        with inference(model):
            padded = pad_sequence(texts, batch_first=True)  # (B, T); pads stand on the right, where nobody looks
            logits = fast_path.logits_of(model, padded)[range(len(texts)), [len(text) - 1 for text in texts]]  # (B, V)
            drawn = draw(logits, uniform[:, step]).tolist()
        ids = checked([token if count else ENDED for token, count in zip(drawn, left)])
        left = [0 if token in (stop, ENDED) else count - 1 for token, count in zip(ids, left)]
        texts = [text if token == ENDED else F.pad(text, (0, 1), value=token) for text, token in zip(texts, ids)]
        yield ids
        if not any(left):
            return


def checked(ids):
    """The ids, none of them BAD."""
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
