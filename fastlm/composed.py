"""gpt2_block made of a backend's other ops and PyTorch's products: `torch_` and `reference_` have its functions.

What forward returns behind y, and backward takes, is (csrc/fastlm.h, Gpt2BlockFwd): h1, qkv, o, lse, s, h2, u, g with
rows for the B · T tokens, and the statistics (4, B · T) of the two norms.
"""

import torch

from fastlm import reference, vendor


class Composed:
    """The functions of gpt2_block over those of `ops`: layer_norm, attention_qkv and bias_gelu."""

    def __init__(self, ops):
        self.ops = ops

    def gpt2_block_fwd(self, x, weights, heads, epsilon):
        ln_1_w, ln_1_b, qkv_w, qkv_b, proj_w, proj_b, ln_2_w, ln_2_b, up_w, up_b, down_w, down_b = weights
        (B, T, C), rows = x.shape, x.view(-1, x.shape[-1])
        h1, _, *statistics = self.ops.layer_norm_fwd(rows, None, ln_1_w, ln_1_b, epsilon, x.dtype)
        qkv = torch.addmm(qkv_b, h1, qkv_w)
        o, lse = self.ops.attention_qkv_fwd(qkv.view(B, T, 3, heads, -1), 1, (C // heads) ** -0.5, 0.0, None)
        o = o.reshape(-1, C)
        s = rows + torch.addmm(proj_b, o, proj_w)
        h2, _, *more = self.ops.layer_norm_fwd(s, None, ln_2_w, ln_2_b, epsilon, x.dtype)
        u = torch.addmm(up_b, h2, up_w)
        g = self.ops.bias_gelu_fwd(u, torch.zeros_like(up_b))
        y = s + torch.addmm(down_b, g, down_w)
        return y.view(x.shape), h1, qkv, o, lse, s, h2, u, g, torch.stack([*statistics, *more])

    def gpt2_block_bwd(self, dy, x, saved, weights, heads):
        ln_1_w, _, qkv_w, _, proj_w, _, ln_2_w, _, up_w, up_b, down_w, _ = weights
        h1, qkv, o, lse, s, h2, u, g, statistics = saved
        (B, T, C), (mean_1, rstd_1, mean_2, rstd_2) = x.shape, statistics
        shape = (B, T, heads, -1)
        dy, x = dy.view(-1, C), x.view(-1, C)
        du, _ = self.ops.bias_gelu_bwd(dy @ down_w.t(), u, torch.zeros_like(up_b))
        ds, _, *d_ln_2 = self.ops.layer_norm_bwd(du @ up_w.t(), dy, s, ln_2_w, mean_2, rstd_2, x.dtype)
        do = (ds @ proj_w.t()).view(shape)
        dqkv = self.ops.attention_qkv_bwd(do, qkv.view(B, T, 3, heads, -1), o.view(shape), lse, 1,
                                          (C // heads) ** -0.5, 0.0, None).reshape(-1, 3 * C)
        dx, _, *d_ln_1 = self.ops.layer_norm_bwd(dqkv @ qkv_w.t(), ds, x, ln_1_w, mean_1, rstd_1, x.dtype)
        gradients = [*d_ln_1, h1.t() @ dqkv, dqkv.sum(0), o.t() @ ds, ds.sum(0),
                     *d_ln_2, h2.t() @ du, du.sum(0), g.t() @ dy, dy.sum(0)]
        return dx.view(B, T, C), torch.cat([gradient.reshape(-1) for gradient in gradients])


torch_, reference_ = Composed(vendor), Composed(reference)
