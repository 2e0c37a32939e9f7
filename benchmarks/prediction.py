"""How long Triton's kernels would take on an H200, predicted from their machine code, and how a step fills that GPU.

    attention   cycles of a tile = tensor + max(issue, exponentials) + 100, of a block 2,000 more, blocks one by one
    the rest    the bytes at the rate of a copy, or the instructions issued, whichever takes longer

Launches are recorded at their whole sizes, on tensors without storage, and their kernels are compiled: no GPU is asked.
"""

import contextlib
import importlib
import importlib.util
import math
import os
import pkgutil
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch

from fastlm.backends import chunked
from fastlm.benchmarks import harness, machine_code
from fastlm.benchmarks.explanation import calls_of
from fastlm.dispatch.table import TABLE
from fastlm.measure.numerics import DTYPES
from fastlm.training.config import PRESETS

TILE, BLOCK = 100, 2000  # cycles
PRODUCT = 128, 256  # what a block of a matrix product owns, as cuBLAS mostly cuts them
CACHES = 50e6, 60e6  # bytes of the L2 cache of an H100 and an H200
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
         torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1"}


@dataclass(frozen=True)
class Device:
    """A GPU of Hopper's kind: cycles and bytes per second, products a cycle and multiprocessor."""

    name: str = "an H200, which is not here"
    multiprocessors: int = 132
    clock: float = 1.755e9
    copy: float = 4.3e12
    products: int = 2048
    capability: tuple = (9, 0)


def device():
    """The Device that is predicted for: this machine's where it has a Hopper, an H200 elsewhere."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return Device()
    from fastlm.measure.roofs import roofs

    found = torch.cuda.get_device_properties(0)
    return Device(found.name, found.multi_processor_count, copy=roofs("cuda").copy)


def why_not(op=None):
    """Why there are no predictions here, or none of an op; None where there are."""
    if op is not None and not any(_home(row.name) for row in TABLE.values() if row.family == op):
        return f"{op} has no Triton kernels of its own"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return "Triton is interpreted here" if os.environ.get("TRITON_INTERPRET") == "1" else None


class Launch(NamedTuple):
    kernel: object
    programs: int
    arguments: dict  # all of them, by name
    options: dict  # num_warps, …

    @property
    def name(self):
        return self.kernel.fn.__name__.strip("_").removesuffix("_kernel")

    def compiled(self, capability):
        """The kernel, specialised as Triton would for these arguments."""
        signature, constants, divisible = {}, {}, []
        for parameter in self.kernel.params:
            name, value = parameter.name, self.arguments[parameter.name]
            kind = type(value)
            special = kind is int and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or special and value == 1:
                signature[name], constants[name] = "constexpr", value
            elif kind is torch.Tensor:
                signature[name] = f"*{TYPES[value.dtype]}"
                divisible += [name] * (value.storage_offset() * value.element_size() % 16 == 0)
            else:
                signature[name] = {bool: "i1", float: "fp32"}.get(kind, "i32" if value == int(value) < 2**31 else "i64")
                divisible += [name] * (special and value % 16 == 0)
        return machine_code.compile_kernel(self.kernel, signature, constants, divisible, self.options,
                                           10 * capability[0] + capability[1])


@contextlib.contextmanager
def recorded(device):
    """The list of the Launches made within, as on a device; none of them runs."""
    import triton

    import fastlm.kernels

    found = []

    def record(kernel, *values, grid, warmup, **named):
        names = [parameter.name for parameter in kernel.params]
        given = {**dict(zip(names, values)), **{name: value for name, value in named.items() if name in names}}
        options = {name: value for name, value in named.items() if name not in names}
        found.append(Launch(kernel, math.prod(grid), given, options))

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(triton.runtime.JITFunction, "run", record))
        for module in pkgutil.iter_modules(fastlm.kernels.__path__, "fastlm.kernels."):
            module = importlib.import_module(module.name)
            for name, answer in (("_capability", device.capability), ("_multiprocessors", device.multiprocessors)):
                if hasattr(module, name):
                    patches.enter_context(mock.patch.object(module, name, lambda x, answer=answer: answer))
        yield found


def prediction(op, shape, dtype):
    """Lines on every launch of an op's Triton kernels at a shape, or at the one that decides."""
    gpu = device()
    shape = {**harness.bench_of(op).DECISIVE[0][0], **(shape or {})}
    yield (f"[bold]Predicted[/], not measured, for {gpu.name}, from the machine code of Triton's kernels: "
           f"{dtype} {' '.join(f'{letter}={size}' for letter, size in shape.items())}")
    for row in predictions(op, shape, dtype, gpu):
        rate = f"{row['bytes'] / row['us'] * 1e-3:,.0f} GB/s"
        if row["flops"]:
            rate = f"{row['flops'] / row['us'] * 1e-6:,.0f} TFLOP/s"
        yield (f"[bold cyan]{row['kernel']}[/] {row['us']:,.1f} µs, limited by {row['limit']}: {rate}; "
               f"{row['registers']} registers, {row['programs']} programs, {row['resident']} a multiprocessor: "
               f"{row['waves']:.2f} waves")
        for loop in row["loops"]:
            yield "  inner loop: " + ", ".join(f"{name} {count}" for name, count in loop.items())


