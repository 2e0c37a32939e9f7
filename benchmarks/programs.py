"""What the two programs, generation and training, share: the same GPT-2 in fastlm and in transformers, and costs."""

import importlib.util

import torch

import fastlm

MODEL = {"L": 12, "H": 12, "C": 768, "V": 50257}  # GPT-2 124M


def absent():
    """peer → the sentence why it does not take part."""
    if importlib.util.find_spec("transformers") is None:
        return {"transformers": "not installed: pip install transformers"}
    return {}


def pair(shape, positions, device):
    """(our GPT2, transformers' GPT2LMHeadModel or None): the same random weights in fp32, no dropout."""
    torch.manual_seed(0)
    off = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    config = fastlm.GPT2Config(
        vocab_size=shape["V"], n_positions=positions, n_embd=shape["C"], n_layer=shape["L"], n_head=shape["H"],
        bos_token_id=None, eos_token_id=None, **off,
    )
    ours = fastlm.GPT2(config).to(device)
    if absent():
        return ours, None
    import transformers

    values = {key: value for key, value in config.dump().items() if key != "dtype"}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**values)).to(device)
    theirs.load_state_dict(ours.state_dict())
    theirs.generation_config.pad_token_id = 0
    return ours, theirs


def weights(shape):
    """Parameters that multiply something for every token: the blocks and the head, not the positions."""
    L, C, V = shape["L"], shape["C"], shape["V"]
    return L * (12 * C * C + 13 * C) + V * C + 2 * C


def check_sizes(name, shape):
    """Raises ValueError unless H divides C."""
    if shape["C"] % shape["H"]:
        raise ValueError(f"{name}: C={shape['C']} is no multiple of H={shape['H']}")


def peak_bytes(call, device):
    """The most GPU memory that a call takes beyond what is held before it; None on the CPU, whose heap is reused."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def norm_ratio(got, composed, truth, dtype):
    """Error over allowed by tensor norm, where rounding adds up over layers: 4 × the composition's + 8 units."""
    error, theirs = (float((x.double() - truth).norm()) for x in (got, composed))
    return error / (4 * theirs + 8 * torch.finfo(dtype).eps * float(truth.norm()))
