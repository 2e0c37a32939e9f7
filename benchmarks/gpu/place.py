"""Where a step runs, and the rows it sends to the record.

A row goes out as a line "@row {json}": figures; or `failed`, a sentence; or `told`, a line for the table at the end.
Nothing here refuses for ours: what one of our kernels raises is a failed row, and the next one runs.
"""

import contextlib
import gc
import json
import math
import os
import time

import torch

import fastlm
from fastlm.backends.machine import BACKENDS, devices, machine_why_not
from fastlm.dispatch.refusal import Refused
from fastlm.dispatch.table import backends_of

from .. import harness
from ..programs import MODEL
from .command import ROW

TINY = {"L": 1, "H": 2, "C": 32, "V": 97}
OFF = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)


def emit(**row):
    """A row, on the way to the record; NaN and infinity as text, which JSON lacks."""
    def plain(value):
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, dict):
            return {key: plain(some) for key, some in value.items()}
        return [plain(some) for some in value] if isinstance(value, (list, tuple)) else value

    print(ROW + json.dumps(plain(row)), flush=True)


@contextlib.contextmanager
def guarded(may_refuse=False, **what):
    """What raises inside is a failed row; with may_refuse, dispatch's own refusal is a refused one."""
    try:
        yield
    except Exception as error:
        if may_refuse and isinstance(error, Refused):
            emit(**what, refused=str(error))
            return
        emit(**what, failed=f"{type(error).__name__}: {harness.refusal(error)}")
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises where the context is gone: then the step ends


class Place:
    """Where a step runs: the GPU, or, rehearsed, the CPU with tiny shapes."""

    def __init__(self, dry):
        self.dry, self.device = dry, "cpu" if dry else "cuda"
        self.end = time.monotonic() + float(os.environ.get("FASTLM_STEP_SECONDS", "inf"))

    def leaves(self, seconds, **what):
        """Whether the step has so many seconds left; where not, what is left out is said."""
        if self.end - time.monotonic() >= seconds:
            return True
        emit(**what, told=f"left out, no time was left: {what}")
        return False

    def backends(self, family=None):
        """Ours that take tensors here."""
        names = BACKENDS if family is None else backends_of(family)
        return [name for name in names if name != "reference" and machine_why_not(name) is None
                and self.device in devices(name)]

    def sizes(self, **sizes):
        """A GPT-2's sizes and others: 124M's, or tiny ones."""
        return {**sizes, **MODEL} if not self.dry else {**{key: min(size, 8) for key, size in sizes.items()}, **TINY}

    def sync(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def free(self):
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def model(self, shape, *, positions, vocabulary=None):
        """A GPT-2 of a shape (letters → sizes) with random weights, the same in every process."""
        torch.manual_seed(0)
        config = fastlm.GPT2Config(
            vocab_size=vocabulary or shape["V"], n_positions=positions, n_embd=shape["C"], n_layer=shape["L"],
            n_head=shape["H"], bos_token_id=None, eos_token_id=None, **OFF)
        return fastlm.GPT2(config).to(self.device)

    def tokens(self, shape, *, more=0):
        """Token ids (B, T + more)."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(shape["V"], (shape["B"], shape["T"] + more), generator=generator).to(self.device)
