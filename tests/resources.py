"""Compiles the kernels for GPUs that are not here, and reads from the result what each will use.

    python tests/resources.py [80 90 100 120] [bf16 fp16 fp32]          a table; with --json a list of rows
    python tests/resources.py --golden                                  writes the golden files of these compilers

Every Triton kernel is compiled with every configuration its launcher can choose. Registers, spills, shared memory and
inner loops come from the cubin, by the cuobjdump and nvdisasm in Triton's own package; nvcc itself tells all but the
loops of the CUDA kernels. Runs in a process of its own, uninterpreted. The golden files
(benchmarks/results/resources-<compiler>.json, a line a kernel) hold what was read once: a change shows as a difference.
"""

import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fastlm.benchmarks import machine_code

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ARCHITECTURES = (80, 90, 100, 120)
DTYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
ODD = "i32 odd"  # of a stride that is no multiple of 16, as of rows of 50257


def softmax_xent(capability):
    from fastlm.kernels import softmax_xent as module

    fwd, bwd, both = (getattr(module, f"_softmax_xent_{name}_kernel") for name in ("fwd", "bwd", "both"))
    types = {"stride_xn": "i32", "stride_dxn": "i32", "V": "i32", "ignore": "i32", "y_ptr": "*i64",
             **dict.fromkeys(("loss_ptr", "lse_ptr", "dloss_ptr"), "*fp32")}
    odd = {**types, "stride_xn": ODD, "stride_dxn": ODD}
    sizes = 1, 37, 2048, 2049, 16384, 16385, 50257, 300000
    for kernels, config in (((fwd, bwd), module._config), ((both,), module._both_config)):
        configs = {config(V, capability) for V in sizes}
        for dtype, (block, warps), kernel in itertools.product(DTYPES, sorted(configs), kernels):
            for label, kinds in (("", types), (" odd", odd))[: 2 if (block, warps) == max(configs) else 1]:
                run = 1 if label else 4 if dtype == "fp32" else 8
                constants = {"BLOCK_V": block, **({} if kernel is bwd else {"RUN": run})}
                yield f"{block}{label}", dtype, kernel, kinds, constants, {"num_warps": warps}


def attention(capability):
    from fastlm.kernels import attention as module

    kernels = {"fwd": module._attention_fwd_kernel, "keys": module._attention_bwd_keys_kernel,
               "queries": module._attention_bwd_queries_kernel}
    statistics = {**dict.fromkeys(("lse_ptr", "lse_padded_ptr", "delta_ptr"), "*fp32"), "seed_ptr": "*i64",
                  "scale": "fp32"}
    for dtype, D, described, drop in itertools.product(DTYPES, (64, 128), (False, True), (0, 26)):
        if described and capability[0] != 10:
            continue
        for name, kernel in kernels.items():
            size = 4 if dtype == "fp32" else 2
            block_t, block_s, warps, stages = module._config(name, D, size, drop > 0, described, capability)
            constants = {"D": D, "CAUSAL": True, "DROP": drop, "DESCRIBED": described, "FOLDED": dtype != "fp32",
                         "BLOCK_T": block_t, "BLOCK_S": block_s, "BLOCK_D": D}
            constants |= {"EVEN": True} if name == "keys" else {}
            label = f"D={D} {block_t}x{block_s}{' tma' * described}{' drop' * (drop > 0)}"
            yield label, dtype, kernel, statistics, constants, {"num_warps": warps, "num_stages": stages}
    # What is rare, once: no seed, a scale that is not positive, a T that is no multiple of the tile.
    rare_ones = {"seed_ptr": None, "CAUSAL": False}, {"FOLDED": False}, {"EVEN": False}
    for rare in rare_ones if capability == (9, 0) else ():
        for name, kernel in kernels.items():
            if "EVEN" in rare and name != "keys":
                continue
            block_t, block_s, warps, stages = module._config(name, 64, 2, False, False, capability)
            constants = {"D": 64, "CAUSAL": True, "DROP": 0, "DESCRIBED": False, "FOLDED": True, "BLOCK_T": block_t,
                         "BLOCK_S": block_s, "BLOCK_D": 64, **({"EVEN": True} if name == "keys" else {}), **rare}
            label = "D=64 " + " ".join(f"{key}={value}" for key, value in rare.items())
            yield label, "bf16", kernel, statistics, constants, {"num_warps": warps, "num_stages": stages}
    for dtype, D in itertools.product(DTYPES, (64, 128)):
        constants = {"D": D, "FOLDED": dtype != "fp32", "BLOCK_T": (1024 if dtype == "fp32" else 2048) // D,
                     "BLOCK_D": D}
        yield f"D={D}", dtype, module._attention_delta_kernel, statistics, constants, {}


