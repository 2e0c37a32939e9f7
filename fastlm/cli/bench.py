"""`fastlm bench`: every op on every backend beside its peers, checked first, with its share of this machine's roof."""

import contextlib
import re
from pathlib import Path
from typing import Annotated

import typer


def bench(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops, or generate, train, products; all ops else.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    shape: Annotated[str | None, typer.Option(help="Sizes in place of the usual, e.g. N=512,V=50257.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32, bf16, fp16; generate: int8, int4 too.")] = None,
    seconds: Annotated[float, typer.Option(help="For every contender of a case.")] = 1.0,
    fresh_roofs: Annotated[bool, typer.Option("--fresh-roofs", help="Measure this machine's roofs again.")] = False,
    warm: Annotated[bool, typer.Option("--warm", help="The same operands each time, not beyond the cache.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the results there, as JSON.")] = None,
    compare: Annotated[str | None, typer.Option(help="A results file, or a commit, built anew: 1 if slower.")] = None,
    bound: Annotated[float, typer.Option(help="Slower than that share is a regression, noise allowed for.")] = 0.10,
):
    """Measure the ops beside their peers, all in turn in one run. Exit code 1 where one of ours fails or is wrong."""
    from rich.console import Console
    from rich.progress import Progress

    from fastlm.benchmarks import harness
    from fastlm.benchmarks.compare import changes, measure_revision
    from fastlm.cli.device import device_of
    from fastlm.measure.roofs import roofs

    device = device_of(device)
    if not 0 < seconds < 3600:
        raise ValueError(f"--seconds is {seconds}, wanted a number above 0")
    sizes = sizes_of(shape)
    cases = harness.suite(ops, device=device, shape=sizes, dtypes=dtype)
    cases, too_large = harness.fitting(cases, device, shape is not None)
    console, rows, former = Console(), [], None
    if compare is not None:
        path = _results_of(compare)
        if path is None:
            options = {"--shape": [shape] if shape else [], "--dtype": dtype or [], "--device": [device],
                       "--seconds": [seconds]}
            arguments = [*(ops or []), *(str(text) for name, values in options.items() for value in values
                                         for text in (name, value)), *(["--warm"] if warm else [])]
            with console.status(f"building and measuring {compare}"):
                former = measure_revision(compare, arguments, cuda=device == "cuda")
        else:
            former = harness.read(path)
    for told in too_large:
        console.print(f"[yellow]left out: {told}[/]", highlight=False)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("this machine's roofs", total=sum(case.passes for case in cases))
        roof = roofs(device, fresh=fresh_roofs)
        about = harness.head(device)
        console.print(f"{about['device']}, roofs: {roof}", highlight=False)
        if about["load"] > 0.5 * about["threads"] and device == "cpu":
            console.print(f"[yellow]the machine is busy (load {about['load']}): expect noise[/]")

        by_case = [None] * len(cases)
        for turn in range(max((case.passes for case in cases), default=0)):
            measuring = [case for case in cases if turn < case.passes]
            with _measurer(ops, device, sizes, dtype, measuring) as measure:
                for number, case in enumerate(cases):
                    if turn >= case.passes:
                        continue
                    progress.update(task, description=case.name)
                    new = harness.attempt(measure, case, roof, seconds=seconds / case.passes, cold=not warm)
                    progress.advance(task)
                    by_case[number] = new if turn == 0 else harness.merge(by_case[number], new)
                    if turn + 1 == case.passes:
                        _show_case(progress.console, case, by_case[number])
                    rows = [row for some in by_case for row in some or ()]
                    if out is not None:  # after every case: an interruption loses nothing
                        harness.write(out, about, vars(roof), rows)
        found = []
        if former is not None:
            found = changes(former["rows"], rows) if _timed(rows) else []
            for _ in range(2):  # what is slower once may be chance
                slower = [case for case in cases if any(_slower(change, case, bound) for change in found)]
                with _measurer(ops, device, sizes, dtype, slower) as measure:
                    for case in slower:
                        progress.update(task, description=f"again: {case.name}")
                        new = harness.attempt(measure, case, roof, seconds=seconds, cold=not warm)
                        rows += [row for row in new if "failed" in row]
                        again = changes(former["rows"], new) if _timed(new) else []
                        found = [min([old, *(new for new in again if new.name == old.name)],
                                     key=lambda one: one.change) for old in found]
    console.print(LEGEND, style="dim", highlight=False)
    if out is not None:
        console.print(f"\nwrote {out}", highlight=False)
    if former is not None:
        _show_changes(console, found, bound, former["head"])
    faults = harness.faults(rows)
    for told in faults:
        console.print(told, style="bold red", markup=False, highlight=False, soft_wrap=True)
    if faults or any(change.verdict(bound) == "slower" for change in found):
        raise typer.Exit(1)


@contextlib.contextmanager
def _measurer(ops, device, shape, dtypes, cases):
    """measure(case, roofs, ...): in a process of its own where a case has several passes, else in this one."""
    from fastlm.benchmarks.apart import Apart

    if not any(case.passes > 1 for case in cases):
        yield lambda case, roof, **options: case.run(device, roof, **options)
        return
    with Apart(ops, device, shape, dtypes) as apart:
        yield lambda case, roof, **options: (
            apart.measure(case, roof, **options) if case.passes > 1 else case.run(device, roof, **options))


