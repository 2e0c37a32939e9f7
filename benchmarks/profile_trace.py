"""What a trace of torch's profiler tells: rows by op and shape, and by part of the model.

    seconds    on a GPU of the kernels that an op launched; on a CPU the op's own, without the ops it calls
    work       FLOPs, and the least bytes (inputs and outputs once), of its input shapes; None where unknown
    part       the innermost named range; in the backward pass that of the op with the same sequence number
"""

import gzip
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field

PHASES = ("prefill", "decode", "backward", "optimizer")
NAMES = ("embedding", "ln_f", "lm_head", "loss", "draw", "step", *PHASES)
RANGE = re.compile(r"h\.\d+(\.(ln_1|attn|ln_2|mlp))?|" + "|".join(NAMES))
PARTS = {"ln_1": "ln", "ln_2": "ln", "ln_f": "ln", "lm_head": "head", "attn": "attn", "mlp": "mlp",
         "embedding": "embedding", "loss": "loss", "draw": "draw", "optimizer": "optimizer"}
ENGINE = "autograd::engine::evaluate_function"
SIZES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "long": 8, "int": 4,
         "bool": 1, "unsigned char": 1, "signed char": 1}
DTYPES = {"c10::BFloat16": "bf16", "c10::Half": "fp16"}
GPU = ("kernel", "gpu_memcpy", "gpu_memset")
PYTHON = "Python, between the ops"

READING = {"sum", "mean", "max", "argmax", "amax", "aminmax", "linalg_vector_norm"}  # the results are small
IN_PLACE = {"add_", "mul_", "sub_", "div_", "clamp_"}
POINTWISE = {"add", "mul", "sub", "div", "gelu", "gelu_backward", "where", "clamp", "native_layer_norm",
             "native_layer_norm_backward", "native_dropout", "native_dropout_backward"}
PARAMETERS = {"_fused_adamw_": (4, 3), "_foreach_mul_": (1, 1), "_foreach_norm": (1, 0)}  # read, written


@dataclass
class Event:
    """An op or a range on a thread of the CPU, and the kernels that it launched."""

    name: str
    start: float  # µs
    end: float
    args: dict
    parent: "Event | None"
    ranged: bool  # a named range, not an op
    inside: float = 0.0  # µs of what it calls
    kernels: list = field(default_factory=list)  # (name, µs)

    def above(self):
        """Itself, and what it lies within, from the inside out."""
        event = self
        while event is not None:
            yield event
            event = event.parent


@dataclass
class Row:
    """An op at one shape, or all that is small; calls, seconds and work of one step."""

    name: str
    calls: float = 0.0
    seconds: float = 0.0
    share: float = 0.0
    flops: float = 0.0
    read: float = 0.0  # bytes
    written: float = 0.0
    dtype: str = "fp32"
    kernels: Counter = field(default_factory=Counter)  # name → µs, on a GPU

    def figures(self, roofs):
        """(TFLOP/s, GB/s, the share of the roof), None for what is unknown."""
        moved = self.read + self.written
        if not self.seconds or not moved + self.flops:
            return None, None, None
        traffic = "read" if self.written < self.read / 8 else "copy"
        floor = roofs.floor(bytes=moved, flops=self.flops, dtype=self.dtype, traffic=traffic)
        rates = self.flops / self.seconds * 1e-12, moved / self.seconds * 1e-9
        return *(rate or None for rate in rates), floor / self.seconds


