"""`fastlm explain`: which backend runs an op here and why, how it is launched, and the floor that its work sets.

What its Triton kernels would take on a large GPU is predicted, whatever machine this is. `fastlm explain model DIR`
tells which fast paths serve a model, `fastlm explain step` what a training step on a GPU asks of its memory, and
`fastlm explain preset NAME` how it fills such a GPU.
"""

import os
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

LEGEND = """
read, written: at least, as each launch sees every byte once.  asked: with what it asks for again, mostly of a cache.
minimum: of an op its operands and results once, of a product its own, of what else stands between ops nothing."""


def explain(
    op: Annotated[str, typer.Argument(help="One of fastlm's ops, e.g. attention, or: model DIR, step, preset NAME.")],
    of: Annotated[Path | None, typer.Argument(help="The model or the preset.", metavar="[DIR|NAME]")] = None,
    shape: Annotated[str | None, typer.Option(help="Sizes in place of the usual, e.g. B=8,T=1024.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Of a step: a file for all that was counted.")] = None,
):
    """Tell of every kernel of an op: the backend chosen, why no other, the launch, bytes and FLOPs and their floor.

    Exit code 1 where the one chosen raises. Unless the device is cpu: what its Triton kernels would take, a prediction.
    Of a model in DIR: whether its modules are stepped over, and why not. Of a step: the bytes, launches, memory and
    waits of training GPT-2 on a GPU, which need not be there; of PyTorch's own with FASTLM_BACKEND=torch. Of a preset
    of `fastlm train`: the tiles and waves of each product and kernel of a step, and what it works on beside the L2
    cache.
    """
    if json is not None and op != "step":
        raise ValueError(f"--json {json} goes with `fastlm explain step`")
    if (op in ("model", "preset")) != (of is not None):
        raise ValueError("a directory goes with `fastlm explain model DIR`, a name with preset, and neither with an op")
    if of is not None:
        if shape is not None:
            raise ValueError(f"--shape {shape} goes with an op: a {op} has its own")
        return _model(of, device, dtype) if op == "model" else _preset(str(of))
    if op == "step":
        return _step(shape, dtype, json)
    from rich.console import Console

    from fastlm.benchmarks import harness
    from fastlm.benchmarks.explanation import explanation
    from fastlm.cli.bench import sizes_of
    from fastlm.cli.device import device_of, failing
    from fastlm.measure.roofs import roofs

    predicted, device = device != "cpu", device_of(device)
    cases = harness.suite([op], device=device, shape=sizes_of(shape), dtypes=[dtype])
    whole = {case.part: case for case in cases if case.shape == cases[0].shape}  # the first shape where none is given
    for case in whole.values():
        harness.plan(case, device)
    console, roof = Console(), roofs(device)
    with failing(f"{op} {dtype}"):
        for line in explanation(whole.values()):
            console.print(line, highlight=False, soft_wrap=True)
    console.print()
    for case in whole.values():
        floor = roof.floor(bytes=case.bytes, flops=case.flops, dtype=case.dtype, traffic=case.traffic)
        rate = roof.read if case.traffic == "read" else roof.copy
        limit = "bytes" if case.bytes / rate >= floor else "FLOPs"
        console.print(
            f"{case.name}: {case.bytes / 1e6:,.1f} MB at {rate / 1e9:.3g} GB/s, {case.flops / 1e9:,.2f} GFLOP at "
            f"{roof.products[dtype] / 1e9:,.0f} GFLOP/s: at least {floor * 1e6:,.1f} µs, limited by {limit}",
            highlight=False, soft_wrap=True,
        )
    if predicted:
        from fastlm.benchmarks import prediction

        console.print()
        if (reason := prediction.why_not(op)) is not None:
            return console.print(f"no prediction: {reason}", highlight=False)
        with console.status("compiling for a GPU, a second or two a kernel"), failing(f"{op} {dtype}"):
            lines = list(prediction.prediction(op, sizes_of(shape), dtype))
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True)


