"""Philox4x32-10 in plain PyTorch: the random bytes behind fastlm's attention dropout, the same on every backend.

A counter (4 words of 32 bits) and a key (2 words) give 4 random words; 16 neighbouring keys of a query share a call
and take a byte each. Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch

_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85


def _multiply(a, b):
    """High and low 32 bits of the product of a (int64 tensor below 2^32) and the constant b, without overflow."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)  # a·b = low + high·2^16, each below 2^48
    middle = (low >> 16) + high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter, key):
    """Four int64 tensors of random words below 2^32, of four counter and two key tensors that broadcast together."""
    c0, c1, c2, c3 = (word & _LOW for word in counter)
    k0, k1 = (word & _LOW for word in key)
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def keep_mask(seed, B, H, T, S, drop):
    """Which weights survive, bool (B, H, T, S): a byte each, dropped with probability drop / 256.

    seed (4,) int64: seed, step, layer, index of the first sequence.
    """
    device = seed.device
    b = torch.arange(B, device=device)[:, None, None, None]
    h = torch.arange(H, device=device)[:, None, None]
    t = torch.arange(T, device=device)[:, None]
    block = torch.arange(-(-S // 16), device=device)  # sixteen keys each
    counter = block, t, seed[3] + b, (seed[2] << 16) | h
    words = torch.broadcast_tensors(*philox(counter, (seed[0], seed[1])))  # 4 × (B, H, T, S/16)
    words = torch.stack(words, dim=-1)[..., None]  # (B, H, T, S/16, 4, 1)
    shifts = torch.arange(4, device=device) * 8
    return ((words >> shifts) & 0xFF).reshape(B, H, T, -1)[..., :S] >= drop
