"""`fastlm profile`: where the time of a training step or of a generation goes, op by op and part by part."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer


def profile(
    program: Annotated[str, typer.Argument(help="train or generate.")],
    model: Annotated[Path | None, typer.Option(help="A model directory; a random GPT-2 124M else.")] = None,
    shape: Annotated[str | None, typer.Option(help="Sizes in place of the usual, e.g. B=4,T=256.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    steps: Annotated[int, typer.Option(help="Steps, or whole generations, that are profiled.")] = 3,
    out: Annotated[Path, typer.Option(help="The trace, .json or .json.gz.")] = Path("profile.json"),
    ranges_only: Annotated[bool, typer.Option("--ranges-only", help="NVTX alone, for ncu, nsys.")] = False,
):
    """Profile some steps: every op's time and share of the roof, every part's share, a trace for Perfetto.

    Exit code 1 where a kernel of ours raises.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch: it would tell of its starts
    from rich.console import Console

    from fastlm.benchmarks import profile_run
    from fastlm.benchmarks.profile_trace import tables
    from fastlm.cli.bench import sizes_of
    from fastlm.cli.device import device_of, failing
    from fastlm.measure.roofs import device_name, roofs

    device = device_of(device)
    plan = profile_run.plan(program, model=model, shape=sizes_of(shape), dtype=dtype, device=device,
                            steps=steps, out=None if ranges_only else out)
    console = Console()
    sizes = " ".join(f"{letter}={size}" for letter, size in plan.shape.items())
    console.print(f"[bold cyan]{program} {dtype} {sizes}[/], {device_name(device)}", highlight=False)
    if device == "cpu" and (load := os.getloadavg()[0]) > 0.5 * os.cpu_count():
        console.print(f"[yellow]the machine is busy (load {load:.1f}): expect noise[/]")
    roof = None if ranges_only else roofs(device)
    loaded = profile_run.model_of(plan)
    with failing(f"{program} {dtype} {sizes}"), console.status(f"a step to warm up, then {steps}"):
        found = profile_run.run(plan, loaded)
    if ranges_only:
        told = "with NVTX ranges" if device == "cuda" else "NVTX ranges need a CUDA GPU, so there were none"
        console.print(f"{found.seconds * 1e3:,.1f} ms a step, {found.tokens_per_s:,.0f} tokens/s; {told}",
                      highlight=False, soft_wrap=True)
        return
    context = plan.shape["T"] + plan.shape.get("N", 0) / 2
    rows, parts = tables(found.trace, steps, context=context, parameters=found.parameters)
    busy = sum(row.seconds for row in rows)
    on_gpu = any(row.kernels for row in rows)
    _show_rows(console, rows, roof, on_gpu)
    _show_parts(console, parts, busy)
    console.print(LEGEND.format(whose="its kernels on the GPU" if on_gpu else "without the ops it calls"),
                  style="dim", highlight=False, soft_wrap=True)
    if device == "cuda" and not on_gpu:
        console.print("[yellow]torch's profiler saw no kernel on the GPU, so these are the CPU's times; "
                      "KINETO_LOG_LEVEL=0 tells why[/]", highlight=False, soft_wrap=True)
    elif on_gpu:
        graph = "; decoding ran without its CUDA graph" if program == "generate" else ""
        console.print(f"the GPU is busy for {busy / found.seconds:.0%} of a step{graph}", highlight=False)
    elif program == "generate":
        console.print("on a CPU generation is one native call a step without parts: these are the model's own ops",
                      highlight=False, soft_wrap=True)
    console.print(
        f"{found.seconds * 1e3:,.1f} ms a step, {found.tokens_per_s:,.0f} tokens/s, the profiler's overhead "
        f"within; without it: fastlm bench {program}\nwrote {out}; open it at https://ui.perfetto.dev "
        "(it stays on your machine), or in chrome://tracing", highlight=False, soft_wrap=True)
    told = "one kernel at a time" if device == "cuda" else "it needs a CUDA GPU, which this machine lacks"
    console.print(f"\nNsight Compute, {told}:\n  {_ncu(plan)}", highlight=False, soft_wrap=True, markup=False)


def _ncu(plan):
    """A command line for the kernels of one part."""
    options = ["--shape", ",".join(f"{letter}={size}" for letter, size in plan.shape.items()
                                   if plan.model is None or letter in "BTN")]
    if plan.model is not None:
        options += ["--model", str(plan.model)]
    ncu = ["ncu", "--set", "full", "--nvtx", "--nvtx-include", "h.0.attn/", "--target-processes", "all"]
    options += ["--dtype", plan.dtype, "--device", "cuda", "--steps", "1", "--ranges-only"]
    return shlex.join([*ncu, "-o", "report", "fastlm", "profile", plan.program, *options])


def _show_rows(console, rows, roof, on_gpu):
    from rich.text import Text

    table = _table("op", "calls", "ms", "share", "TFLOP/s" if on_gpu else "GFLOP/s", "GB/s", "roof",
                   *(["kernel"] if on_gpu else []))
    for row in rows:
        flops, bytes, of_roof = row.figures(roof)
        cells = [f"{row.calls:,.1f}".removesuffix(".0") if row.calls else "", f"{row.seconds * 1e3:,.3f}",
                 f"{row.share:.1%}", "" if flops is None else f"{flops * (1 if on_gpu else 1e3):,.1f}",
                 "" if bytes is None else f"{bytes:,.1f}",
                 "" if of_roof is None else f"{of_roof:.0%}"]
        if on_gpu:
            cells.append(max(row.kernels, key=row.kernels.get)[:40] if row.kernels else "")
        table.add_row(Text(row.name), *map(Text, cells))
    console.print()
    console.print(table)


def _show_parts(console, parts, busy):
    phases = dict.fromkeys(phase for times in parts.values() for phase in times)
    order = ("setup", "prefill", "decode", "forward", "backward", "optimizer")
    phases = sorted(phases, key=order.index)
    table = _table("part, ms", *phases, "all", "share")
    for part, times in parts.items():
        table.add_row(part, *(f"{times[phase] * 1e3:,.2f}" if phase in times else "" for phase in phases),
                      f"{times.total() * 1e3:,.2f}", f"{times.total() / busy:.1%}")
    table.add_row("all", *(f"{sum(times[phase] for times in parts.values()) * 1e3:,.2f}" for phase in phases),
                  f"{busy * 1e3:,.2f}", "", style="dim")
    console.print()
    console.print(table)


def _table(name, *titles):
    from rich.table import Table

    table = Table(show_edge=False, box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column(name, overflow="fold")
    for title in titles:
        table.add_column(title, justify="left" if title == "kernel" else "right", no_wrap=True)
    return table


LEGEND = """
ms and calls are those of one step; an op's time is its own: {whose}.
GB/s: inputs and outputs once.  roof: share of what bytes or FLOPs allow here; above 100% from the cache, or since
the roof is that of a copy, half of it written.
residual: the additions of a block.  gradients: summed and stored."""
