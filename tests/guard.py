"""Tensors that end at, or begin behind, a page that nobody may touch: a kernel that oversteps by a byte dies."""

import ctypes
import math
import mmap

import torch

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mappings = []  # mapped for the life of the process: a tensor may outlive its test


def far_apart(shape, dtype):
    """A tensor of zeros (N, …), its first dimension in strides of 2^30: the third element lies beyond 2^31.

    The strides alone fit into 32 bits, their products do not. Pages that nobody touches cost no memory.
    """
    inner = torch.empty(shape[1:], device="meta")
    stride = 2**30 + 64
    size = (stride * (shape[0] - 1) + inner.numel()) * dtype.itemsize
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000))
    _mappings.append(mapping)
    return torch.frombuffer(mapping, dtype=dtype).as_strided(shape, (stride, *inner.stride()))


def guarded(tensor, *, front=False):
    """A contiguous copy of a tensor whose last byte (or, with front, first byte) lies against a forbidden page."""
    tensor = tensor.contiguous()
    size = max(tensor.numel() * tensor.element_size(), 1)
    body = math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE
    mapping = mmap.mmap(-1, body + 2 * mmap.PAGESIZE)
    _mappings.append(mapping)
    view = (ctypes.c_char * len(mapping)).from_buffer(mapping)
    start = ctypes.addressof(view)
    for page in (start, start + mmap.PAGESIZE + body):
        if _libc.mprotect(page, mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = mmap.PAGESIZE if front else mmap.PAGESIZE + body - size
    copy = torch.frombuffer(mapping, dtype=tensor.dtype, count=max(tensor.numel(), 1), offset=offset)
    return copy[: tensor.numel()].view(tensor.shape).copy_(tensor)
