"""The `torch` backend: every op through what PyTorch itself ships, the bar the other backends must clear."""

import torch
import torch.nn.functional as F

from fastlm.backends import reference

aten = torch.ops.aten


def softmax_xent_fwd(x, y, ignore):
    if not x.shape[1]:  # no label can be gathered
        return reference.softmax_xent_fwd(x, y, ignore)
    wide, label = x.to(torch.promote_types(x.dtype, torch.float32)), y.clamp(0, x.shape[1] - 1)
    loss = F.log_softmax(wide, dim=1).gather(1, label[:, None])[:, 0].neg_()
    return _by_label(loss, y, label, ignore), torch.logsumexp(wide, dim=1)


def softmax_xent_bwd(dloss, x, y, lse, ignore):
    if not x.shape[1]:
        return torch.empty_like(x)
    dx, label = torch.sub(x, lse[:, None]).exp_(), y.clamp(0, x.shape[1] - 1)  # (N, V), in fp32
    dx.scatter_add_(1, label[:, None], torch.full_like(label, -1, dtype=dx.dtype)[:, None])
    dx *= _by_label(dloss, y, label, ignore)[:, None]
    return dx.to(x.dtype)


def _by_label(values, y, label, ignore):
    """Values (N,), but 0 where a row is ignored and NaN where its y lies outside the vocabulary, `label` being clamped.

    On a GPU an index that lies outside (F.nll_loss, scatter) is an assertion, behind which the process has no GPU.
    """
    return values.masked_fill(label != y, float("nan")).masked_fill(y == ignore, 0.0)


def softmax_xent_(x, dloss, y, ignore):
    loss, lse = softmax_xent_fwd(x, y, ignore)
    x.copy_(softmax_xent_bwd(dloss, x, y, lse, ignore))
    return loss, lse


def bias_gelu_fwd(x, bias):
    return F.gelu(x + bias.to(x.dtype), approximate="tanh")


def bias_gelu_bwd(dy, x, bias):
    dx = aten.gelu_backward(dy, x + bias.to(x.dtype), approximate="tanh")
    return dx, dx.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(bias.dtype)


def layer_norm_fwd(x, residual, x_bias, weight, bias, epsilon, dtype):
    x = x if x_bias is None else x + x_bias
    s = x if residual is None else (residual + x).to(residual.dtype)
    w, b = weight.to(s.dtype), bias.to(s.dtype)
    y, mean, rstd = aten.native_layer_norm(s, s.shape[1:], w, b, epsilon)
    statistics = torch.promote_types(s.dtype, torch.float32)  # the CPU gives those of bf16 in bf16
    if mean.dtype != statistics:
        _, mean, rstd = aten.native_layer_norm(s.to(statistics), s.shape[1:], None, None, epsilon)
    return y.to(dtype), s if residual is not None else x.new_empty(0), mean[:, 0], rstd[:, 0]


def layer_norm_bwd(dy, ds, s, weight, mean, rstd, dtype, x_bias):
    wide = mean.dtype
    dx, dweight, dbias = aten.native_layer_norm_backward(
        dy.to(wide), s.to(wide), s.shape[1:], mean[:, None], rstd[:, None], weight.to(wide), weight.to(wide),
        [True, True, True])
    dx = dx if ds is None else dx + ds
    dresidual = dx.to(s.dtype) if dtype != s.dtype else dx.new_empty(0, dtype=s.dtype)
    dx_bias = dx.sum(0, dtype=wide) if x_bias else dx.new_empty(0, dtype=wide)
    return dx.to(dtype), dresidual, dweight.to(weight.dtype), dbias.to(weight.dtype), dx_bias


def adamw_(p, g, exp_avg, exp_avg_sq, scale, rates, step, learning_rate, beta1, beta2, epsilon, weight_decay):
    g = g if scale is None else g * scale
    skipped = None if scale is None else (~scale.isfinite()).to(torch.float32)
    torch._fused_adamw_(
        [p], [g], [exp_avg], [exp_avg_sq], [], [torch.tensor(float(step), device=p.device)], lr=learning_rate,
        beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=epsilon, amsgrad=False, maximize=False,
        found_inf=skipped,
    )