def predictions(op, shape, dtype, device):
    """A row for each launch of an op at a shape; see `predict`."""
    cases = list(harness.bench_of(op).cases(shape, dtype, "meta"))
    most = max(case.bytes for case in cases)  # of a paged cache a launch sees more than it touches
    for name, args in calls_of(cases, whole=True).items():
        if _home(name):
            yield from of_call(name, args, device, most)


def _home(name):
    """Where the Triton kernels of a torch op are; None where it has none of its own."""
    home = TABLE[name].kernels.get("triton", "")
    return home if home.startswith("fastlm.kernels") else None


def of_call(name, args, device, most=math.inf):
    """A row for each launch of a call of a torch op, of at most so many bytes."""
    with recorded(device) as launches:
        getattr(importlib.import_module(_home(name)), name)(*args)
    schema = getattr(torch.ops.fastlm, name).default._schema.arguments
    written = [arg for arg, of in zip(args, schema) if of.alias_info is not None and of.alias_info.is_write]
    for launch in launches:
        yield predict(launch, written, device, most)


def predict(launch, written, device, most=math.inf):
    """The figures of a launch: registers, waves, inner loops, µs and what limits them; `written`: tensors, in place."""
    compiled = launch.compiled(device.capability)
    registers, warps = machine_code.registers_of(compiled.asm["cubin"]), compiled.metadata.num_warps
    loops = machine_code.inner_loops(machine_code.tool("nvdisasm", "-c", binary=compiled.asm["cubin"]))
    resident = machine_code.resident(registers, 32 * warps, compiled.metadata.shared, 90)
    tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
    bytes = min(sum(x.numel() * x.element_size() * (1 + any(x is other for other in written)) for x in tensors), most)
    issuing = 4 * device.multiprocessors * device.clock  # warps' instructions per second
    row = {"kernel": launch.name, "programs": launch.programs, "registers": registers, "resident": resident,
           "waves": launch.programs / device.multiprocessors / resident, "loops": loops, "bytes": bytes, "flops": 0}
    if "CAUSAL" in launch.arguments:
        masked = max(loops, key=lambda loop: loop["instructions"])
        tiles, filled = _tiles(**launch.arguments)
        plain, last = (_cycles(loop, warps, device) for loop in (loops[-1] if masked is loops[0] else loops[0], masked))
        seconds = {"cycles": launch.programs / device.multiprocessors * (plain * (tiles - 1) + last + BLOCK)
                   / device.clock}
        row["flops"] = 2 * loops[0]["products"] * warps * filled * launch.programs
    else:
        # What an earlier loop has read, a later one reads again.
        moved = sum(map(machine_code.moved, loops)) - sum(machine_code.moved(loop, ("load",)) for loop in loops[:-1])
        instructions = sum(loop["instructions"] for loop in loops) * bytes / max(32 * moved, 1)
        seconds = {"bytes": bytes / device.copy, "instructions": instructions / issuing}
    limit = max(seconds, key=seconds.get)
    return row | {"us": 1e6 * seconds[limit], "limit": limit}


