"""The table: a row for every torch op, with the backends that have it. `ops` fills it, `dispatch` chooses from it."""

from collections.abc import Callable
from dataclasses import dataclass, field

TABLE: dict[str, "Row"] = {}  # by torch op


@dataclass(frozen=True)
class Row:
    """One torch op of a family, which is a public op's: its forward, its backward, or all of it."""

    name: str
    family: str
    kernels: dict[str, str]  # backend → "module" or "module:object" that holds a function called `name`
    order: dict[str, tuple[str, ...] | Callable]  # device type → backends, best first, or a function (*args) → such
    key: Callable  # (*args) → what the choice depends on, hashable
    limits: Callable  # (backend, *args) → None or the sentence why that backend cannot serve the call
    chosen: dict = field(default_factory=dict)  # key → function


def homes(family, *backends):
    """The kernels of a row where each of its backends has them in its usual module."""
    usual = {
        "cuda": "fastlm.backends.native:cuda", "triton": f"fastlm.kernels.{family}",
        "cpu": "fastlm.backends.native:cpu", "torch": "fastlm.backends.vendor",
        "reference": "fastlm.backends.reference",
    }
    return {backend: usual[backend] for backend in backends}


def backends_of(family):
    """The backends that at least one of the family's torch ops has."""
    return {name: None for row in TABLE.values() if row.family == family for name in row.kernels}


def forget():
    """Makes every choice anew when it is next needed."""
    for row in TABLE.values():
        row.chosen.clear()
