"""--device of every command."""


def device_of(wanted):
    """cpu or cuda, for auto, cpu or cuda. ValueError for another word, or where there is no GPU."""
    import torch

    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device is {wanted!r}, wanted auto, cpu or cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but this machine has no CUDA GPU that torch can use")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