def _preset(name):
    from rich.console import Console

    from fastlm.benchmarks import prediction
    from fastlm.training.config import PRESETS

    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}, wanted {', '.join(PRESETS)}")
    console, gpu = Console(), prediction.device()
    with console.status("compiling for a GPU, a second or two a kernel"):
        rows = list(prediction.preset(name, gpu))
    small, large = prediction.CACHES
    typer.echo(f"Predicted: a step of {name}, {gpu.name}, {gpu.multiprocessors} multiprocessors; products in tiles of "
               f"{' × '.join(map(str, prediction.PRODUCT))};\nbytes worked on, and how many times an L2 cache of "
               f"{small / 1e6:.0f} or {large / 1e6:.0f} MB they are")
    for row in rows:
        typer.echo(f"{row['what']:30} {row['tiles']:8,} tiles {row['waves']:8.2f} waves, {row['idle']:4.0%} idle "
                   f"{row['bytes'] / 1e6:10,.1f} MB {row['bytes'] / small:7.2f} × {row['bytes'] / large:7.2f} ×")
    if (reason := prediction.why_not()) is not None:
        typer.echo(f"kernels are left out: {reason}")


def _model(directory, device, dtype):
    import torch

    from fastlm import fast_path
    from fastlm.cli.device import device_of
    from fastlm.generation.engine import cache_dtype, why_not
    from fastlm.gpt2 import GPT2
    from fastlm.measure.numerics import DTYPES

    model = GPT2.from_pretrained(directory, device=device_of(device), dtype=DTYPES[dtype])
    size, kind = sum(p.numel() for p in model.parameters()), model.quantised or dtype
    typer.echo(f"{directory}: {len(model.transformer.h)} blocks, {size / 1e6:,.1f} M numbers, {kind} on {model.device}")
    x = torch.empty(1, 1, model.config.n_embd, dtype=model.dtype, device=model.device)
    told = fast_path.why_not(model, "transformer.h") or fast_path.sizes(model)[1] or fast_path.whole_why_not(model, x)
    for what, reason in (("generation, the engine of a CPU", why_not(model)), ("forward and loss, whole blocks", told)):
        typer.echo(f"{what}: {'serves' if reason is None else f'does not: {reason}'}")
    kept = cache_dtype(model) if why_not(model) is None else model.dtype
    typer.echo(f"keys and values are kept in {str(kept).removeprefix('torch.')}")


def _step(shape, dtype, json):
    os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is decorated
    from rich.console import Console
    from rich.table import Table

    from fastlm.backends.machine import TRITON
    from fastlm.benchmarks import account
    from fastlm.cli.bench import sizes_of
    from fastlm.measure.files import write_json

    if dtype not in ("fp32", "bf16"):
        raise ValueError(f"--dtype is {dtype!r}, wanted fp32 or bf16")
    if not TRITON:
        raise ValueError("triton is not installed, whose kernels a step on a GPU runs: pip install triton")
    sizes = account.sizes_of(sizes_of(shape))
    found, console = account.step(sizes, dtype), Console()
    told = " ".join(f"{letter}={size}" for letter, size in sizes.items())
    console.print(f"[bold cyan]a training step in {dtype} {told}[/], on a GPU of compute capability 9.0 that need not "
                  "be there\n", highlight=False, soft_wrap=True)
    table = Table(show_edge=False, box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for title in ("GB", "backend", "launches", "read", "written", "asked", "minimum", "above it", "share"):
        table.add_column(title, justify="left" if title in ("GB", "backend") else "right", no_wrap=title != "GB")
    for products in False, True:
        whole = found.whole(products)
        for row in (*found.ops(products), whole):
            if row.bytes >= 5e-4 * whole.bytes:
                sums = (row.read, row.written, row.asked, row.minimum, row.above)
                table.add_row(row.op, found.backends.get(row.op, ""), f"{row.launches:,}",
                              *(f"{size / 1e9:,.2f}" for size in sums), f"{row.bytes / whole.bytes:.1%}",
                              style="bold" if row is whole else None, end_section=row is whole)
    console.print(table)
    console.print(LEGEND, highlight=False, soft_wrap=True)
    rest, waits = found.whole(False), "; ".join(f"{count} × {what}" for what, count in Counter(found.waits).items())
    console.print(
        f"{rest.bytes / 1e9:,.1f} GB beside the products: {rest.bytes / account.RATE * 1e3:,.1f} ms at "
        f"{account.RATE / 1e12:.1f} TB/s; {rest.launches + found.whole(True).launches:,} launches; at most "
        f"{found.peak / 2**30:,.2f} GiB of memory\nthe host waits {len(found.waits)} times: {waits or 'never'}",
        highlight=False, soft_wrap=True)
    if json is not None:
        write_json(json, found.record(sizes, dtype))
        console.print(f"wrote {json}", highlight=False, soft_wrap=True)
