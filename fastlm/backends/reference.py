"""The oracle: every op written plainly in PyTorch, in the dtype's own arithmetic with statistics in fp32 or fp64."""

import math

import torch

from fastlm.backends.philox import keep_mask


def softmax_xent_fwd(x, y, ignore):
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    lse, logp = torch.logsumexp(x, dim=1), torch.log_softmax(x, dim=1)
    ignored, inside = y == ignore, (y >= 0) & (y < x.shape[1])
    label = torch.where(inside, y, 0)
    loss = -logp.gather(1, label[:, None])[:, 0] if x.shape[1] else torch.zeros_like(lse)
    return loss.masked_fill(~inside, float("nan")).masked_fill(ignored, 0.0), lse


def softmax_xent_bwd(dloss, x, y, lse, ignore):
    dx = torch.exp(x.to(lse.dtype) - lse[:, None])
    ignored, inside = y == ignore, (y >= 0) & (y < x.shape[1])
    vocab = torch.arange(x.shape[1], device=x.device)
    dx = (dx - (vocab == y[:, None]).to(dx.dtype)) * dloss[:, None]
    dx = dx.masked_fill(~inside[:, None], float("nan")).masked_fill(ignored[:, None], 0.0)
    return dx.to(x.dtype)


def softmax_xent_(x, dloss, y, ignore):
    loss, lse = softmax_xent_fwd(x, y, ignore)
    x.copy_(softmax_xent_bwd(dloss, x, y, lse, ignore))
    return loss, lse


def linear_xent_fwd(h, w, y, ignore):
    return softmax_xent_fwd(h @ w.to(h.dtype).t(), y, ignore)


def linear_xent_bwd(dloss, h, w, y, lse, ignore):
    narrow = w.to(h.dtype)
    dx = softmax_xent_bwd(dloss, h @ narrow.t(), y, lse, ignore)
    return dx @ narrow, (dx.t() @ h).to(w.dtype)


def linear_xent_grad(h, w, y, ignore, factor):
    loss, lse = linear_xent_fwd(h, w, y, ignore)
    if factor is None:
        factor, w = torch.ones_like(loss[:1]).sum(), w.to(torch.promote_types(w.dtype, torch.float32))
    return loss.sum(), *linear_xent_bwd(factor.expand(len(loss)), h, w, y, lse, ignore)


def bias_gelu_fwd(x, bias):
    wide = torch.promote_types(x.dtype, torch.float32)
    u = x.to(wide) + bias.to(wide)
    return (0.5 * u * (1 + torch.tanh(_gelu_argument(u)))).to(x.dtype)


def bias_gelu_bwd(dy, x, bias):
    wide = torch.promote_types(x.dtype, torch.float32)
    u = x.to(wide) + bias.to(wide)
    t = torch.tanh(_gelu_argument(u))
    steep = (2 / math.pi) ** 0.5 * (1 + 3 * 0.044715 * u * u)
    dx = dy.to(wide) * (0.5 * (1 + t) + torch.where(t.abs() == 1, 0.0, 0.5 * u * (1 - t * t) * steep))
    return dx.to(x.dtype), dx.sum(0).to(bias.dtype)


def _gelu_argument(u):
    return (2 / math.pi) ** 0.5 * (u + 0.044715 * u * u * u)


def layer_norm_fwd(x, residual, x_bias, weight, bias, epsilon, dtype):
    s = x if residual is None else x.to(residual.dtype)
    wide = torch.promote_types(s.dtype, torch.float32)
    if residual is not None:
        added = s + residual if x_bias is None else x.to(wide) + x_bias.to(wide) + residual.to(wide)
        s = added.to(residual.dtype)
    s_ = s.to(wide)
    mean = s_.mean(1)
    rstd = 1 / ((s_ - mean[:, None]).square().mean(1) + epsilon).sqrt()
    y = (s_ - mean[:, None]) * rstd[:, None] * weight.to(wide) + bias.to(wide)
    return y.to(dtype), s if residual is not None else x.new_empty(0), mean, rstd


def layer_norm_bwd(dy, ds, s, weight, mean, rstd, dtype, x_bias):
    h = (s.to(mean.dtype) - mean[:, None]) * rstd[:, None]
    dy = dy.to(mean.dtype)
    g = dy * weight.to(mean.dtype)
    dx = (g - g.mean(1, keepdim=True) - h * (g * h).mean(1, keepdim=True)) * rstd[:, None]
    dx = dx if ds is None else dx + ds.to(mean.dtype)
    dresidual = dx.to(s.dtype) if dtype != s.dtype else dx.new_empty(0, dtype=s.dtype)
    dx_bias = dx.sum(0) if x_bias else dx.new_empty(0)
    return dx.to(dtype), dresidual, (dy * h).sum(0).to(weight.dtype), dy.sum(0).to(weight.dtype), dx_bias


