"""How the CPU's products are cut into blocks, of sizes that change no bit of a result, and that suit a machine or not.

`fastlm tune` takes the fastest of the candidates, over which the tests run; unless it has, they are the usual ones.
"""

import functools
from itertools import product

# by op, and by what csrc/fastlm.h calls cut_…: the usual one first
CANDIDATES = {
    "gpt2_step": {"panels": (8, 4, 16), "bytes": (96 << 10, 48 << 10, 192 << 10, 384 << 10)},
    "gpt2_blocks": {"rows": (3, 1, 2, 4), "columns": (512, 256, 1024)},
}
DTYPES = {"gpt2_step": ("fp32", "bf16", "int8", "int4"), "gpt2_blocks": ("fp32",)}  # of the weights


@functools.cache
def every(op):
    """All combinations of an op's candidates, the usual one first: [{name: value}]."""
    return [dict(zip(CANDIDATES[op], values)) for values in product(*CANDIDATES[op].values())]


def is_one(op, dtype, cut):
    """Whether a cut is among the candidates of an op with weights of a dtype."""
    return dtype in DTYPES.get(op, ()) and cut in every(op)
