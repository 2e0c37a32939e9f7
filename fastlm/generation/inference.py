"""inference: how a model's modules are run to generate, whatever mode they are in: no gradients, no dropout.

The modules' own `training` is not touched, so that another thread may train the same model meanwhile: this thread's
calls of torch.nn.functional's dropouts, and of all that takes a `training` there, are made as in evaluation. What a
module of somebody's own does by reading its `training` itself is not seen.
"""

import inspect
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


def _modes():
    """function → (place and name of the argument, what it is in evaluation)."""
    found = {F.scaled_dot_product_attention: (4, "dropout_p", 0.0)}
    for function in vars(F).values():
        if inspect.isfunction(function) and "training" in (names := list(inspect.signature(function).parameters)):
            found[function] = names.index("training"), "training", False
    return found


_MODES = _modes()


class _Evaluation(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _MODES:
            place, name, value = _MODES[function]
            if len(args) > place:
                args = (*args[:place], value, *args[place + 1 :])
            else:
                kwargs = {**kwargs, name: value}
        return function(*args, **kwargs)


@contextmanager
def inference(model):
    """Held for a step, not from token to token: between them the caller may do as it likes. Autocast is off, too."""
    with torch.inference_mode(), torch.autocast(model.device.type, enabled=False), _Evaluation():
        yield
