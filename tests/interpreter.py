"""Makes Triton's interpreter compute bf16 as a GPU does, on Triton 3.6 to 3.9.

The interpreter keeps bf16 as uint16 and hands these bits to numpy's integer arithmetic: products and sums are
nonsense, casts truncate. Here every operation on bf16 widens to float32 first and rounds its result to nearest even.
"""

import numpy as np


def widen(bits):
    """float32 of bf16 bits (uint16)."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values):
    """bf16 bits (uint16) of numbers, rounded to nearest even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def install():
    """Patches the interpreter of the installed Triton; once per process."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "computes_bf16", False):
        return
    builder.computes_bf16 = True

    def is_bf16(x):
        return x.dtype.scalar == tl.bfloat16

    def up(x):
        return handle(widen(x.data), tl.float32) if is_bf16(x) else x

    def down(x):
        return x if x.data.dtype == np.bool_ else handle(narrow(x.data), tl.bfloat16)

    binary, unary, ternary = builder.binary_op, builder.unary_op, builder.ternary_op
    dot, fma, cast, convert = builder.create_dot, builder.create_fma, builder.cast_impl, builder.create_fp_to_fp

    def cast_bf16(self, x, dtype):
        source, target = x.dtype.scalar, dtype.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            return up(x) if target == tl.float32 else cast(self, up(x), dtype)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return handle(narrow(x.data.astype(np.float32)), tl.bfloat16)
        return cast(self, x, dtype)

    def convert_bf16(self, x, dtype, rounding):
        kinds = {x.dtype.scalar, dtype.scalar}
        ours = tl.bfloat16 in kinds and kinds <= {tl.bfloat16, tl.float32, tl.float16}
        if ours and rounding != interpreter._ir.ROUNDING_MODE.RTZ:
            return cast_bf16(self, x, dtype)
        return convert(self, x, dtype, rounding)

    def ternary_bf16(self, a, b, c, op):  # a selection moves bits; only a clip computes
        if is_bf16(c) and op is np.clip:
            return down(ternary(self, up(a), up(b), up(c), op))
        return ternary(self, a, b, c, op)

    def dot_bf16(self, a, b, d, *precision):
        out = dot(self, up(a), up(b), up(d), *precision)
        return down(out) if is_bf16(d) else out

    builder.binary_op = lambda self, a, b, op: (
        down(binary(self, up(a), up(b), op)) if is_bf16(a) else binary(self, a, b, op)
    )
    builder.unary_op = lambda self, a, op: down(unary(self, up(a), op)) if is_bf16(a) else unary(self, a, op)
    builder.ternary_op = ternary_bf16
    builder.create_fma = lambda self, a, b, c: (
        down(fma(self, up(a), up(b), up(c))) if is_bf16(c) else fma(self, a, b, c)
    )
    builder.create_dot = dot_bf16
    builder.cast_impl = cast_bf16
    builder.create_fp_to_fp = convert_bf16
    builder.get_bf16 = lambda self, value: handle(narrow(np.array([value])), tl.bfloat16)

    load, store = builder.create_masked_load, builder.create_masked_store

    def as_mask(x):  # `int32 < int32 & int64 < int64` is an integer there, which 3.9 takes for no mask
        return handle(np.asarray(x if isinstance(x, np.ndarray) else x.data).astype(bool), tl.int1)

    builder.create_masked_load = lambda self, ptrs, mask, *more, **named: load(
        self, ptrs, as_mask(mask), *more, **named
    )
    builder.create_masked_store = lambda self, ptrs, x, mask, *more, **named: store(
        self, ptrs, x, as_mask(mask), *more, **named
    )

    reduce_sum = interpreter.ReduceOps.sum

    def sum_bf16(self, x):
        if x.dtype != tl.bfloat16:
            return reduce_sum(self, x)
        total = np.sum(widen(x.handle.data), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(narrow(total), tl.bfloat16)

    interpreter.ReduceOps.sum = sum_bf16

    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor, *args, **kwargs):
        scope = patch_tensor(tensor, *args, **kwargs)
        def index(self):  # numpy ≥ 2.4 makes no int of an array of one element
            return int(self.handle.data.squeeze())

        owner = args[-1] if args else None
        set_attribute = getattr(owner, "set_attr", setattr)
        set_attribute(tensor, "__index__", index)
        return scope

    interpreter._patch_lang_tensor = patch_index