def _cycles(loop, warps, device):
    """Of a tile of attention."""
    return (loop["products"] * warps / device.products + max(loop["instructions"] / 4, 2 * loop["exp"]) * warps + TILE)


def _tiles(T, S, offset, CAUSAL, BLOCK_T, BLOCK_S, EVEN=None, **_):
    """(tiles that a block of attention walks over on average, how many its scores would fill); one of keys has EVEN."""
    seen = [min(S, t + BLOCK_T + offset) if CAUSAL else S for t in range(0, T, BLOCK_T)]
    blocks = len(seen) if EVEN is None else math.ceil(S / BLOCK_S)
    scores = T * S / 2 if CAUSAL else T * S
    return sum(math.ceil(keys / BLOCK_S) for keys in seen) / blocks, scores / (BLOCK_T * BLOCK_S) / blocks


def preset(name, device):
    """A row for every matrix product of a training step of a preset, forward and backward, and every Triton kernel.

    Tiles or programs, the waves that they make, the part of these that idles, and the bytes that it works on.
    """
    settings = {"dtype": "fp32", "vocab_size": None, "tokenizer": "bpe", **PRESETS[name]}
    B, T = settings.get("micro_batch", settings["batch_size"]), settings["sequence_length"]
    C, dtype = settings["n_embd"], DTYPES[settings["dtype"]]
    V = settings["vocab_size"] or {"chars": 65, "bpe": 50257}[settings["tokenizer"]]
    N, rows = B * T, min(B * T, chunked.cuda._rows(torch.empty(0, dtype=dtype), V + -V % chunked.PAD))
    for part, n, K, M in (("qkv", N, C, 3 * C), ("attention output", N, C, C), ("MLP up", N, C, 4 * C),
                          ("MLP down", N, 4 * C, C), ("head, a chunk", rows, C, V + -V % chunked.PAD)):
        for which, (down, across) in (("", (n, M)), (", dx", (n, K)), (", dw", (M, K))):
            tiles = math.ceil(down / PRODUCT[0]) * math.ceil(across / PRODUCT[1])
            yield _filled(f"product {part}{which}", tiles, tiles / device.multiprocessors,
                          dtype.itemsize * (n * K + K * M + n * M))
    if why_not() is not None:
        return
    for op, args in _step(B, T, C, settings["n_head"], V, settings["n_layer"], rows, dtype):
        for row in of_call(op, args, device):
            yield _filled(row["kernel"], row["programs"], row["waves"], row["bytes"])


def _filled(what, tiles, waves, bytes):
    return {"what": what, "tiles": tiles, "waves": waves, "idle": 1 - waves / math.ceil(waves), "bytes": bytes}


def _step(B, T, C, H, V, L, rows, dtype):
    """(torch op, arguments) of what Triton's kernels do in a training step, without what is done a second time."""
    def of(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    N, wide, scale = B * T, torch.float32, (C // H) ** -0.5
    x, residual, vector, row = of(N, C), of(N, C, dtype=wide), of(C, dtype=wide), of(N, dtype=wide)
    qkv, o, lse = of(B, T, 3, H, C // H), of(B, T, H, C // H), of(B, H, T, dtype=wide)
    numbers = [of(12 * L * C * C + V * C + T * C, dtype=wide) for _ in range(4)]
    yield "layer_norm_fwd", (x, residual, vector, vector, vector, 1e-5, dtype)
    yield "attention_qkv_fwd", (qkv, 1, scale, 0.0, None)
    yield "bias_gelu_fwd", (of(N, 4 * C), of(4 * C, dtype=wide))
    yield "softmax_xent_", (of(rows, V + -V % chunked.PAD)[:, :V], row[:rows], of(rows, dtype=torch.int64), -100)
    yield "bias_gelu_bwd", (of(N, 4 * C), of(N, 4 * C), of(4 * C, dtype=wide))
    yield "attention_qkv_bwd", (o, qkv, o, lse, 1, scale, 0.0, None)
    yield "layer_norm_bwd", (x, residual, residual, vector, row, row, dtype, True)
    yield "grad_norm", (numbers[0],)
    yield "adamw_", (*numbers, of(dtype=wide), None, 1, 6e-4, 0.9, 0.95, 1e-8, 0.1)