def decode_attention(capability):
    from fastlm.kernels import decode_attention as module

    partial = dict.fromkeys(("o_ptr", "m_ptr", "l_ptr"), "*fp32")
    types = {**partial, "table_ptr": "*i32", "lengths_ptr": "*i32", "scale": "fp32"}
    for dtype, D in itertools.product(DTYPES, (64, 128)):
        block_s, warps = module._config(D, 4 if dtype == "fp32" else 2, capability)
        constants = {"D": D, "BLOCK_T": 16, "BLOCK_S": block_s, "BLOCK_D": D}
        options = {"num_warps": warps}
        yield f"D={D}", dtype, module._decode_attention_split_kernel, types, constants, options
        constants = {"D": D, "BLOCK_D": D}
        yield f"D={D}", dtype, module._decode_attention_merge_kernel, types, constants, {"num_warps": 1}


def cache_append(capability):
    from fastlm.kernels import cache_append as module

    for dtype in DTYPES:
        types = {"table_ptr": "*i32", "positions_ptr": "*i32"}
        yield "D=64", dtype, module._cache_append_kernel, types, {"D": 64, "BLOCK": 1024}, {}


def layer_norm(capability):
    from fastlm.kernels import layer_norm as module

    types = {**dict.fromkeys(("mean_ptr", "rstd_ptr", "partial_ptr"), "*fp32"), "epsilon": "fp32"}
    wide = {**types, **dict.fromkeys(("residual_ptr", "s_ptr", "ds_ptr", "dresidual_ptr", "x_bias_ptr", "weight_ptr",
                                      "bias_ptr"), "*fp32")}  # a residual in fp32, as training in bf16 has it
    fwd, bwd = module._layer_norm_fwd_kernel, module._layer_norm_bwd_kernel
    absent = {fwd: {"s_ptr": None, "residual_ptr": None, "x_bias_ptr": None},
              bwd: {"ds_ptr": None, "dresidual_ptr": None}}
    odd = dict.fromkeys(("stride_xn", "stride_rn", "stride_dyn", "stride_dsn", "stride_sn"), ODD)
    for dtype, C, kernel, alone in itertools.product(DTYPES, (768, 1600, 4096, 769), (fwd, bwd), (False, True)):
        block, warps, ahead, _ = module._config(C, 2 if alone and dtype != "fp32" else 4, capability)
        constants = {"C": C, "BLOCK_C": block, **(absent[kernel] if alone else {})}
        constants |= {"AHEAD": ahead, "X_BIAS": not alone} if kernel is bwd else {}
        kinds = {**(types if alone else wide), **(odd if C % 2 else {})}
        options = {"num_warps": warps, **(module._registers(C, ahead) if kernel is bwd else {})}
        yield f"C={C}{' alone' * alone}{' odd' * (C % 2)}", dtype, kernel, kinds, constants, options


def bias_gelu(capability):
    from fastlm.kernels import bias_gelu as module

    types = {"bias_ptr": "*fp32", "partial_ptr": "*fp32"}
    for dtype, C in itertools.product(DTYPES, (512, 3072, 3073)):
        block_n, block_c, warps, _ = module._config(C, 4 if dtype == "fp32" else 2, capability)
        constants = {"C": C, "BLOCK_N": block_n, "BLOCK_C": block_c}
        for kernel in (module._bias_gelu_fwd_kernel, module._bias_gelu_bwd_kernel):
            kinds = {**types, **(dict.fromkeys(("stride_xn", "stride_dyn"), ODD) if C % 2 else {})}
            yield f"C={C}{' odd' * (C % 2)}", dtype, kernel, kinds, constants, {"num_warps": warps}