def grad_norm(g):
    return torch.linalg.vector_norm(g, dtype=torch.float64).to(g.dtype)  # in fp32 it loses digits over millions


def _bottom_right_mask(q, k):
    """What is added to the scores where T < S: fp (T, S), 0 where query t sees key s ≤ t + S - T."""
    T, S = q.shape[1], k.shape[1]
    hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
    return torch.zeros(T, S, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))


def _kernel(q, k):
    """The fused attention of torch that serves q (B, T, H, D) and k: "cpu", "cudnn", "flash" or "efficient"."""
    if q.device.type != "cuda":
        return "cpu"
    if q.dtype == torch.float32:
        return "efficient"
    modern = torch.cuda.get_device_capability(q.device) >= (9, 0)
    several = q.shape[1] > 1 and k.shape[1] > 1  # cuDNN refuses sequences of one
    return "cudnn" if modern and several and q.shape[-1] <= 128 and torch.backends.cudnn.enabled else "flash"


def _aligned(*tensors):
    """The tensors, or copies where a GPU's kernels could not read 16 bytes at a time."""
    def fits(tensor):
        rows = (stride * tensor.element_size() for stride in tensor.stride()[:-1])
        return tensor.data_ptr() % 16 == 0 and all(row % 16 == 0 for row in rows)

    return [t if t.device.type == "cpu" or fits(t) else t.clone(memory_format=torch.contiguous_format) for t in tensors]


def _serves(q, k, causal, scale):
    """Whether torch has a fused kernel, which hides keys before the scale; otherwise its composition serves."""
    if 0 in q.shape or 0 in k.shape or q.device.type not in ("cpu", "cuda") or not scale > 0:
        return False
    if q.device.type == "cpu":
        return True
    square = not causal or q.shape[1] == k.shape[1]
    return square and q.shape[-1] % 8 == 0 and q.dtype != torch.float64


def _split(q, k, causal):
    """(rows, is_causal, mask): the first `rows` queries see no key; how torch masks the others."""
    T, S = q.shape[1], k.shape[1]
    if causal == 1 and T < S:
        return 0, False, _bottom_right_mask(q, k)
    return (T - S if causal == 1 else 0), bool(causal), None


def attention_fwd(q, k, v, causal, scale, dropout, seed):
    if not _serves(q, k, causal, scale):
        return reference.attention_fwd(q, k, v, causal, scale, dropout, seed)
    q, k, v = _aligned(q, k, v)
    blind, is_causal, mask = _split(q, k, causal)
    qh, kh, vh = q[:, blind:].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T or S, D)
    kernel = _kernel(q, k)
    if kernel == "cpu":
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            qh, kh, vh, 0.0, is_causal, attn_mask=mask, scale=scale
        )
    elif kernel == "cudnn":
        o, lse = aten._scaled_dot_product_cudnn_attention(qh, kh, vh, None, True, 0.0, is_causal, scale=scale)[:2]
    elif kernel == "flash":
        o, lse = aten._scaled_dot_product_flash_attention(qh, kh, vh, 0.0, is_causal, scale=scale)[:2]
    else:
        o, lse = aten._scaled_dot_product_efficient_attention(qh, kh, vh, None, True, 0.0, is_causal, scale=scale)[:2]
    o, lse = o.transpose(1, 2), lse.reshape(*lse.shape[:2], -1)[..., : q.shape[1] - blind]
    if blind:
        o, lse = F.pad(o, (0, 0, 0, 0, blind, 0)), F.pad(lse, (blind, 0), value=float("-inf"))
    return o.contiguous(), lse.contiguous()


