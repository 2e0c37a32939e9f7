"""The public ops: each checks its arguments once, knows its gradient, and makes one call.

A file here is an op; its __all__ is what of it is public.
"""

from importlib import import_module
from pathlib import Path

from fastlm.dispatch.forcing import use

FAMILIES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "checks"))
_modules = {family: import_module(f"{__name__}.{family}") for family in FAMILIES}
_public = {name: getattr(module, name) for module in _modules.values() for name in module.__all__}
globals().update(_public)
__all__ = ["use"]
__all__.extend(_public)


def module(family):
    """The module of an op, whose name is also a function's."""
    return _modules[family]
