"""`fastlm doctor`: what is here, what was built, and for every op and backend whether it runs, or why not.

A backend does not run an op where dispatch refuses, or the machine lacks it. A kernel that raises or gives NaN failed.
What is amiss with the installation is told with the line that mends it.
"""

import json
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    measure: Annotated[bool, typer.Option("--roofs", help="Measure this machine's roofs too: 20 s a device.")] = False,
):
    """Show what this machine has and, per op and backend, `runs` or the sentence why not. Exit code 1 on a failure."""
    found = examine(measure=measure)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)
    if any(cell.startswith(FAILED) for families in found["devices"].values() for row in families.values()
           for cell in (row["default"], *row["backends"].values())):
        raise typer.Exit(1)
    if _isa()[1] is not None:
        raise typer.Exit(2)


FAILED = "failed: "  # begins the cell of a kernel that raised


def examine(*, measure=False):
    """The findings as a dict: machine, build, devices with op → backend → "runs" or a sentence, and the choice; roofs.

    A sentence that begins with "failed: " tells what a kernel raised, or that it gave NaN; all others tell why it is
    not called. "mend" holds what is amiss with the installation, a sentence each.

    measure: the roofs are measured, in LIMIT seconds a device; else they are those that are known, or None.
    """
    import platform
    from dataclasses import asdict
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import fastlm
    from fastlm.backends.machine import BACKENDS, machine_why_not
    from fastlm.measure.roofs import device_name, known_roofs, roofs

    packages = {}
    for name in ("torch", "triton", "numpy", "safetensors", "tokenizers", "transformers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    gpus = [
        f"{torch.cuda.get_device_name(index)} (sm_{''.join(map(str, torch.cuda.get_device_capability(index)))})"
        for index in range(torch.cuda.device_count())
    ]
    devices = ["cpu", "cuda"] if gpus else ["cpu"]
    known = {device: roofs(device, fresh=True) if measure else known_roofs(device) for device in devices}
    return {
        "fastlm": fastlm.__version__,
        "machine": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": device_name("cpu"),
            "gpus": gpus,
        },
        "packages": packages,
        "built": _built(),
        "mend": _mend(),
        "backends": {name: machine_why_not(name) or "runs" for name in BACKENDS},
        "devices": {device: _ops(device) for device in devices},
        "roofs": {device: roof and asdict(roof) for device, roof in known.items()},
    }


def _built():
    """The halves of the compiled module: what each was built for, or the sentence why it is absent."""
    from fastlm.backends.machine import machine_why_not

    if (reason := machine_why_not("cpu")) is not None:
        return {"cpu": reason, "cuda": reason}
    import fastlm._C as _C

    name, reason = _isa()
    cpu = f"built for {_C.cpu.isas()}; " + (f"runs on {name}" if reason is None else "none runs")
    cuda = "not built: nvcc or a GPU was missing when fastlm was installed"
    return {"cpu": cpu, "cuda": f"built for {_C.cuda.architectures()}" if hasattr(_C, "cuda") else cuda}


def _isa():
    """(the instruction set that the CPU kernels run on, None), or (None, why FASTLM_CPU_ISA asks for one in vain)."""
    from fastlm.backends.machine import machine_why_not

    if machine_why_not("cpu") is not None:
        return None, None
    import fastlm._C as _C

    try:
        return _C.cpu.isa(), None
    except (RuntimeError, ValueError) as error:
        return None, str(error)


def _mend():
    """What is amiss with the installation: sentences, each with the line that mends it."""
    import torch

    from fastlm.backends.machine import ALL, machine_why_not, untested_torch

    told = [untested_torch(), _isa()[1]]
    if machine_why_not("cpu") is None:
        import fastlm._C as _C

        if (widest := _C.cpu.widest_isa()) not in _C.cpu.isas().split(", "):
            told.append(f"this CPU has {widest}, and the CPU kernels were built for {_C.cpu.isas()}: {ALL}, or a "
                        "reinstall here, builds it")
    else:
        told.append(machine_why_not("cpu"))
    if torch.cuda.is_available():
        told.append(machine_why_not("cuda"))
    return list(dict.fromkeys(sentence for sentence in told if sentence is not None))


