"""`fastlm check`: the parity certificate of this machine, or of a model."""

import json
import time
from collections import Counter
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
    """Hold every op and a model, on every backend that runs here, to fp64 and to transformers. Exit code 1 on FAIL.

    A kernel that raises fails, as does a --backend of which nothing was measured; what dispatch refuses is told.
    """
    import torch
    from rich.console import Console

    import fastlm
    from fastlm.cli.device import device_of
    from fastlm.gpt2 import GPT2
    from fastlm.measure.certificate import as_dict, certify, unmeasured

    device = device_of(device)
    loaded = None if model is None else GPT2.from_pretrained(str(model), device=device).eval()
    console, started = Console(), time.perf_counter()
    with Console(stderr=True).status("checking") as status:
        def say(what):
            status.update(f"checking {what}")

        lines = list(certify(model=loaded, device=device, backends=backend, seed=seed, say=say))
    seconds = time.perf_counter() - started
    absent = unmeasured(lines, backend or ())
    if not any(line.outcome == "measured" for line in lines):
        absent.setdefault("all", "nothing was measured")
    passed = all(line.holds for line in lines) and not absent
    if as_json:
        print(json.dumps({
            "fastlm": fastlm.__version__, "torch": torch.__version__, "device": device, "model": str(model or "random"),
            "seed": seed, "seconds": round(seconds, 2), "passed": passed, "unmeasured": absent,
            "lines": [as_dict(line) for line in lines],
        }, indent=2))
    else:
        _show(console, lines)
        verdict = "[bold green]PASS[/]" if passed else "[bold red]FAIL[/]"
        counts = Counter(line.outcome for line in lines)
        others = "".join(f", {counts[outcome]} {outcome}" for outcome in ("refused", "failed") if counts[outcome])
        good = sum(line.holds for line in lines if line.outcome == "measured")
        console.print()
        for told in absent.values():
            console.print(told, style="bold red", markup=False, highlight=False, soft_wrap=True)
        console.print(f"{verdict}  {good} of {counts['measured']} hold{others}, {seconds:.1f} s")
    if not passed:
        raise typer.Exit(1)


def _show(console, lines):
    from rich.table import Table

    columns = sorted({(line.backend, line.dtype) for line in lines})
    table = Table(show_edge=False)
    table.add_column("error / allowed", no_wrap=True)
    for backend, dtype in columns:
        table.add_column(f"{backend}\n{dtype}", min_width=4)
    found = {(line.path, line.what, line.backend, line.dtype): line for line in lines}
    shared = {}  # what ran parts of a line on another backend → its number
    for path, what in dict.fromkeys((line.path, line.what) for line in lines):
        cells = [_cell(found.get((path, what, *column)), shared) for column in columns]
        table.add_row(what if path == "op" else f"{path}: {what}", *cells)
    console.print(table)
    for told, number in shared.items():
        console.print(f"  ({number}) {told}", markup=False, highlight=False, soft_wrap=True)
    notes = {}  # (label, note, outcome) → dtypes
    for line in lines:
        if line.note:
            label = f"{line.what if line.path == 'op' else f'{line.path}: {line.what}'} on {line.backend}"
            notes.setdefault((label, line.note, line.outcome), []).append(line.dtype)
    for (label, note, outcome), dtypes in notes.items():
        style = "bold red" if outcome == "failed" else None
        console.print(f"  {label} in {', '.join(dtypes)}: {note}", style=style, markup=False, highlight=False,
                      soft_wrap=True)


def _cell(line, shared):
    if line is None:
        return ""
    if line.outcome != "measured":
        return f"[{'bold red' if line.outcome == 'failed' else 'yellow'}]{line.outcome}[/]"
    text = f"{line.ratio:.2f}"
    if line.by != line.backend:
        others = ", ".join(f"{op} on {backend}" for op, backend in line.ran.items() if backend != line.backend)
        text += f" ({shared.setdefault(f'{line.by}: {others}', len(shared) + 1)})"
    return text if line.holds else f"[bold red]{text}[/]"
