"""gpt2_blocks made of a backend's other ops and PyTorch's products: `torch_` and `reference_` have its functions.

What forward returns behind y, and backward takes, is that of csrc/fastlm.h, Gpt2BlocksFwd, in its order.
"""

import torch

from fastlm.backends import reference, vendor


class Composed:
    """The functions of gpt2_blocks over those of `ops`: layer_norm, attention_qkv and bias_gelu."""

    def __init__(self, ops):
        self.ops = ops

    def gpt2_blocks_fwd(self, x, weights, heads, epsilon):
        inputs, kept = [x.view(-1, x.shape[-1])], []
        for first in range(0, len(weights), 12):
            y, *one = self._forward(inputs[-1], weights[first : first + 12], x.shape, heads, epsilon)
            inputs.append(y)
            kept.append(one)
        between = torch.stack(inputs[1:-1]) if len(inputs) > 2 else x.new_empty(0, *inputs[0].shape)
        return inputs[-1].view(x.shape), between, *(torch.stack(parts) for parts in zip(*kept))

    def gpt2_blocks_bwd(self, dy, x, saved, weights, heads):
        between, *kept = saved
        inputs, dy, gradients = [x.view(-1, x.shape[-1]), *between], dy.view(-1, x.shape[-1]), []
        for layer in reversed(range(len(inputs))):
            one, parts = [part[layer] for part in kept], weights[12 * layer : 12 * layer + 12]
            dy, found = self._backward(dy, inputs[layer], one, parts, x.shape, heads)
            gradients = found + gradients
        return dy.view(x.shape), torch.cat([gradient.reshape(-1) for gradient in gradients])

    def _forward(self, x, weights, shape, heads, epsilon):
        ln_1_w, ln_1_b, qkv_w, qkv_b, proj_w, proj_b, ln_2_w, ln_2_b, up_w, up_b, down_w, down_b = weights
        B, T, C = shape
        h1, _, *statistics = self.ops.layer_norm_fwd(x, None, None, ln_1_w, ln_1_b, epsilon, x.dtype)
        qkv = torch.addmm(qkv_b, h1, qkv_w)
        o, lse = self.ops.attention_qkv_fwd(qkv.view(B, T, 3, heads, C // heads), 1, (C // heads) ** -0.5, 0.0, None)
        o = o.reshape(-1, C)
        s = x + torch.addmm(proj_b, o, proj_w)
        h2, _, *more = self.ops.layer_norm_fwd(s, None, None, ln_2_w, ln_2_b, epsilon, x.dtype)
        u = torch.addmm(up_b, h2, up_w)
        g = self.ops.bias_gelu_fwd(u, torch.zeros_like(up_b))
        slope, _ = self.ops.bias_gelu_bwd(torch.ones_like(u), u, torch.zeros_like(up_b))
        return s + torch.addmm(down_b, g, down_w), h1, qkv, o, lse, s, h2, slope, g, torch.stack([*statistics, *more])

    def _backward(self, dy, x, saved, weights, shape, heads):
        ln_1_w, _, qkv_w, _, proj_w, _, ln_2_w, _, up_w, _, down_w, _ = weights
        h1, qkv, o, lse, s, h2, slope, g, (mean_1, rstd_1, mean_2, rstd_2) = saved
        B, T, C = shape
        parts, D = (B, T, heads, C // heads), C // heads
        du = (dy @ down_w.t()) * slope
        ds, _, *d_ln_2, _ = self.ops.layer_norm_bwd(du @ up_w.t(), dy, s, ln_2_w, mean_2, rstd_2, x.dtype, False)
        do = (ds @ proj_w.t()).view(parts)
        dqkv = self.ops.attention_qkv_bwd(do, qkv.view(B, T, 3, heads, D), o.view(parts), lse, 1, D**-0.5, 0.0, None)
        dqkv = dqkv.reshape(-1, 3 * C)
        dx, _, *d_ln_1, _ = self.ops.layer_norm_bwd(dqkv @ qkv_w.t(), ds, x, ln_1_w, mean_1, rstd_1, x.dtype, False)
        return dx, [*d_ln_1, h1.t() @ dqkv, dqkv.sum(0), o.t() @ ds, ds.sum(0),
                    *d_ln_2, h2.t() @ du, du.sum(0), g.t() @ dy, dy.sum(0)]


torch_, reference_ = Composed(vendor), Composed(reference)
