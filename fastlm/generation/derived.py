"""What was made of a model's weights, and whether they are still the same: a change counts from the next call on.

torch counts changes in place. Those that go around it (through `.data`, numpy, or another parameter in the same place)
show in checksums of the memory, which `of` compares: all of it where the call is long, or the weights are few, so that
this takes less than a hundredth of its time; else one of 47, in turn, over every 47th line of 64 bytes of a matrix.
Being a prime, 47 leaves no whole row and no whole column out, nor a change of all; a few numbers in one place may show
as late as in the 47th call, or in the first long one.
"""

import math
import threading
import weakref

import torch

from fastlm.backends import native

LINE = 64  # bytes; csrc/cpu/checksum.cpp
APART = 47, 43, 41, 37, 31, 29, 23, 19, 17, 13, 11, 7, 5, 3, 2, 1  # csrc/fastlm.h, kChecksums, and what is below it
FEW = 2**22  # bytes that are read in no time
_made = weakref.WeakKeyDictionary()  # model → _Made
_lock = threading.Lock()


class _Made:
    """A copy, and the weights that it was made of."""

    def __init__(self, state, weights, make):
        self.state, self._turn = state, 0
        spans = [_span(weight) for weight in weights]
        self._few = sum(size for _, size, _ in spans) <= FEW
        self._spans = torch.tensor(spans, dtype=torch.int64, device="cpu").view(-1, 3)
        self._sums = native.cpu.checksum(self._spans)  # before the copy: what changes meanwhile shows
        self.copy = make()

    def holds(self, whole):
        """Whether the memory of the weights is what it was, as far as is looked at."""
        if whole or self._few:
            return native.cpu.checksum(self._spans) == self._sums
        self._turn = (self._turn + 1) % len(self._sums)
        return native.cpu.checksum(self._spans, only=self._turn)[self._turn] == self._sums[self._turn]


def of(model, weights, make, *, note, whole):
    """`make()`, or what it gave for this model before, if weights and note are the same; whole: all memory is read."""
    state = [note, *(_state(weight) for weight in weights)]
    with _lock:
        found = _made.get(model)
        if found is None or found.state != state or not found.holds(whole):
            found = _made[model] = _Made(state, weights, make)
        return found.copy


def _state(weight):
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, weight.shape, weight.stride()


def _span(weight):
    """(address, bytes, lines from one of a checksum to its next) of what a tensor reaches in memory."""
    size = weight.element_size()
    reach = 1 + sum((n - 1) * stride for n, stride in zip(weight.shape, weight.stride())) if weight.numel() else 0
    row = max(weight.stride()) * size // LINE if weight.dim() > 1 else 1  # lines
    apart = next(n for n in APART if n <= max(row, 1) and math.gcd(n, row) == 1)
    return weight.data_ptr(), reach * size, apart