def _timed(rows):
    return any(row["ours"] and "median_us" in row for row in rows)


def _slower(change, case, bound):
    same = change.case[0] == case.op and change.case[2:4] == (case.dtype, tuple(case.shape.items()))
    return same and change.verdict(bound) == "slower"


def sizes_of(text):
    """{"N": 512, "V": 50257} of "N=512,V=50257"."""
    if text is None:
        return None
    if bad := [part for part in text.split(",") if not re.fullmatch(r"\s*[A-Z]\s*=\s*\d+\s*", part)]:
        raise ValueError(f"--shape: got {bad[0]!r}, wanted letters and sizes, e.g. N=512,V=50257")
    return {letter.strip(): int(size) for letter, size in (part.split("=") for part in text.split(","))}


def _results_of(wanted):
    """The results file that --compare names, itself or by its commit; None where there is none."""
    from fastlm.benchmarks import harness

    if Path(wanted).is_file():
        return Path(wanted)
    folder = Path(harness.__file__).parent / "results"
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            commit = harness.read(path)["head"].get("commit")
        except ValueError:  # of another program
            continue
        if commit and re.fullmatch("[0-9a-f]{7,40}", wanted) and commit == wanted[:7]:
            return path
    return None


COLUMNS = {  # title → (least width, the cell of a row and our time, or None where the row has no such figure)
    "µs": (9, lambda row, ours: f"{row['median_us']:,.1f}"),
    "±": (4, lambda row, ours: f"[yellow]~{row['spread']:.0%}[/]" if row["noisy"] else f"{row['spread']:.0%}"),
    "tokens/s": (8, lambda row, ours: f"{row['tokens_per_s']:,.1f}" if "tokens_per_s" in row else None),
    "GB/s": (6, lambda row, ours: f"{row['gb_per_s']:,.1f}" if "gb_per_s" in row else None),
    "TFLOP/s": (7, lambda row, ours: f"{row['tflop_per_s']:.3g}" if row.get("tflop_per_s") else None),
    "MiB": (6, lambda row, ours: f"{row['peak_mib']:,}" if row.get("peak_mib") is not None else None),
    "roof": (4, lambda row, ours: f"{row['of_roof']:.0%}"),
    "error": (5, lambda row, ours: f"{row['error']:.2f}" if row.get("error") is not None else None),
    "÷ ours": (6, lambda row, ours: f"{row['median_us'] / ours:.2f}" if ours else None),
}


def _show_case(console, case, rows):
    from rich.text import Text

    console.print()
    console.print(Text(case.name, style="bold cyan"))
    for part in dict.fromkeys(row["part"] for row in rows):
        _show_part(console, part, [row for row in rows if row["part"] == part])


def _show_part(console, part, rows):
    from rich.table import Table
    from rich.text import Text

    from fastlm.benchmarks import harness

    ours = next((row["median_us"] for row in rows if row.get("chosen")), None)
    timed = [row for row in rows if "median_us" in row]
    cells = {title: [cell(row, ours) for row in timed] for title, (_, cell) in COLUMNS.items()}
    titles = [title for title in COLUMNS if any(text is not None for text in cells[title])]
    table = Table(show_edge=False, box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column(part, min_width=22)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True, min_width=COLUMNS[title][0])
    for number, row in enumerate(timed):
        name = f"[green]{harness.title(row)}, chosen[/]" if row["chosen"] else harness.title(row)
        table.add_row(name, *(cells[title][number] or "" for title in titles))
    if timed:
        console.print(table)
    for row in rows:
        if row.get("latency_us"):
            told = " / ".join(f"{value / 1e3:,.2f}" for value in row["latency_us"])
            console.print(Text(f"{row['contender']}: a token takes {told} ms (50, 90, 99 of 100)", style="dim"))
        if row.get("wrong"):
            told = f"{row['contender']} is WRONG: {row['error']:.2f} of the allowed error"
            console.print(Text(told, style="bold red"))
        elif "failed" in row:
            console.print(Text(f"{row['contender']} FAILED: {row['failed']}", style="bold red"))
        elif "refused" in row:
            console.print(Text(f"{row['contender']}: {row['refused']}", style="dim"))


LEGEND = """
µs: median of a call.  ±: distance of the quartiles, or of the medians of an op's two passes, over it; ~ where the
machine was too busy to tell.
roof: share of what the bytes or the FLOPs allow here.  error: over what is allowed.  ÷ ours: time over the chosen's.
MiB: what a call takes beyond its operands, a training step beyond weights and moments."""


def _show_changes(console, found, bound, head):
    from rich.table import Table

    table = Table(show_edge=False, box=None, pad_edge=False, header_style="bold")
    table.add_column(f"against {head.get('commit') or head.get('date')}", overflow="fold")
    for title in ("µs then", "now", "machine", "change", "noise", ""):
        table.add_column(title, justify="right", no_wrap=True)
    colours = {"slower": "bold red", "faster": "green", "same": "dim"}
    for one in found:
        verdict = one.verdict(bound)
        table.add_row(one.name, f"{one.old_us:,.1f}", f"{one.new_us:,.1f}", f"{one.drift:.2f}", f"{one.change:.2f}",
                      f"{one.noise:.2f}", f"[{colours[verdict]}]{verdict}[/]")
    console.print()
    console.print(table)