def load(path):
    """The trace in a .json or .json.gz file."""
    with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def tables(trace, steps, *, context=0, parameters=0, least=0.005):
    """(rows by op, {part: {phase: seconds}}), of one of `steps` steps; rows below a share of `least` are one.

    No shape tells context, the keys that a decode step reads of a sequence on average, and
    parameters, the number of those, in fp32.
    """
    events, on_gpu = _events(trace)
    rows, parts, forward = {}, {}, {}
    usual = "setup" if any(event.name == "prefill" for event in events) else "forward"
    for event in events:  # in the order of time: the last op with a number made the node
        if "Sequence number" in event.args and _node(event) is None:
            forward[event.args["Sequence number"]] = event
    for event in events:
        own = sum(us for _, us in event.kernels) if on_gpu else event.end - event.start - event.inside
        if not own:
            continue
        name = PYTHON if event.ranged else _label(event)
        row = rows.setdefault(name, Row(name, dtype=_dtype(event)))
        row.calls += not event.ranged
        row.seconds += own
        row.kernels.update(dict(event.kernels))
        if on_gpu or own >= 0.5 * (event.end - event.start):  # else the work is that of an op which it calls
            flops, read, written = work(event.name, event.args, context, parameters)
            row.flops, row.read, row.written = row.flops + flops, row.read + read, row.written + written
        part, phase = _place(event, forward, usual)
        parts.setdefault(part, Counter())[phase] += own * 1e-6 / steps
    total = sum(row.seconds for row in rows.values()) or 1.0
    for row in rows.values():
        row.share = row.seconds / total
        row.seconds *= 1e-6 / steps
        row.calls, row.flops, row.read, row.written = (
            value / steps for value in (row.calls, row.flops, row.read, row.written))
    large = sorted((row for row in rows.values() if row.share >= least), key=lambda row: -row.share)
    small = [row for row in rows.values() if row.share < least]
    if small:
        large.append(Row(f"other, {len(small)} kinds", sum(row.calls for row in small),
                         sum(row.seconds for row in small), sum(row.share for row in small)))
    return large, dict(sorted(parts.items(), key=lambda item: -item[1].total()))


def _events(trace):
    """(the Events within the steps, whether a GPU worked)."""
    whole = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    kernels = [e for e in whole if e.get("cat") in GPU]
    events, by_id, stacks = [], {}, {}
    for e in sorted(whole, key=lambda e: (e["ts"], -e["dur"])):
        ranged = e.get("cat") == "user_annotation"
        if not (e.get("cat") == "cpu_op" or ranged and RANGE.fullmatch(e["name"])):
            continue
        stack = stacks.setdefault(e["tid"], [])
        while stack and stack[-1].end <= e["ts"] + 1e-3:
            stack.pop()
        parent = stack[-1] if stack else None
        event = Event(e["name"], e["ts"], e["ts"] + e["dur"], e.get("args", {}), parent, ranged)
        if parent is not None:
            parent.inside += e["dur"]
        stack.append(event)
        events.append(event)
        by_id[event.args.get("External id")] = event
    lost = Event("no op", 0.0, 0.0, {}, None, False)
    for e in kernels:
        by_id.get(e.get("args", {}).get("External id"), lost).kernels.append((e["name"], e["dur"]))
    if kernels:
        return [*events, lost], True
    return [one for one in events if any(at.ranged and at.name == "step" for at in one.above())], False


def _node(event):
    """The autograd node that runs an event, or None."""
    return next((one for one in event.above() if one.name.startswith(ENGINE)), None)


def _place(event, forward, usual):
    """(part, phase) of an event; `usual` is the phase outside of the named ones."""
    if (node := _node(event)) is not None:
        made = forward.get(node.args.get("Sequence number"))
        return ("gradients" if made is None else _part(made)), "backward"  # AccumulateGrad has no forward op
    names = [one.name for one in event.above() if one.ranged]
    return _part(event), next((name for name in names if name in PHASES), usual)


def _part(event):
    name = next((one.name for one in event.above() if one.ranged), "step")
    if re.fullmatch(r"h\.\d+", name):
        return "residual"
    return PARTS.get(name.rpartition(".")[2], "other")


# ---- an op's work


def _tensors(args):
    """(dims, bytes an element) of every input that is one tensor, in order."""
    return [(dims, SIZES[kind]) for dims, kind in zip(args.get("Input Dims", ()), args.get("Input type", ()))
            if kind in SIZES]


