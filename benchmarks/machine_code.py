"""What a compiler makes of a kernel for a GPU that may not be here: the cubin, its instructions, its inner loops.

    loop     the instructions between a backward branch and where it leads
    inner    it multiplies on the tensor cores, or, where none does, moves memory, and no such loop lies within
    main     more than half as often, or as many bytes, as the heaviest one

A kernel without a loop is its own. Instructions are counted by the pipe that runs them, memory's by bytes.
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

PIPES = {  # what runs an instruction → how its name begins
    "tensor": r"HGMMA|HMMA|IMMA|QGMMA|UTC\w*MMA",
    "exp": "MUFU",
    "fp32": r"(FFMA|FADD|FMUL)2?\b",
    "half": r"H(FMA|ADD|MUL|MNMX|SET|SETP)\d?\b",
    "convert": r"F2FP|F2F|I2F|F2I",
    "load": r"LDG\b", "store": r"STG\b", "copy": "LDGSTS", "bulk": r"UTMA(LDG|STG)|UBLKCP",
    "shared": r"LDS|STS|ATOMS",
    "shuffle": "SHFL|REDUX",
    "barrier": r"BAR\b|SYNCS|WARPSYNC",
    "spill": r"STL|LDL",
    "branch": r"BRA|BSSY|BSYNC|CALL|RET|EXIT",
}
WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
MOVING = "load", "store", "copy"
SHARED = {80: 163, 90: 227, 100: 227, 120: 99}  # KiB that a block may use
REGISTERS, THREADS, BLOCKS = 65536, {80: 2048, 90: 2048, 100: 2048, 120: 1536}, 32  # that a multiprocessor has


class Instruction(NamedTuple):
    name: str  # "LDG.E.128"
    operands: list[str]

    @property
    def pipe(self):
        """What runs it; "alu" for integers, comparisons and moves."""
        return next((pipe for pipe, names in PIPES.items() if re.match(names, self.name)), "alu")

    @property
    def bytes(self):
        """What a thread moves."""
        return next((WIDTHS[part] for part in self.name.split(".") if part in WIDTHS), 4)

    @property
    def products(self):
        """Multiplications that a warp's share of a tensor instruction makes, where its name tells."""
        if shape := re.match(r"HGMMA\.64x(\d+)x(\d+)\.", self.name):
            return 16 * int(shape.group(1)) * int(shape.group(2))
        return {"HMMA.16816": 2048, "HMMA.1688": 1024}.get(".".join(self.name.split(".")[:2]), 0)

    def registers(self):
        """(written, read)."""
        at = 1 if self.operands and re.match(r"U?P(\d|T)$", self.operands[0]) else 0
        stored = self.pipe in ("store", "shared", "spill", "branch") and not self.name.startswith(("LDS", "LDL"))
        wide = max(self.bytes // 4, 1) if self.pipe in ("load", "store") else 1
        found = [[int(number) + more for number in re.findall(r"\bR(\d+)\b", operand)
                  for more in range(1 if "[" in operand else wide)] for operand in self.operands]
        written = set() if stored or len(found) <= at else set(found[at])
        read = {number for place, numbers in enumerate(found) if stored or place != at for number in numbers}
        return written, read


def compile_kernel(kernel, signature, constants, divisible, options, capability):
    """A Triton kernel for a GPU of a capability (90, …): names → types, values; names of multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    at = {name: (position,) for position, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={at[name]: value for name, value in constants.items()},
        attrs={at[name]: [["tt.divisibility", 16]] for name in divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def tool(name, *arguments, binary):
    """What a tool of Triton's package (cuobjdump, nvdisasm) says of a cubin."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([path, *arguments, file.name], capture_output=True, text=True, check=True).stdout


def registers_of(binary):
    """Registers of a thread, in a cubin of one kernel."""
    return int(re.search(r"REG:(\d+)", tool("cuobjdump", "-res-usage", binary=binary)).group(1))


def resident(registers, threads, shared, sm):
    """The blocks that a multiprocessor holds at once."""
    blocks = min(REGISTERS // (max(registers, 1) * threads), THREADS[sm] // threads, BLOCKS)
    return min(blocks, SHARED[sm] * 1024 // shared) if shared else blocks


def functions(machine):
    """{mangled name: its lines} of all kernels that nvdisasm -c tells of."""
    parts = re.split(r"^\.text\.(\S+):$", machine, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def inner_loops(machine):
    """The main inner loops of one kernel's machine code, in their order: Counters of instructions by pipe.

    Of these, "products" are what the tensor instructions multiply, a warp; "in_flight" are the most loads that a thread
    issues before the first instruction that waits for one of them, from one round into the next, or the asynchronous
    copies that are still under way where it waits for the oldest.
    """
    code, labels = [], {}
    for line in machine.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label.group(1)] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            name, operands = found.groups()
            code.append(Instruction(name, [part.strip() for part in operands.split(",")]))
    end = next((at + 1 for at in range(len(code) - 1, -1, -1) if code[at].name == "EXIT"), len(code))
    ranges = []
    for at, instruction in enumerate(code):
        target = re.search(r"\.L_\w+", " ".join(instruction.operands)) if instruction.pipe == "branch" else None
        if target and labels.get(target.group(), at) < at:
            ranges.append((labels[target.group()], at + 1))
    loops = {limits: _count(code[slice(*limits)]) for limits in dict.fromkeys(ranges)}
    weights = {limits: loop["tensor"] for limits, loop in loops.items() if loop["tensor"]}
    weights = weights or {limits: weight for limits, loop in loops.items() if (weight := _traffic(loop))}
    inner = {limits: weight for limits, weight in weights.items()
             if not any(limits[0] <= low and high <= limits[1] for low, high in weights if (low, high) != limits)}
    most = max(inner.values(), default=0)
    return [loops[limits] for limits in sorted(inner) if 2 * inner[limits] > most] or [_count(code[:end])]


def _traffic(loop):
    """The bytes that a thread loads or stores, whichever is more; 0 of a loop that fills memory with what it has."""
    if not any(key.startswith(("load", "copy", "bulk", "shared")) for key in loop):
        return 0
    return max(moved(loop, ("load", "copy")) + 16 * loop["bulk"], moved(loop, ("store",)))


def moved(loop, how=MOVING):
    """Bytes that a thread loads, stores or copies in a round of a loop."""
    return sum(int(re.sub(r"\D", "", key)) * count for key, count in loop.items() if key.startswith(how))


def _count(code):
    loop = Counter(instructions=len(code))
    for instruction in code:
        pipe = instruction.pipe
        loop[f"{pipe}{instruction.bytes}" if pipe in MOVING else pipe] += 1
    if products := sum(instruction.products for instruction in code):
        loop["products"] = products
    if in_flight := max(_loads_in_flight(code), _copies_in_flight(code)):
        loop["in_flight"] = in_flight
    return loop


def _loads_in_flight(code):
    most, loads = 0, [at for at, instruction in enumerate(code) if instruction.pipe == "load"]
    for begin in loads:
        pending, issued = set(), 0
        for instruction in code[begin:] + code[:begin]:
            written, read = instruction.registers()
            if pending & read:
                break
            if instruction.pipe == "load":
                pending, issued = pending | written, issued + 1
        most = max(most, issued)
    return most


def _copies_in_flight(code):
    copies = sum(instruction.pipe == "copy" for instruction in code)
    groups = sum(instruction.name == "LDGDEPBAR" for instruction in code)
    left = [int(instruction.operands[1], 16) for instruction in code
            if instruction.name == "DEPBAR.LE" and len(instruction.operands) == 2]
    return min(left) * copies // groups if left and groups else 0
