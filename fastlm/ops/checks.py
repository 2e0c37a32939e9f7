"""Checks of what the public ops are given: one line that is check, documentation and message."""

import torch


def check(op, **tensors):
    """The size of every letter, e.g. {"B": 2, "T": 5}, after matching each tensor against its letters.

    Each keyword is `name=(tensor, "B T H D")`: the same letter means the same size everywhere. All tensors must lie
    on one device. Raises TypeError for what is no tensor, ValueError naming op, argument, got and wanted.
    """
    sizes, owner, device = {}, {}, None
    for name, (tensor, letters) in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} is {type(tensor).__name__}, wanted a tensor ({letters})")
        letters = letters.split()
        if tensor.dim() != len(letters):
            wanted = ", ".join(letters)
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, wanted ({wanted})")
        if device is not None and tensor.device != device[1]:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but {device[0]} is on {device[1]}")
        device = device or (name, tensor.device)
        for letter, size in zip(letters, tensor.shape):
            if letter.isdigit():
                if size != int(letter):
                    raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, wanted ({', '.join(letters)})")
            elif letter not in sizes:
                sizes[letter], owner[letter] = size, name
            elif sizes[letter] != size:
                raise ValueError(f"{op}: {name} has {letter}={size}, but {owner[letter]} has {letter}={sizes[letter]}")
    return sizes


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
