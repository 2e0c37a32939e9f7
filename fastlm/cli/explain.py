"""`fastlm explain`: which backend runs an op here and why, how it is launched, and the floor that its work sets."""

from typing import Annotated

import typer


def explain(
    op: Annotated[str, typer.Argument(help="One of fastlm's ops, e.g. attention.")],
    shape: Annotated[str | None, typer.Option(help="Sizes in place of the usual, e.g. B=8,T=1024.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
):
    """Tell of every kernel of an op: the backend chosen, why no other, the launch, bytes and FLOPs and their floor.

    Exit code 1 where the one chosen raises.
    """
    from rich.console import Console

    from fastlm.benchmarks import harness
    from fastlm.benchmarks.explanation import explanation
    from fastlm.cli.bench import sizes_of
    from fastlm.cli.device import device_of, failing
    from fastlm.measure.roofs import roofs

    device = device_of(device)
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