def column_sums(capability):
    from fastlm.kernels import column_sums as module

    block_p, block_c, warps = module._config(1056, capability)
    types, constants = {"partial_ptr": "*fp32"}, {"C": 768, "BLOCK_P": block_p, "BLOCK_C": block_c}
    for dtype in DTYPES:
        for label, others in (("three", {"WIDTH": 2304}), ("two", {"WIDTH": 1536, "third_ptr": None}),
                              ("one", {"WIDTH": 768, "second_ptr": None, "third_ptr": None})):
            yield label, dtype, module._column_sums_kernel, types, {**constants, **others}, {"num_warps": warps}


def adamw(capability):
    from fastlm.kernels import adamw as module

    block, warps = module._config(124439808, capability)
    floats = ("keep", "rate", "root", "one_minus_beta1", "beta2", "one_minus_beta2", "epsilon",
              "weight_decay")
    for label, without in (("rates", {}), ("scaled", {"rates_ptr": None}),
                           ("unscaled", {"scale_ptr": None, "rates_ptr": None})):
        types = dict.fromkeys(floats, "fp32")
        yield label, "fp32", module._adamw_kernel, types, {"BLOCK": block, **without}, {"num_warps": warps}


def grad_norm(capability):
    from fastlm.kernels import grad_norm as module

    block, warps, _ = module._config(124439808, capability)
    yield str(block), "fp32", module._grad_norm_partial_kernel, {}, {"BLOCK": block}, {"num_warps": warps}
    constants = {"BLOCK": module.MOST_PROGRAMS}
    yield str(module.MOST_PROGRAMS), "fp32", module._grad_norm_merge_kernel, {}, constants, {"num_warps": 4}


def variants(capability):
    """(label, dtype, kernel, argument types, constants, options) of every kernel × dtype × configuration.

    Pointers that are not typed have the dtype, numbers that are not typed are i32.
    """
    for path in sorted((ROOT / "kernels").glob("[a-z]*.py")):
        if path.stem != "dropout":  # a part of attention's
            yield from globals()[path.stem](capability)  # each file has its function above


# What bounds each kernel at GPT-2's shapes (D = 64, T = 1024, causal), by the bytes it must move and what it computes.
# An H200 copies 4.3 TB/s, multiplies 780 TFLOP/s in bf16 and takes 16 exponentials a clock and multiprocessor.
LIMITS = {
    "softmax_xent_fwd": "bandwidth: 2 N V bytes read; N = 32k, V = 50257: 3.3 GB, 0.77 ms",
    "softmax_xent_bwd": "bandwidth: 4 N V bytes read and written; N = 32k, V = 50257: 6.6 GB, 1.5 ms",
    "softmax_xent_both": "bandwidth: 4 N V bytes read and written, and read again in the caches; as softmax_xent_bwd",
    "attention_fwd": "tensor cores and exponentials alike: 2 T T D FLOPs and T T / 2 exponentials a head; "
                     "B H = 768: 0.13 and 0.11 ms",
    "attention_delta": "bandwidth: 4 T D bytes a head; B H = 768: 0.2 GB, 0.05 ms",
    "attention_bwd_keys": "tensor cores: 4 T T D FLOPs a head; B H = 768: 0.26 ms",
    "attention_bwd_queries": "tensor cores: 3 T T D FLOPs a head; B H = 768: 0.20 ms",
    "decode_attention_split": "bandwidth: 4 S D bytes a head; B H = 768, S = 1024: 0.2 GB, 0.05 ms",
    "decode_attention_merge": "launch: 4 (D + 2) S / 128 bytes a head, 3 % of the split's",
    "cache_append": "launch: 8 D bytes a head and token",
    "layer_norm_fwd": "bandwidth: 12 C bytes a row in bf16 with a residual in fp32; N = 32k, C = 768: 0.3 GB, 0.07 ms",
    "layer_norm_bwd": "bandwidth: 16 C bytes a row, likewise; N = 32k, C = 768: 0.4 GB, 0.09 ms",
    "bias_gelu_fwd": "bandwidth: 4 C bytes a row; N = 32k, C = 3072: 0.4 GB, 0.09 ms",
    "bias_gelu_bwd": "bandwidth: 6 C bytes a row, 25 instructions an element; N = 32k, C = 3072: 0.14 and 0.1 ms",
    "column_sums": "launch: 4 C bytes a program of those before it, 7 MB, from the L2 cache",
    "adamw": "bandwidth: 28 bytes an element; 124 M: 3.5 GB, 0.8 ms",
    "grad_norm_partial": "bandwidth: 4 bytes an element; 124 M: 0.5 GB, 0.12 ms",
    "grad_norm_merge": "launch: 4 KB",
}