def _ops(device):
    """op → what small calls on `device` tell:

    backends    backend → "runs" or why not
    chosen      the backend that dispatch chooses, None where it finds none
    default     "runs" or why not, as dispatch chooses
    others      backend → {torch op: the backend that ran it}, for those that leave a part of the op to another
    """
    from fastlm.backends.machine import BACKENDS

    findings = {}
    for family, call in _samples(device).items():
        cells, others = {}, {}
        for backend in BACKENDS:
            cells[backend], ran = _try(family, backend, call)
            if elsewhere := {op: name for op, name in ran.items() if name != backend}:
                others[backend] = elsewhere
        default, ran = _called(call)
        findings[family] = {"backends": cells, "chosen": next(iter(ran.values()), None), "default": default,
                            "others": others}
    return findings


def _try(family, backend, call):
    """("runs" where the sample call really did, else the sentence why not, torch op → the backend that ran it)."""
    from fastlm.dispatch import why_not
    from fastlm.dispatch.forcing import use
    from fastlm.dispatch.table import TABLE

    rows = [row.name for row in TABLE.values() if row.family == family]
    name = next((name for name in rows if backend in TABLE[name].kernels), rows[0])
    if (reason := why_not(name, backend)) is not None:
        return reason, {}
    with use(**{family: backend}):
        told, ran = _called(call)
    if told == "runs" and backend not in ran.values():
        told = f"{backend} has none of the ops that ran: " + ", ".join(f"{op} on {name}" for op, name in ran.items())
    return told, ran if told == "runs" else {}


def _called(call):
    """("runs" or what was raised, torch op → the backend that ran it)."""
    from fastlm.dispatch import record
    from fastlm.dispatch.refusal import Refused, failure

    with record() as calls:
        try:
            if not all(bool(x.isfinite().all()) for x in call()):  # on a GPU it waits: what a kernel raises comes late
                raise RuntimeError("the results hold NaN or infinity")
        except Refused as error:
            return str(error), dict(calls.keys())
        except Exception as error:
            told = str(error)
            return told if told == _isa()[1] else FAILED + failure(error), dict(calls.keys())
    return "runs", dict(calls.keys())


def _samples(device):
    """A small call of every op, which returns its results, by family, in the dtype that is usual on the device."""
    import torch

    from fastlm import ops

    usual = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}

    def sample(family):
        return lambda: ops.module(family).example(lambda *shape: torch.randn(shape), lambda x: x.to(**usual)).values()

    return {family: sample(family) for family in ops.FAMILIES}


def _show(found):
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fastlm.measure.roofs import LIMIT, Roofs

    console = Console()
    machine, packages = found["machine"], found["packages"]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("fastlm", f"{found['fastlm']} on Python {machine['python']}, {machine['system']}")
    facts.add_row("CPU", machine["cpu"])
    facts.add_row("GPU", ", ".join(machine["gpus"]) or "none that torch can use")
    facts.add_row("packages", ", ".join(f"{name} {version}" for name, version in packages.items()))
    facts.add_row("CPU kernels", found["built"]["cpu"])
    facts.add_row("CUDA kernels", found["built"]["cuda"])
    for device, roof in found["roofs"].items():
        told = str(Roofs(**roof)) if roof else f"not measured yet: fastlm doctor --roofs, {LIMIT:.0f} s at most"
        facts.add_row(f"roofs, {device}", told)
    console.print(facts)
    for sentence in found["mend"]:
        console.print(f"[bold yellow]to mend:[/] {escape(sentence)}", highlight=False, soft_wrap=True)

    notes: list[str] = []

    def note(text):
        if text not in notes:
            notes.append(text)
        return f"({notes.index(text) + 1})"

    def cell(text, chosen, others):
        if text == "runs":
            told = "[bold green]runs, chosen[/]" if chosen else "[green]runs[/]"
            elsewhere = ", ".join(f"{op} runs on {name}" for op, name in (others or {}).items())
            return f"{told} {note(elsewhere)}" if others else told
        return f"[bold red]FAILED {note(text)}[/]" if text.startswith(FAILED) else f"[yellow]no {note(text)}[/]"

    for device, families in found["devices"].items():
        backends = list(found["backends"])
        table = Table("op", *backends, title=f"tensors on {device}", title_justify="left", show_edge=False)
        for family, row in families.items():
            cells = [cell(row["backends"][backend], backend == row["chosen"], row["others"].get(backend))
                     for backend in backends]
            table.add_row(family, *cells)
            if row["default"] != "runs" and row["default"] not in notes:
                note(f"{family}, as dispatch chooses, {row['default']}")
        console.print()
        console.print(table)
    if notes:
        console.print()
        for number, told in enumerate(notes, 1):
            console.print(f"({number}) {told}", highlight=False, markup=False, soft_wrap=True)
