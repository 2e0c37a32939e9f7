"""Checks of what the public ops are given: one line that is check, documentation and message."""

import torch


def check(op, **tensors):
    """The size of every letter, e.g. {"B": 2, "T": 5}, after matching each tensor against its letters.

    Each keyword is `name=(tensor, "B T H D")`: the same letter means the same size everywhere. All tensors must lie
    on one device. Raises TypeError for what is no tensor, ValueError naming op, argument, got and wanted.
    """
    sizes, device = {}, None
    for name, (tensor, letters) in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} is {type(tensor).__name__}, wanted a tensor ({letters})")
        letters, shape = letters.split(), tensor.shape
        if len(shape) != len(letters):
            raise ValueError(f"{op}: {name} has shape {tuple(shape)}, wanted ({', '.join(letters)})")
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but {next(iter(tensors))} is on {device}")
        for letter, size in zip(letters, shape):
            if sizes.setdefault(letter, size) != size or letter.isdigit() and size != int(letter):
                _refuse(op, name, letter, size, tensors)
    return sizes


def _refuse(op, name, letter, size, tensors):
    if letter.isdigit():
        tensor, letters = tensors[name]
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, wanted ({', '.join(letters.split())})")
    owner, first = next((other, dict(zip(letters.split(), tensor.shape))[letter])
                        for other, (tensor, letters) in tensors.items() if letter in letters.split())
    raise ValueError(f"{op}: {name} has {letter}={size}, but {owner} has {letter}={first}")


def check_dtype(op, wanted, **tensors):
    """Raises TypeError unless every tensor has one of the dtypes `wanted`, and all have the same."""
    first = None
    for name, tensor in tensors.items():
        if tensor.dtype not in wanted:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
            raise TypeError(f"{op}: {name} is {tensor.dtype}, wanted {names}")
        if first is not None and tensor.dtype != first[1]:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, but {first[0]} is {first[1]}")
        first = first or (name, tensor.dtype)


def inner_contiguous(tensor):
    """The tensor, or a contiguous copy where neighbours along its last dimension are not neighbours in memory."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 or not tensor.numel() else tensor.contiguous()


def check_inner_contiguous(op, **tensors):
    """Raises ValueError where neighbours along a tensor's last dimension are not neighbours in memory."""
    for name, tensor in tensors.items():
        if inner_contiguous(tensor) is not tensor:
            raise ValueError(f"{op}: {name} has strides {tensor.stride()}, wanted 1 for its last dimension")


def beneath(tensor):
    """The tensor whose values one that torch.func wraps stands for: of vmap, all samples', in one."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