def compile_variant(dtype, kernel, types, constants, options, capability):
    """The compiled kernel, pointers and strides multiples of 16 as a launch finds them, but for those that are ODD."""
    def kind(name):
        if name in constants:
            return "constexpr"
        return types.get(name, DTYPES[dtype] if name.endswith("_ptr") else "i32")

    kinds = {name: kind(name) for name in kernel.arg_names}
    signature = {name: kind.removesuffix(" odd") for name, kind in kinds.items()}
    divisible = [name for name, kind in kinds.items() if kind[0] == "*" or name.startswith("stride") and kind != ODD]
    return machine_code.compile_kernel(kernel, signature, constants, divisible, options, capability)


def read_resources(compiled, capability):
    """What a compiled kernel uses, whether its addresses are 64 bits wide, and its inner loops."""
    machine = machine_code.tool("nvdisasm", "-c", binary=compiled.asm["cubin"])
    registers = machine_code.registers_of(compiled.asm["cubin"])
    threads, shared = compiled.metadata.num_warps * 32, compiled.metadata.shared
    blocks = machine_code.resident(registers, threads, shared, capability)
    return {
        "registers": registers,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", machine)),
        "shared": shared,
        "threads": threads,
        "occupancy": round(blocks * threads / machine_code.THREADS[capability], 2),
        "wgmma": len(re.findall(r"\bHGMMA", machine)),
        "wgmma_waits": len(re.findall(r"\bWARPGROUP\.DEPBAR", machine)),
        "tma": len(re.findall(r"\bUTMALDG", machine)),
        "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.E\S*\.128", machine)),
        "wide_stores": len(re.findall(r"\bSTG\.E\S*\.128", machine)),
        "narrow_rows": narrow_rows(compiled.asm["ttir"]),
        "loops": machine_code.inner_loops(machine),
    }


def narrow_rows(ttir):
    """Products in 32 bits that a pointer's offset is made of: row · stride overflows beyond 2^31 elements.

    A product with a constant is the row where a tile begins, no offset yet.
    """
    defined = dict(re.findall(r"^\s*(%\S+) = (.*)$", ttir, re.MULTILINE))
    found = set()

    def walk(name, seen):
        text = defined.get(name, "")
        if name in seen or not text:
            return
        seen.add(name)
        operands = re.findall(r"%[\w#]+", text)
        constant = any(operand.startswith("%c") for operand in operands)
        if "arith.muli" in text and re.search(r": (?:tensor<\S*x)?i32\b", text) and not constant:
            found.add(name)
        for operand in operands:
            walk(operand, seen)

    for text in defined.values():
        if text.startswith("tt.addptr"):
            walk(re.findall(r"%[\w#]+", text)[1], set())
    return len(found)


