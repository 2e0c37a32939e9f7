"""Greedy generation, B sequences of T tokens and N new ones, beside transformers, CTranslate2 and llama.cpp.

    prefill    the time of the first new token        roof: the products' FLOPs
    decode     the mean time of each further step     roof: weights and cache read once a step

The plain read of as many bytes takes part in the race: what the memory gives in that run, not at its best.

int8 and int4 are widths of the weights (fastlm.quantised), on a CPU; their error is that of the logits against fp64 of
the same weights, over 5 %, and their FLOPs have twice the roof of bf16: an instruction multiplies 64 pairs, not 32.
"""

import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch

from fastlm.generation import KVCache, stream_tokens
from fastlm.generation.engine import Engine, cache_dtype, why_not
from fastlm.measure.clock import Times, race
from fastlm.measure.numerics import DTYPES, norm_ratio
from fastlm.quantised import quantise_

from .harness import absent_rows, figures, row_of, told
from .peers import peers
from .programs import MODEL, Program, absent, pair, weights

SHAPES = {
    "cpu": [{"B": B, "T": T, "N": N, **MODEL} for B, T, N in ((1, 32, 32), (8, 32, 16), (1, 512, 32))],
    "cuda": [{"B": B, "T": 512, "N": 128, **MODEL} for B in (1, 8, 64, 256, 1024)],
}
READ = "read of as many bytes"
WIDTHS = {**DTYPES, "int8": torch.float32, "int4": torch.float32}  # and the dtype of what is no weight


def cases(shape, dtype, device):
    if shape["N"] < 2:
        raise ValueError(f"generate: N is {shape['N']}, wanted 2 or more new tokens")
    yield Generate(shape, dtype)


