"""A training step (forward, loss, backward, clipping, AdamW) beside transformers, plain and compiled.

fp32, or bf16 by autocast over fp32 weights. FLOPs: 6 a weight and token, and 6 · L · C · T a token for attention.
"""

import torch

from fastlm import native
from fastlm.measure.clock import race
from fastlm.numerics import DTYPES
from fastlm.training.config import TrainConfig
from fastlm.training.optimizer import AdamW

from .harness import absent_rows, figures, peak_bytes, refusal, row_of
from .programs import MODEL, Program, absent, pair, weights

BABY = {"L": 4, "H": 4, "C": 128, "V": 65}  # nanoGPT's CPU model
SHAPES = {
    "cpu": [{"B": 4, "T": 256, **MODEL}, {"B": 12, "T": 64, **BABY}],
    "cuda": [{"B": 32, "T": 1024, **MODEL}, {"B": 16, "T": 1024, "L": 24, "H": 16, "C": 1024, "V": 50257}],
}


def cases(shape, dtype, device):
    yield Train(shape, dtype)


class Train(Program):
    """A step of every contender."""

    op = "train"

    @property
    def memory(self):
        B, T, L, H, C, V = self.shape.values()
        return weights(self.shape) * 16 * 3 + B * T * (L * (40 * C + 2 * H * T) + 4 * V) * 4

    def run(self, device, roofs, *, seconds=1.0, cold=True):
        B, T, L, _, C, V = self.shape.values()
        ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1)).to(device)
        tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        ours, theirs = pair(self.shape, T, device)
        losses = {"fastlm": (ours, lambda: ours.loss(tokens, targets))}
        if theirs is not None:
            _, twin = pair(self.shape, T, device)
            compiled = torch.compile(twin)
            given = {"labels": targets, "shift_labels": targets}
            losses["transformers"] = theirs, lambda: theirs(tokens, **given).loss
            losses["transformers, compiled"] = twin, lambda: compiled(tokens, **given).loss
        rows, racing, truth = [], {}, None
        if theirs is not None:
            with torch.no_grad():
                truth = float(losses["transformers"][1]())
        for name, (model, loss_of) in losses.items():
            row = row_of(self, "step", name, ours=name == "fastlm", cold=cold)
            rows.append(row)
            step = (_our_step if row["ours"] else _step)(model, loss_of, self.dtype, device)
            try:
                with torch.no_grad(), _autocast(self.dtype, device):
                    loss = float(loss_of())
                if truth is not None:
                    unit = torch.finfo(DTYPES[self.dtype]).eps * truth
                    row["error"] = abs(loss - truth) / (8 * unit if self.dtype == "fp32" else unit)
                step()
                row["peak_mib"] = None if (peak := peak_bytes(step, device)) is None else round(peak / 2**20)
            except (RuntimeError, NotImplementedError, TypeError) as failed:
                row["refused"] = refusal(failed)
                continue
            if row["ours"] and not row.get("error", 0) <= 1:
                row["wrong"] = True
                continue
            racing[name] = [step]
        times = race(racing, device=device, seconds=seconds, rounds=(3, 30), before=_heap)
        flops = 6 * B * T * (weights(self.shape) + L * C * T)
        for row in rows:
            if (taken := times.get(row["contender"])) is not None:
                row |= figures(taken, flops / roofs.products[self.dtype]) | {
                    "tokens_per_s": B * T / taken.median, "tflop_per_s": flops / taken.median * 1e-12,
                    "chosen": row["ours"],
                }
        return rows + absent_rows(self, "step", absent(), cold=cold)


def _autocast(dtype, device):
    return torch.autocast(torch.device(device).type, dtype=DTYPES[dtype], enabled=dtype != "fp32")


def _heap(name):
    """Our trainer keeps what it frees; for peers blocks above 32 MiB are mapped anew, as the C library does it."""
    native.keep_heap(large=name == "fastlm")


def _our_step(model, loss_of, dtype, device):
    """As the trainer takes it."""
    model.train()
    optimizer = AdamW(model, TrainConfig(data="", out="", grad_clip=1.0))

    def step():
        with _autocast(dtype, device):
            loss = loss_of()
        loss.backward()
        optimizer.step(*optimizer.gradients(), learning_rate=1e-6)
        optimizer.zero_grad()

    return step


def _step(model, loss_of, dtype, device):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step():
        with _autocast(dtype, device):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
