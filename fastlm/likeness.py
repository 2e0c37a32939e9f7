"""Conv1D's likeness to the class of that name in transformers, which peft knows a weight (in, out) by.

peft asks `isinstance(module, transformers.pytorch_utils.Conv1D)`, and isinstance asks for a module's type and then for
its `__class__`, as for any stand-in. So nothing is imported: where transformers is not, nobody asks.
"""

import functools
import sys

from torch import nn


class AlikeConv1D(nn.Module):
    @property
    def __class__(self):
        theirs = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
        return type(self) if theirs is None else _both(type(self), theirs)

    @__class__.setter
    def __class__(self, kind):  # torch's parametrizations change it
        vars(object)["__class__"].__set__(self, vars(kind).get("_ours", kind))

    def __reduce__(self):  # pickle would take the class for another's
        return _blank, (type(self),), vars(self)


@functools.cache
def _both(ours, theirs):
    names = {"__module__": ours.__module__, "__qualname__": ours.__qualname__, "_ours": ours}
    return ours if issubclass(ours, theirs) else type(ours.__name__, (ours, theirs), names)


def _blank(kind):
    return kind.__new__(kind)