def _dtype(event):
    kinds = event.args.get("Input type", ())
    return next((DTYPES[kind] for kind in kinds if kind in DTYPES), "fp32")


def _label(event):
    """Name and shape: of a product both matrices, of another op its largest input."""
    name, tensors = event.name.removeprefix("aten::"), [dims for dims, _ in _tensors(event.args)]
    if name.startswith(ENGINE) or not any(tensors):
        return name
    shown = _factors(name, tensors) if name in PRODUCTS else [max(tensors, key=math.prod)]
    kind = "" if _dtype(event) == "fp32" else f" {_dtype(event)}"
    return f"{name} {' · '.join('×'.join(map(str, dims)) for dims in shown)}{kind}"


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv")


def _factors(name, tensors):
    """The two that a product multiplies; what is added comes before them, an `out` may follow."""
    first = int(name.startswith(("add", "badd")))
    return tensors[first : first + 2]


def work(name, args, context=0, parameters=0):
    """(FLOPs, bytes read, bytes written) that an op on such inputs needs at least; zeros where unknown."""
    name, tensors = name.removeprefix("aten::"), _tensors(args)
    if name in PARAMETERS:  # takes lists of them, whose shapes a trace leaves out
        reads, writes = PARAMETERS[name]
        return 0, reads * 4 * parameters, writes * 4 * parameters
    if not tensors:
        return 0, 0, 0
    counts = [math.prod(dims) for dims, _ in tensors]
    sizes = [count * size for count, (_, size) in zip(counts, tensors)]
    (dims, size), everything, largest = tensors[0], sum(sizes), max(sizes)
    if name in PRODUCTS:
        (a, size), (b, _) = _factors(name, tensors)
        N = b[-1] if name.endswith("mm") else 1
        return 2 * math.prod(a) * N, everything, math.prod(a[:-1]) * N * size
    if name in READING:
        return 0, everything, 0
    if name in IN_PLACE:
        return 0, everything, sizes[0]
    if name in POINTWISE:
        return 0, everything, largest
    if name == "copy_":
        return 0, sum(sizes[1:]), sizes[0]
    if name == "fill_":
        return 0, 0, sizes[0]
    if name == "index_select":
        rows = counts[-1] * math.prod(dims[1:]) * size
        return 0, rows + sizes[-1], rows
    if name == "embedding_dense_backward":
        return 0, everything, int(args["Concrete Inputs"][2]) * dims[-1] * size
    return _ours(name.removeprefix("fastlm::"), tensors, sizes, context)


def _ours(name, tensors, sizes, context):
    """The same of fastlm's ops; causal attention, of whose scores half are needed."""
    dims, size = tensors[0]
    if name == "softmax_xent_fwd":
        return 0, sum(sizes), 8 * dims[0]
    if name == "softmax_xent_bwd":
        return 0, sum(sizes), sizes[1]
    if name in ("attention_qkv_fwd", "attention_qkv_bwd"):
        B, T, H, D = dims[0], dims[1], dims[-2], dims[-1]
        forward = name.endswith("fwd")
        return (2 if forward else 5) * B * H * T * T * D, sum(sizes), sizes[0] // 3 if forward else sizes[1]
    if name == "decode_attention":
        B, T, H, D = dims
        return 4 * B * T * H * context * D, 2 * B * context * H * D * size + sizes[0], sizes[0]
    if name == "cache_append_":
        return 0, sizes[2] + sizes[3], sizes[2] + sizes[3]
    if name in ("bias_gelu_fwd", "bias_gelu_bwd"):
        return 0, sum(sizes), sizes[0]
    if name == "layer_norm_fwd":  # a residual is of x's shape: the sum is written too
        return 0, sum(sizes), sizes[0] + (sizes[1] if tensors[1][0] == dims else 0)
    if name == "layer_norm_bwd":
        return 0, sum(sizes), sizes[0]
    if name == "adamw_":
        return 0, sum(sizes), 3 * sizes[0]
    if name == "grad_norm":
        return 0, sizes[0], 0
    return 0, 0, 0
