"""What torch.vmap makes of a torch op of ours: a call a sample, as the kernels know no further dimension."""

import torch
from torch.utils import _pytree as pytree


def batch(op, library):
    """Has torch.vmap call the op for each sample and stack what comes back; one that writes in place refuses."""

    def each(info, in_dims, *args):
        if op._schema.is_mutable:
            raise RuntimeError(f"torch.vmap cannot batch {op._opname}, which writes in place: call it for each sample")
        if not info.batch_size:
            raise RuntimeError(f"torch.vmap over no samples: {op._opname} cannot tell the shapes of its results")
        leaves, spec = pytree.tree_flatten(args)
        samples = [[leaf] * info.batch_size if dim is None else leaf.movedim(dim, 0).contiguous().unbind(0)
                   for leaf, dim in zip(leaves, pytree.tree_leaves(in_dims))]
        found = [op(*pytree.tree_unflatten(sample, spec)) for sample in zip(*samples)]
        if isinstance(found[0], torch.Tensor):
            return torch.stack(found), 0
        return tuple(torch.stack(parts) for parts in zip(*found)), (0,) * len(found[0])

    torch.library.register_vmap(f"fastlm::{op._opname}", each, lib=library)
