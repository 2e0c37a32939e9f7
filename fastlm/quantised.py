"""Quantised weights: int8 with a scale an output, int4 with a scale for 64 inputs of an output.

    int8   w[k, n] = s[n] q[k, n]             q in -127 … 127, s = largest |w| of the column / 127
    int4   w[k, n] = s[k // 64, n] q[k, n]    q in -8 … 7, s of the sign that makes the largest |w| of the group -8

A model whose `quantised` names a kind holds weights of this form, each as the floating-point number it stands for:
quantised again they are the same.
"""

import torch
import torch.nn.functional as F

KINDS = ("int8", "int4")
GROUP = 64  # inputs that share a scale in int4; csrc/fastlm.h, kWeightGroup


def quantise(w, kind):
    """(q int8 (K, N), scale fp32 (N,) or (⌈K/64⌉, N)) of w (K, N), any floating-point dtype; ValueError for no kind."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, wanted {' or '.join(KINDS)}")
    w = w.detach().float()
    tiny = torch.finfo(torch.float32).tiny
    if kind == "int8":
        scale = w.abs().amax(0) / 127
        return torch.round(w / scale.clamp(min=tiny)).to(torch.int8), scale
    K, N = w.shape
    groups = F.pad(w, (0, 0, 0, -K % GROUP)).view(-1, GROUP, N)  # (K/64, 64, N)
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))  # with its sign, which the -8 is for
    scale = largest / -8
    q = torch.round(groups / torch.where(scale == 0, tiny, scale)).clamp(-8, 7)
    return q.view(-1, N)[:K].to(torch.int8), scale[:, 0]


def dequantise(q, scale):
    """The weights (K, N) in fp32 that q (K, N) and scale, (N,) or (⌈K/64⌉, N), stand for."""
    if scale.dim() == 2:
        scale = scale.repeat_interleave(GROUP, 0)[: q.shape[0]]
    return q.float() * scale


def matrices(model):
    """name → (weight parameter, whether it is (N, K)) of every matrix of a model that is quantised."""
    found = {}
    for layer, block in enumerate(model.transformer["h"]):
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            found[f"transformer.h.{layer}.{name}.weight"] = block.get_submodule(name).weight, False
    found["transformer.wte.weight"] = model.transformer["wte"].weight, True
    head = getattr(model.lm_head, "weight", None)
    if head is not None and head is not model.transformer["wte"].weight:
        found["lm_head.weight"] = head, True
    return found


def head_kind(kind):
    """The head and the embedding, mostly one matrix, are no narrower than int8: they decide every token."""
    return "int8" if kind == "int4" else kind


@torch.no_grad()
def quantise_(model, kind):
    """Rounds a model's matrices to `kind`, in place, and notes it in `model.quantised`; returns the model, in fp32."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, wanted {' or '.join(KINDS)}")
    model.float()
    for weight, transposed in matrices(model).values():
        of = head_kind(kind) if transposed else kind
        w = weight.T if transposed else weight
        w.copy_(dequantise(*quantise(w, of)))
    model.quantised = kind
    return model
