"""`fastlm check`: the parity certificate of this machine, or of a model."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer


def check(
    model: Annotated[Path | None, typer.Option(help="A model directory to check; small random models else.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    backend: Annotated[list[str] | None, typer.Option(help="Only this; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Of the numbers it tries.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate as JSON.")] = False,
):
    """Hold every op and a model, on every backend that runs here, to fp64 and to transformers. Exit code 1 on FAIL."""
    import torch
    from rich.console import Console

    import fastlm
    from fastlm.certificate import as_dict, certify
    from fastlm.cli.device import device_of
    from fastlm.gpt2 import GPT2

    device = device_of(device)
    loaded = None if model is None else GPT2.from_pretrained(str(model), device=device).eval()
    console, started = Console(), time.perf_counter()
    with Console(stderr=True).status("checking") as status:
        def say(what):
            status.update(f"checking {what}")

        lines = list(certify(model=loaded, device=device, backends=backend, seed=seed, say=say))
    seconds = time.perf_counter() - started
    passed = all(line.holds for line in lines)
    if as_json:
        print(json.dumps({
            "fastlm": fastlm.__version__, "torch": torch.__version__, "device": device, "model": str(model or "random"),
            "seed": seed, "seconds": round(seconds, 2), "passed": passed, "lines": [as_dict(line) for line in lines],
        }, indent=2))
    else:
        _show(console, lines)
        verdict = "[bold green]PASS[/]" if passed else "[bold red]FAIL[/]"
        measured = [line for line in lines if not line.note.startswith("refused")]
        console.print(f"\n{verdict}  {sum(line.holds for line in measured)} of {len(measured)} hold, {seconds:.1f} s")
    if not passed:
        raise typer.Exit(1)


def _show(console, lines):
    from rich.table import Table

    columns = sorted({(line.backend, line.dtype) for line in lines})
    table = Table(show_edge=False)
    table.add_column("error / allowed", no_wrap=True)
    for backend, dtype in columns:
        table.add_column(f"{backend}\n{dtype}", min_width=4)
    notes = []
    measured = {(line.path, line.what): None for line in lines if not line.note.startswith("refused")}
    found = {(line.path, line.what, line.backend, line.dtype): line for line in lines}
    for path, what in measured:
        cells = []
        for column in columns:
            line = found.get((path, what, *column))
            text = "" if line is None else f"{line.ratio:.2f}"
            cells.append(text if line is None or line.holds else f"[bold red]{text}[/]")
        table.add_row(what if path == "op" else f"{path}: {what}", *cells)
    for line in lines:
        if line.note and line.note not in notes:
            notes.append(line.note)
    console.print(table)
    for note in notes:
        console.print(f"  {note}", highlight=False, soft_wrap=True)
