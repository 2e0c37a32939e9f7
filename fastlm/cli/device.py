"""What commands that run kernels share: --device, and what is told of a kernel that raises."""

import contextlib

import typer


def device_of(wanted):
    """cpu or cuda, for auto, cpu or cuda. ValueError for another word, or where there is no GPU."""
    import torch

    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device is {wanted!r}, wanted auto, cpu or cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but this machine has no CUDA GPU that torch can use")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


@contextlib.contextmanager
def failing(what):
    """Ends the command with one line and exit code 1 where a kernel of ours raises within; a refusal goes on up."""
    from rich.console import Console

    from fastlm.dispatch.refusal import Refused, failure

    try:
        yield
    except (Refused, typer.Exit):
        raise
    except Exception as error:
        Console().print(f"{what} FAILED: {failure(error)}", style="bold red", markup=False, highlight=False,
                        soft_wrap=True)
        raise typer.Exit(1) from None