def attention_bwd(do, q, k, v, o, lse, causal, scale, dropout, seed):
    if not _serves(q, k, causal, scale):
        return reference.attention_bwd(do, q, k, v, o, lse, causal, scale, dropout, seed)
    do, q, k, v, o = _aligned(do, q, k, v, o)
    blind, is_causal, mask = _split(q, k, causal)
    doh, qh, oh = (tensor[:, blind:].transpose(1, 2) for tensor in (do, q, o))
    kh, vh, lse = k.transpose(1, 2), v.transpose(1, 2), lse[..., blind:].contiguous()
    T, S = qh.shape[2], kh.shape[2]
    kernel = _kernel(q, k)
    if kernel == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            doh, qh, kh, vh, oh, lse, 0.0, is_causal, attn_mask=mask, scale=scale
        )
    else:
        unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the random state of a dropout that is off
        if kernel == "cudnn":
            grads = aten._scaled_dot_product_cudnn_attention_backward(
                doh, qh, kh, vh, oh, lse[..., None], unused, unused, None, None, None, T, S, 0.0, is_causal, scale=scale
            )
        elif kernel == "flash":
            grads = aten._scaled_dot_product_flash_attention_backward(
                doh, qh, kh, vh, oh, lse, None, None, T, S, 0.0, is_causal, unused, unused, scale=scale
            )
        else:
            lse = F.pad(lse, (0, -T % 32), value=float("inf"))  # the kernel reads whole tiles of 32 queries
            grads = aten._scaled_dot_product_efficient_attention_backward(
                doh, qh, kh, vh, None, oh, lse, unused, unused, 0.0, (True, True, True, False), is_causal, scale=scale
            )[:3]
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    if blind:
        dq = F.pad(dq, (0, 0, 0, 0, blind, 0))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def attention_qkv_fwd(qkv, causal, scale, dropout, seed):
    return attention_fwd(*qkv.unbind(2), causal, scale, dropout, seed)


def attention_qkv_bwd(do, qkv, o, lse, causal, scale, dropout, seed):
    return torch.stack(attention_bwd(do, *qkv.unbind(2), o, lse, causal, scale, dropout, seed), dim=2)


def decode_attention(q, k_pages, v_pages, block_table, lengths, scale):
    B, T, H, D = q.shape
    if not q.numel():
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    pages, page = block_table.clamp(0, max(k_pages.shape[0] - 1, 0)).long(), k_pages.shape[1]
    k = k_pages[pages].reshape(B, -1, H, D).transpose(1, 2)  # (B, H, max_pages · page, D)
    v = v_pages[pages].reshape(B, -1, H, D).transpose(1, 2)
    s = torch.arange(pages.shape[1] * page, device=q.device)
    last = lengths[:, None] - T + torch.arange(T, device=q.device)  # (B, T), the newest position each query sees
    seen = (s <= last[..., None])[:, None]  # (B, 1, T, S)
    v = v.masked_fill((s >= lengths[:, None])[:, None, :, None], 0.0)  # what was never written may be NaN
    k = k.masked_fill((s >= lengths[:, None])[:, None, :, None], 0.0)
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen, scale=scale)
    return o.masked_fill(~seen.any(-1, keepdim=True), 0.0).transpose(1, 2).contiguous()


def cache_append_(k_pages, v_pages, k, v, block_table, positions):
    page, (H, D) = k_pages.shape[1], k_pages.shape[2:]
    if not positions.numel():
        return
    keep = (positions >= 0).flatten()
    position = positions.clamp(min=0).long()
    pages = block_table.gather(1, position // page).long().flatten()
    rows = (position % page).flatten()
    # What is not kept repeats one write that is: no device value is read on the host, and equal writes may race.
    first = keep.int().argmax(dim=0, keepdim=True)
    source = torch.where(keep, torch.arange(keep.numel(), device=keep.device), first)
    any_kept = keep.any()
    at = torch.where(any_kept, pages[source], 0), torch.where(any_kept, rows[source], 0)
    for cache, new in ((k_pages, k), (v_pages, v)):
        old = cache[0, 0]  # (H, D)
        cache[at] = torch.where(any_kept, new.reshape(-1, H, D)[source], old)