def _row(variant):
    sm, number = variant
    label, dtype, kernel, types, constants, options = list(variants((sm // 10, sm % 10)))[number]
    compiled = compile_variant(dtype, kernel, types, constants, options, sm)
    name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
    return {"kernel": f"{name} {label}", "dtype": dtype, "sm": sm, **read_resources(compiled, sm)}


def report(architectures=ARCHITECTURES, dtypes=tuple(DTYPES)):
    """A row for every kernel × dtype × configuration × architecture."""
    wanted = [
        (sm, number) for sm in architectures
        for number, (_, dtype, *_) in enumerate(variants((sm // 10, sm % 10))) if dtype in dtypes
    ]
    with multiprocessing.get_context("spawn").Pool() as pool:
        yield from pool.imap(_row, wanted, chunksize=4)


def report_elsewhere(architectures, dtypes=tuple(DTYPES)):
    """The report from a fresh process, for a caller in which Triton is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, "--json", *map(str, architectures), *dtypes],
        capture_output=True, text=True, env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def nvcc_rows(sm):
    """A row for every CUDA kernel on an architecture (80, 90, …), as nvcc compiles it for the package."""
    name = f"{sm}a" if sm == 90 else str(sm)
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                ["nvcc", "-std=c++20", "-O3", "-gencode", f"arch=compute_{name},code=sm_{name}", "-Xptxas", "-v",
                 f"-I{ROOT / 'csrc'}", "-cubin", str(path), "-o", f"{folder}/kernel.cubin"],
                capture_output=True, text=True, timeout=300,
            )
            assert done.returncode == 0, done.stderr
            machine = machine_code.tool("nvdisasm", "-c", binary=Path(folder, "kernel.cubin").read_bytes())
        machine = machine_code.functions(machine)
        mangled = re.findall(r"Compiling entry function '(\w+)'", done.stderr)
        told = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True).stdout
        for name_of, part in zip(mangled, told.split("Compiling entry function '")[1:], strict=True):
            kernel = part.split("'")[0].replace("fastlm::", "").replace("(anonymous namespace)::", "")
            kernel = re.sub(r"^void cuda::_?|\([^()]*\)$", "", kernel)

            def number(pattern, part=part):
                return sum(int(found) for found in re.findall(pattern, part))

            yield {
                "kernel": f"{path.stem}.cu {kernel}", "sm": sm, "registers": number(r"Used (\d+) registers"),
                "spills": number(r"(\d+) bytes spill"), "shared": number(r"(\d+) bytes smem"),
                "stack": number(r"(\d+) bytes stack frame"), "loops": machine_code.inner_loops(machine[name_of]),
            }


def nvcc_version():
    """"nvcc-13.0", or None where there is none."""
    if shutil.which("nvcc") is None:
        return None
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return f"nvcc-{re.search(r'release ([0-9.]+)', told).group(1)}"


def triton_version():
    """"triton-3.7.1"."""
    import triton

    return f"triton-{triton.__version__}"


def golden(compiler):
    """The golden rows of a compiler, or None where nothing was kept for that version."""
    path = RESULTS / f"resources-{compiler}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else None


def differences(rows, kept):
    """What rows have that differs from the golden ones of the same kernel, dtype and sm: a sentence for each."""
    def key(row):
        return row["kernel"], row.get("dtype"), row["sm"]

    kept = {key(row): row for row in kept}
    for row in rows:
        old = kept.get(key(row))
        if old is None:
            yield f"{' '.join(map(str, key(row)))}: not in the golden file"
            continue
        old, row = flat(old), flat(row)
        changed = {name: (old.get(name), row.get(name)) for name in {**old, **row} if old.get(name) != row.get(name)}
        if changed:
            told = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in changed.items())
            yield f"{' '.join(map(str, key(row)))}: {told}"


def flat(row):
    """A row with a figure for each of its loops' figures."""
    loops = enumerate(row.get("loops", ()), 1)
    return {**row, "loops": None, **{f"loop {n} {name}": value for n, loop in loops for name, value in loop.items()}}


def write_golden(compiler, rows):
    """Keeps rows as the golden ones of a compiler, a line a row."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"resources-{compiler}.json").write_text(f'{{"compiler": "{compiler}", "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    asked = [int(argument) for argument in sys.argv[1:] if argument.isdigit()] or ARCHITECTURES
    if "--golden" in sys.argv and nvcc_version():
        write_golden(nvcc_version(), [row for sm in ARCHITECTURES for row in nvcc_rows(sm)])
    rows = list(report(asked, [argument for argument in sys.argv[1:] if argument in DTYPES] or tuple(DTYPES)))
    if "--golden" in sys.argv:
        write_golden(triton_version(), rows)
    elif "--json" in sys.argv:
        print(json.dumps(rows))
    else:
        width = max(len(row["kernel"]) for row in rows)
        for row in [dict(zip(rows[0], rows[0])) | {"loops": ()}, *rows]:
            print(f"{row['kernel']:{width}}", *(f"{value:>11}" for value in list(row.values())[1:-1]))
            for loop in row["loops"]:
                print("    inner loop:", ", ".join(f"{name} {count}" for name, count in loop.items()))
        for kernel, limit in LIMITS.items():
            print(f"{kernel}: {limit}")
