"""A training step (forward, loss, backward, clipping, AdamW) beside transformers and plain PyTorch, compiled.

fp32, or bf16 by autocast over fp32 weights. FLOPs: 6 a weight and token, and 6 · L · C · T a token for attention.
"""

import contextlib

import torch

from fastlm.backends import native
from fastlm.measure.clock import race
from fastlm.measure.numerics import DTYPES
from fastlm.training.config import TrainConfig
from fastlm.training.optimizer import AdamW
from fastlm.training.step import autocast

from .apart import Process
from .harness import absent_rows, figures, peak_bytes, row_of, told
from .programs import MODEL, Program, absent, pair, plain_loss, weights

BABY = {"L": 4, "H": 4, "C": 128, "V": 65}  # nanoGPT's CPU model
SHAPES = {
    "cpu": [{"B": 4, "T": 256, **MODEL}, {"B": 12, "T": 64, **BABY}],
    "cuda": [{"B": 32, "T": 1024, **MODEL}, {"B": 16, "T": 1024, "L": 24, "H": 16, "C": 1024, "V": 50257}],
}


def cases(shape, dtype, device):
    yield Train(shape, dtype)


class Train(Program):
    """A step of every contender; on a CPU each in a process of its own, where our trainer keeps its heap."""

    op = "train"
    apart = True

    @property
    def memory(self):
        B, T, L, H, C, V = self.shape.values()
        return weights(self.shape) * 16 * 3 + B * T * (L * (40 * C + 2 * H * T) + 4 * V) * 4

    def run(self, device, roofs, *, seconds=1.0, cold=True):
        B, T, L, _, C, V = self.shape.values()
        truth, rows, racing, failed = self._truth(device), [], {}, {}
        with contextlib.ExitStack() as stack:
            for name in CONTENDERS:
                if name.split(",")[0] in absent():
                    continue
                row = row_of(self, "step", name, ours=name == "fastlm", cold=cold)
                rows.append(row)
                try:
                    loss = _loss(name, self.shape, self.dtype, device)
                    if truth is not None:
                        unit = torch.finfo(DTYPES[self.dtype]).eps * truth
                        row["error"] = abs(loss - truth) / (8 * unit if self.dtype == "fp32" else unit)
                    if row["ours"] and not row.get("error", 0) <= 1:
                        row["wrong"] = True
                        continue
                    step = self._stepping(stack, name, device)
                    row["peak_mib"] = None if (peak := step(peak=True)) is None else round(peak / 2**20)
                except Exception as error:
                    row |= told(error, ours=row["ours"])
                    continue
                racing[name] = [step]
            times = race(racing, device=device, seconds=seconds, rounds=(3, 30), failed=failed)
        flops = 6 * B * T * (weights(self.shape) + L * C * T)
        for row in rows:
            if row["contender"] in failed:
                row |= told(failed[row["contender"]], ours=row["ours"])
            if (taken := times.get(row["contender"])) is not None:
                row |= figures(taken, flops / roofs.products[self.dtype]) | {
                    "tokens_per_s": B * T / taken.median, "tflop_per_s": flops / taken.median * 1e-12,
                    "chosen": row["ours"],
                }
        return rows + absent_rows(self, "step", absent(), cold=cold)

    def _truth(self, device):
        """The loss that transformers computes in fp32; None where it does not."""
        try:
            return None if "transformers" in absent() else _loss("transformers", self.shape, "fp32", device)
        except Exception:  # its own row tells why
            return None

    def _stepping(self, stack, name, device):
        arguments = {"name": name, "shape": self.shape, "dtype": self.dtype, "device": str(device)}
        if self.apart and torch.device(device).type == "cpu":
            return stack.enter_context(Process("bench_train", "stepping", **arguments)).ask
        return stepping(**arguments)


PLAIN = "nanoGPT's architecture, compiled"
CONTENDERS = ("fastlm", "transformers", "transformers, compiled", PLAIN)


def stepping(name, shape, dtype, device):
    """step(peak=False) of a contender: a training step; with peak it returns the bytes that a second one takes."""
    model, loss_of = _contender(name, shape, device)
    step = (_our_step if name == "fastlm" else _step)(model, loss_of, dtype, device)

    def run(peak=False):
        step()
        return peak_bytes(step, device) if peak else None

    return run


def _contender(name, shape, device):
    """(model, a function without arguments that gives its loss): the same weights and tokens for all."""
    B, T, V = shape["B"], shape["T"], shape["V"]
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1)).to(device)
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    ours, theirs = pair(shape, T, device)
    if name == "fastlm":
        return ours, lambda: ours.loss(tokens, targets)
    if name == PLAIN.removesuffix(", compiled"):
        return ours, lambda: plain_loss(ours, tokens, targets)
    if name == PLAIN:
        compiled = torch.compile(plain_loss)
        return ours, lambda: compiled(ours, tokens, targets)
    run = torch.compile(theirs) if name.endswith("compiled") else theirs
    return theirs, lambda: run(tokens, labels=targets, shift_labels=targets).loss


@torch.no_grad()
def _loss(name, shape, dtype, device):
    """The loss of a contender before the first step; compiled is not compiled here."""
    _, loss_of = _contender(name.removesuffix(", compiled"), shape, device)
    with (_our_autocast if name == "fastlm" else _autocast)(dtype, device):
        return float(loss_of())


def _autocast(dtype, device):
    return torch.autocast(torch.device(device).type, dtype=DTYPES[dtype], enabled=dtype != "fp32")


def _our_autocast(dtype, device):
    return autocast(dtype, torch.device(device).type)


def _our_step(model, loss_of, dtype, device):
    """As the trainer takes it."""
    model.train()
    if torch.device(device).type == "cpu":
        native.keep_heap()
    optimizer = AdamW(model, TrainConfig(data="", out="", grad_clip=1.0))

    def step():
        with _our_autocast(dtype, device):
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
