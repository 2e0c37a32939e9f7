"""The activations of an MLP, by the names that a config has for them."""

from torch import nn

from fastlm import fast_path
from fastlm.ops import bias_gelu


@fast_path.plain()
class GELU(nn.Module):
    """In its tanh form, of u, or of u + bias."""

    def forward(self, u, bias=None):
        bias = u.new_zeros(u.shape[-1]) if bias is None else bias
        return bias_gelu(u.reshape(-1, u.shape[-1]), bias).view(u.shape)


KNOWN = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), GELU),  # the last has fewer digits of √(2/π)
    "gelu": nn.GELU, "relu": nn.ReLU, **dict.fromkeys(("silu", "swish"), nn.SiLU), "tanh": nn.Tanh,
}


def activation(name):
    """The module of a config's activation_function."""
    return KNOWN[name]()


def kind(module):
    """The class that does what a module does: GELU's, for torch's in the tanh form."""
    return GELU if type(module) is nn.GELU and module.approximate == "tanh" else type(module)


def name_of(module, usual):
    """The name of a module, `usual` where that is one of its names or none is."""
    same = [name for name in KNOWN if KNOWN[name] is kind(module)]
    return usual if usual in same or not same else same[0]