class Generate(Program):
    """Prefill and decode of every contender."""

    op = "generate"

    @property
    def memory(self):
        B, T, N, L, _, C, V = self.shape.values()
        size = WIDTHS[self.dtype].itemsize
        cache = 2 * B * (T + N) * L * C * size
        return weights(self.shape) * (2 * 4 + 2 * size + 8) + 3 * cache + B * T * (16 * C + V) * 4

    def run(self, device, roofs, *, seconds=1.0, cold=True):
        B, T, N, L, _, C, V = self.shape.values()
        dtype, quantised = WIDTHS[self.dtype], self.dtype not in DTYPES
        ours, theirs = pair(self.shape, T + N, device)
        if quantised:
            quantise_(ours, self.dtype)
        tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1)).to(device)
        error, fault = None, {}
        try:
            if quantised:
                error = _quantised_error(ours.eval(), tokens[:1])
            else:
                error = self._error(ours, theirs, tokens[:1], dtype)
        except Exception as raised:
            fault = told(raised, ours=True)
        ours = ours.to(dtype).eval()
        with tempfile.TemporaryDirectory() as folder:
            makers, missing = self._peers(theirs, tokens, device, Path(folder))
            makers = {"fastlm": lambda: lambda n: ours.generate(tokens, max_new_tokens=n, temperature=0, stop_at=None),
                      **makers}
            rows, racing, failed = [], {}, {}
            for name, make in makers.items():
                parts = [row_of(self, part, name, ours=name == "fastlm", cold=cold) for part in ("prefill", "decode")]
                rows += parts
                if name == "fastlm":
                    if error is not None and not error <= 1:
                        fault = {"wrong": True}
                    for part in parts:
                        part |= {"error": error} | fault
                    if fault:
                        continue
                try:
                    write = make()
                    got = write(N)
                    if len(got[0]) != T + N:
                        raise AssertionError(f"{name} wrote {len(got[0]) - T} tokens, wanted {N}")
                except Exception as raised:
                    for part in parts:
                        part |= told(raised, ours=part["ours"])
                    continue
                racing |= {(name, n): [lambda write=write, n=n: write(n)] for n in (1, N)}
            weight_bytes = self._weight_bytes()
            cached = torch.bfloat16 if quantised and device == "cpu" else dtype  # the keys and values
            step_bytes = weight_bytes + B * L * 2 * C * (T + N / 2) * cached.itemsize
            words = torch.ones(int(step_bytes) // 4, device=device)
            rows.append(row_of(self, "decode", READ, ours=False, cold=cold))
            times = race(racing | {(READ, N): [words.amax]}, device=device, seconds=seconds, rounds=(3, 30),
                         failed=failed)
        failed = {name: raised for (name, _), raised in failed.items()}
        roof, each = "bf16" if quantised else self.dtype, 1 if quantised else 2
        pairs = {"prefill": B * (T * (weights(self.shape) - V * C) + V * C + L * C * T * T),
                 "decode": B * weights(self.shape)}
        floors = {part: roofs.floor(bytes=weight_bytes if part == "prefill" else step_bytes, dtype=roof, traffic="read",
                                    flops=each * count) for part, count in pairs.items()}
        for row in rows:
            if row["contender"] in failed:
                row |= told(failed[row["contender"]], ours=row["ours"])
                continue
            if (row["contender"], N) not in times:
                continue
            prefills, taken = row["part"] == "prefill", times[row["contender"], N]
            if row["contender"] != READ:
                first, whole = (times[row["contender"], n].samples for n in (1, N))
                taken = Times(first if prefills else tuple((b - a) / (N - 1) for a, b in zip(first, whole)))
            if row["ours"] and not prefills:
                try:
                    row["latency_us"] = _latencies(ours, tokens, N)
                except Exception as raised:
                    row |= told(raised, ours=True)
                    continue
            row |= figures(taken, floors[row["part"]]) | {
                "tokens_per_s": B * (T if prefills else 1) / taken.median, "chosen": row["ours"],
            }
        rows += absent_rows(self, "decode", missing, cold=cold)
        return sorted(rows, key=lambda row: row["part"] != "prefill")

    def _weight_bytes(self):
        """Bytes of the weights that every step reads."""
        C, V = self.shape["C"], self.shape["V"]
        layers = weights(self.shape) - V * C
        if self.dtype == "int4":
            return layers * 9 / 16 + V * C  # 4.5 bits with the scales; the head is int8
        return (layers + V * C) * (1 if self.dtype == "int8" else DTYPES[self.dtype].itemsize)

    def _peers(self, theirs, tokens, device, folder):
        """({name: function that gives write(n)}, {name: why it does not take part})."""
        if theirs is None:  # the converted peers are made from transformers' model
            return {}, absent()
        known, missing = peers(self.dtype, device)
        if self.dtype not in DTYPES:  # transformers has no such weights for a CPU
            return {name: lambda peer=peer: peer(theirs.eval(), tokens, self.shape["N"], folder)
                    for name, peer in known.items()}, missing
        twins = {name: copy.deepcopy(theirs).to(DTYPES[self.dtype]).eval() for name in _CACHES}
        makers = {name: lambda name=name: _theirs(twins[name], tokens, **_CACHES[name]) for name in _CACHES}
        makers |= {name: lambda peer=peer: peer(theirs.eval(), tokens, self.shape["N"], folder)
                   for name, peer in known.items()}
        return makers, missing

    @torch.no_grad()
    def _error(self, ours, theirs, tokens, dtype):
        """Our logits' error against transformers' in fp64, over what is allowed; None without transformers."""
        if theirs is None:
            return None
        try:
            got = ours.to(dtype).eval()(tokens)[0]
            try:
                composed = theirs.to(dtype).eval()(tokens).logits
                # fp64 of the weights as rounded to the dtype: both compute with these
                truth = theirs.double()(tokens).logits
            except Exception:  # its own rows tell why
                return None
            return norm_ratio(got, composed, truth)
        finally:
            ours.float(), theirs.float()


# name: what transformers' generate does
_CACHES = {
    "transformers": {}, "transformers, static": {"cache": "static"},
    "transformers, compiled": {"cache": "static", "compiled": True},
}


def _theirs(model, tokens, cache=None, compiled=False):
    options = {} if cache is None else {"cache_implementation": cache}
    if compiled:
        from transformers.generation.configuration_utils import CompileConfig

        options["compile_config"] = CompileConfig(fullgraph=False)
        options["compile_config"]._compile_all_devices = True  # it compiles on GPUs alone otherwise
    elif cache is not None:
        options["disable_compile"] = True

    def write(n):
        with torch.inference_mode():
            return model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, min_new_tokens=n,
                                  max_new_tokens=n, **options)

    return write


@torch.inference_mode()
def _quantised_error(model, tokens):
    """The logits, the engine's where it runs, against fp64 of the same weights, over 5 % of them."""
    if why_not(model) is None:
        cache = KVCache(model.config, *tokens.shape, device="cpu", dtype=cache_dtype(model))
        got = Engine(model, cache).every(tokens)
    else:
        got = model(tokens)[0]
    truth = copy.deepcopy(model).double()(tokens)[0]
    return float((got - truth).norm() / truth.norm()) / 0.05


def _latencies(model, tokens, N):
    """Microseconds of a step: the 50th, 90th and 99th of a hundred."""
    taken, last = [], None
    for _ in stream_tokens(model, tokens, max_new_tokens=N, temperature=0, stop_at=None):
        now = time.perf_counter()
        taken += [] if last is None else [(now - last) * 1e6]
        last = now
    if len(taken) < 2:
        return taken * 3
    cuts = statistics.quantiles(taken, n=100, method="inclusive")
    return [round(cuts[at - 1], 1) for at in (50, 90, 99)]
