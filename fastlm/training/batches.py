"""Batches: the micro-batches of a run on its device; for a GPU the next one is read while it is at work on this one."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch


class _Buffer(NamedTuple):
    """Memory of the host that a micro-batch is copied to the device from."""

    tokens: torch.Tensor  # (micro_batch, T)
    targets: torch.Tensor  # (micro_batch, T)
    seed: torch.Tensor  # (4,)
    copied: torch.cuda.Event | None  # behind the last copy from it


class Batches:
    """(tokens, targets, seed) of a loader's micro-batches on a device; seed (4,) names a step's dropout.

    ahead: a thread reads into one of two buffers while what lies in the other is computed with, and the host waits for
    no copy; so it is for a GPU unless told. The thread pins no memory, which would end the capture of a CUDA graph.
    What it raises is raised where its batch is asked for.
    """

    pinned = True  # a GPU's buffers: it reads them itself

    def __init__(self, loader, config, device, *, ahead=None):
        self.loader, self.config, self.device = loader, config, device
        self.micro = min(config.micro_batch or config.batch_size, config.batch_size)
        self._next = None, None  # place and future of the batch that is read ahead
        self._buffers = None  # the one that is in use, and the next one's
        if device.type == "cuda" if ahead is None else ahead:
            self._buffers = [self._buffer() for _ in range(2)]
            self._thread = ThreadPoolExecutor(1, "batches")

    def __call__(self, number, first):
        """The micro-batch that begins with sequence `first` of step `number`."""
        place = number, first
        if self._buffers is None:
            tokens, targets, index = self.loader.batch(*place, self._count(first))
            return *(tensor.to(self.device) for tensor in (tokens, targets)), self._seed(number, index).to(self.device)
        (expected, future), self._next = self._next, (None, None)
        self._buffers.reverse()
        buffer, count = self._buffers[0], self._count(first)
        if expected != place:  # the first, or another than the next: its one thread has read that by then
            future = self._thread.submit(self._fill, buffer, place)
        future.result()
        given = buffer.tokens[:count], buffer.targets[:count], buffer.seed
        found = [tensor.to(self.device, non_blocking=True, copy=True) for tensor in given]
        if buffer.copied is not None:
            buffer.copied.record(torch.cuda.current_stream(self.device))
        if (following := self._following(number, first)) is not None:
            self._next = following, self._thread.submit(self._fill, self._buffers[1], following)
        return found

    def _count(self, first):
        return min(self.micro, self.config.batch_size - first)

    def _following(self, number, first):
        """The place behind a micro-batch; None behind the run's last."""
        if (first := first + self.micro) < self.config.batch_size:
            return number, first
        return (number + 1, 0) if number + 1 < self.config.steps else None

    def _fill(self, buffer, place):
        if buffer.copied is not None:
            buffer.copied.synchronize()
        number, first = place
        count = self._count(first)
        tokens, targets, index = self.loader.batch(number, first, count)
        buffer.tokens[:count].copy_(tokens)
        buffer.targets[:count].copy_(targets)
        buffer.seed.copy_(self._seed(number, index))

    def _seed(self, number, index):
        return torch.tensor([self.config.seed, number, 0, index], device="cpu")

    def _buffer(self):
        on_gpu, shape = self.device.type == "cuda" and self.pinned, (self.micro, self.config.sequence_length)
        tokens, targets, seed = (torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
                                 for size in (shape, shape, 4))
        return _Buffer(tokens, targets, seed, torch.cuda.Event() if on_gpu else None)
