"""The dropout mask of attention: Philox4x32-10, a byte for every weight, the same on every backend and for any tiles.

    words        = philox(key = lo32(seed[0]), lo32(seed[1]); counter = s / 16, t, lo32(seed[3] + b), seed[2] << 16 | h)
    keep[t, s]   = byte s % 16 of the 16 bytes of words ≥ drop

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import triton
import triton.language as tl


@triton.jit
def keep_mask(seed_ptr, b, h, t, s0, DROP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """Which weights survive, bool (BLOCK_T, BLOCK_S), for queries t (BLOCK_T,) and the keys from s0, a multiple of 16.

    seed_ptr: seed, step, layer, index of the first sequence, int64; b, h: sequence and head.
    """
    key = (tl.load(seed_ptr) & 0xFFFFFFFF) | (tl.load(seed_ptr + 1) << 32)
    layer_head = ((tl.load(seed_ptr + 2) << 16) | h).to(tl.uint32)
    sequence = (tl.load(seed_ptr + 3) + b).to(tl.uint32)
    zero = tl.zeros((BLOCK_T, BLOCK_S // 16), tl.uint32)
    sixteen = (s0 // 16 + tl.arange(0, BLOCK_S // 16)).to(tl.uint32)[None, :] + zero
    w0, w1, w2, w3 = tl.philox(key, sixteen, t.to(tl.uint32)[:, None] + zero, sequence + zero, layer_head + zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (BLOCK_T, BLOCK_S / 16, 2, 2), in order w0 … w3
    words = tl.reshape(words, (BLOCK_T, BLOCK_S // 4))
    bytes = (words[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :].to(tl.uint32)) & 0xFF
    return tl.reshape(bytes, (BLOCK_T, BLOCK_S)) >= DROP
