"""`fastlm tune`: which backend is fastest for every op on this device, at a model's shapes."""

from pathlib import Path
from typing import Annotated

import typer


def tune(
    model: Annotated[Path | None, typer.Option(help="A model directory whose shapes count; GPT-2 124M else.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences of a training step.")] = 0,
    context: Annotated[int, typer.Option(help="Tokens a sequence; the model's n_positions else.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[list[str] | None, typer.Option(help="fp32, bf16 or fp16; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(help="For every backend of a case.")] = 1.0,
):
    """Measure every op's backends here, and on a CPU how products are best cut, and keep the table: from then on the
    fastest is chosen.

    A backend that fails or is wrong is left out of the table, and the exit code is 1.
    """
    from rich.console import Console
    from rich.progress import Progress

    from fastlm.backends.machine import machine_why_not
    from fastlm.benchmarks import cuts, harness
    from fastlm.cli.device import device_of
    from fastlm.config import GPT2Config
    from fastlm.dispatch.refusal import failure
    from fastlm.measure import tuned
    from fastlm.measure.roofs import roofs

    device = device_of(device)
    config = GPT2Config() if model is None else GPT2Config.load(model / "config.json")
    T = context or config.n_positions
    if not 1 <= T <= config.n_positions:
        raise ValueError(f"--context is {context}, wanted 1 to the model's n_positions {config.n_positions}")
    if batch < 0:
        raise ValueError(f"--batch is {batch}, wanted 1 or more")
    B = batch or (16 if device == "cuda" else 1)
    cases = harness.model_suite(config, B, T, device=device, dtypes=dtype)
    for case in cases:
        harness.plan(case, device)
    console, rows, found_cuts, cut_faults = Console(), [], [], []
    to_cut = cuts.cases(config, dtype) if device == "cpu" and machine_why_not("cpu") is None else []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("this machine's roofs", total=len(cases) + len(to_cut))
        roof = roofs(device)
        for case in cases:
            progress.update(task, description=case.name)
            rows += harness.attempt(harness.measure, case, device, roof, seconds=seconds)
            progress.advance(task)
        for op, weights in to_cut:
            progress.update(task, description=f"{op} {weights}: how its products are cut")
            try:
                found_cuts.append(cuts.measure(config, op, weights, seconds=3 * seconds))
            except Exception as error:
                cut_faults.append(f"{op} {weights} FAILED: {failure(error)}")
            progress.advance(task)
    found = [row for row in harness.fastest(rows) if row["order"]]
    path = None  # where nothing was measured a former table stays
    if found or found_cuts:
        path = tuned.save(device, harness.head(device), found + found_cuts)
    for row in found:
        times = ", ".join(f"{name} {row['us'][name]:,.0f}" for name in row["order"])
        console.print(f"{row['op']} {row['dtype']}: [green]{row['order'][0]}[/]   [dim]{times} µs[/]", highlight=False)
    for row in found_cuts:
        chosen = " ".join(f"{name}={value}" for name, value in row["cut"].items())
        usual = next(iter(row["us"]))
        console.print(f"{row['op']} {row['dtype']}: [green]{chosen}[/]   [dim]{row['us'][chosen]:,.0f} µs, "
                      f"{usual} {row['us'][usual]:,.0f} µs[/]", highlight=False)
    told = f"wrote {path}; dispatch reads it from now on" if path else "nothing was measured, and no table written"
    console.print(f"\n{told}", highlight=False, soft_wrap=True)
    faults = harness.faults(rows) + cut_faults
    for told in faults:
        console.print(told, style="bold red", markup=False, highlight=False, soft_wrap=True)
    if faults or not found:
        raise typer.Exit(1)