def adamw_(p, g, exp_avg, exp_avg_sq, scale, rates, step, learning_rate, beta1, beta2, epsilon, weight_decay):
    taken = torch.tensor(True, device=p.device) if scale is None else scale.isfinite()
    g = g if scale is None else g * scale
    rates = (learning_rate, 1 - beta1**step, 1 - beta2**step) if rates is None else rates
    m = exp_avg + (1 - beta1) * (g - exp_avg)
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    new = p * (1 - rates[0] * weight_decay) - rates[0] * (m / rates[1]) / ((v / rates[2]).sqrt() + epsilon)
    for old, value in ((exp_avg, m), (exp_avg_sq, v), (p, new)):
        old.copy_(torch.where(taken, value, old))


def grad_norm(g):
    return g.square().sum().sqrt()


def _scores(q, k, causal, scale):
    """scale · q kᵀ (B, H, T, S) of q (B, T, H, D), k (B, S, H, D); -inf where a query does not see a key."""
    (_, T, _, _), S = q.shape, k.shape[1]
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if causal:
        t = torch.arange(T, device=q.device)[:, None] + (S - T if causal == 1 else 0)
        scores = scores.masked_fill(torch.arange(S, device=q.device) > t, float("-inf"))
    return scores


def _drop(p, dropout, seed):
    """p with the weights of fastlm's mask dropped and the others scaled up."""
    drop = round(dropout * 256)
    if not drop:
        return p
    return torch.where(keep_mask(seed, *p.shape, drop), p * (256 / (256 - drop)), 0.0)


def attention_fwd(q, k, v, causal, scale, dropout, seed):
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = _scores(q.to(wide), k.to(wide), causal, scale)
    lse = torch.logsumexp(scores, dim=-1)
    p = torch.softmax(scores, dim=-1).masked_fill((lse == float("-inf"))[..., None], 0.0)
    o = torch.einsum("bhts,bshd->bthd", _drop(p, dropout, seed), v.to(wide))
    return o.to(q.dtype).contiguous(), lse


def attention_bwd(do, q, k, v, o, lse, causal, scale, dropout, seed):
    wide = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_, do_ = (tensor.to(wide) for tensor in (q, k, v, do))
    p = torch.exp(_scores(q_, k_, causal, scale) - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    dv = torch.einsum("bhts,bthd->bshd", _drop(p, dropout, seed), do_)
    dp = _drop(torch.einsum("bthd,bshd->bhts", do_, v_), dropout, seed)
    delta = (do_ * o.to(wide)).sum(-1).transpose(1, 2)[..., None]  # (B, H, T, 1)
    ds = p * (dp - delta) * scale
    dq = torch.einsum("bhts,bshd->bthd", ds, k_)
    dk = torch.einsum("bhts,bthd->bshd", ds, q_)
    return tuple(grad.to(q.dtype).contiguous() for grad in (dq, dk, dv))


def attention_qkv_fwd(qkv, causal, scale, dropout, seed):
    return attention_fwd(*qkv.unbind(2), causal, scale, dropout, seed)


def attention_qkv_bwd(do, qkv, o, lse, causal, scale, dropout, seed):
    return torch.stack(attention_bwd(do, *qkv.unbind(2), o, lse, causal, scale, dropout, seed), dim=2)


def decode_attention(q, k_pages, v_pages, block_table, lengths, scale):
    B, T, H, D = q.shape
    page = k_pages.shape[1]
    o = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b, length in enumerate(lengths.tolist()):
        pages = block_table[b, : -(-length // page) if length else 0].long()
        k = k_pages[pages].reshape(1, -1, H, D)[:, :length]
        v = v_pages[pages].reshape(1, -1, H, D)[:, :length]
        o[b : b + 1] = attention_fwd(q[b : b + 1], k, v, 1, scale, 0.0, None)[0]
    return o


def cache_append_(k_pages, v_pages, k, v, block_table, positions):
    page = k_pages.shape[1]
    for b, row in enumerate(positions.tolist()):
        for t, position in enumerate(row):
            if position >= 0:
                at = int(block_table[b, position // page]), position % page
                k_pages[at], v_pages[at] = k[b, t], v[b, t]
