"""`fastlm report`: results files as one HTML page with rooflines, sweeps, tables and history."""

import os
from pathlib import Path
from typing import Annotated

import typer


def report(
    files: Annotated[list[Path] | None, typer.Argument(help="Results files; all in benchmarks/results else.")] = None,
    out: Annotated[Path, typer.Option(help="Write the page there.")] = Path("report.html"),
):
    """Write one page, which needs no network, out of what `fastlm bench --out FILE` wrote."""
    from rich.console import Console

    from fastlm.benchmarks import harness
    from fastlm.benchmarks.report import page

    console, folder = Console(), Path(harness.__file__).parent / "results"
    results = []
    kept = [path for path in sorted(folder.rglob("*.json")) if not path.name.startswith("resources")]
    for path in files or kept:
        try:
            results.append((str(path if files else path.relative_to(folder.parent.parent)), _results(path)))
        except (ValueError, OSError) as error:
            if files:
                raise
            console.print(f"left out: {error}", style="dim", highlight=False, markup=False, soft_wrap=True)
    if not results:
        raise ValueError(f"no results files in {folder}: write one with fastlm bench --out FILE, and name it here")
    results.sort(key=lambda result: _date(result[1]["head"]))
    resources = []
    for path in sorted(folder.glob("resources*.json")):
        try:
            resources += _resources(path)
        except (ValueError, OSError) as error:
            console.print(f"left out: {error}", style="dim", highlight=False, markup=False, soft_wrap=True)
    _write(out, page(results, resources))
    console.print(f"wrote {out}", highlight=False, markup=False, soft_wrap=True)


def _results(path):
    """What `harness.read` reads, with ValueError also where a part of it is of another kind than the report needs."""
    from fastlm.benchmarks import harness

    found = harness.read(path)
    good = isinstance(found["head"], dict) and isinstance(found["roofs"], dict) and all(
        isinstance(row["shape"], dict) and row["shape"] and all(type(size) is int for size in row["shape"].values())
        and all(isinstance(row[name], str) for name in ("op", "part", "dtype", "contender"))
        for row in found["rows"])
    if not good:
        raise ValueError(f"{path} is no results file: a head, roof, shape or name is damaged; measure again")
    return found


def _date(head):
    """Seconds since 1970; 0 where a head has no date."""
    from datetime import datetime

    try:
        return datetime.strptime(str(head.get("date")), "%Y-%m-%d %H:%M:%S %z").timestamp()
    except ValueError:
        return 0.0


def _resources(path):
    """The rows of a resource report, each with its compiler."""
    import json

    found = json.loads(path.read_text())
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is no resource report: it has no rows")
    compiler = found.get("compiler") or (f"triton-{found['triton']}" if "triton" in found else None)
    return [row | ({"compiler": compiler} if compiler else {}) for row in rows]


def _write(path, page):
    """Writes the page whole or not at all, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
