"""`fastlm convert`: a model with int8 or int4 weights, and what that costs in perplexity."""

from pathlib import Path
from typing import Annotated

import typer

MOST = 16384  # tokens that the perplexity is measured on


def convert(
    model: Annotated[str, typer.Option(help="A model directory, or a hub id such as gpt2.")],
    dtype: Annotated[str, typer.Option(help="int8 or int4.")],
    out: Annotated[Path, typer.Option(help="The new model directory.")],
    text: Annotated[Path, typer.Option(help="A text on which the perplexity is measured, before and after.")],
    tokenizer: Annotated[str | None, typer.Option(help="Its directory, where the model's has none.")] = None,
):
    """Quantise a model's weights; generation on a CPU then reads a quarter or an eighth of the bytes."""
    from rich.console import Console
    from rich.progress import Progress

    from fastlm.data.text import read
    from fastlm.data.tokenizer import Tokenizer
    from fastlm.generation.perplexity import perplexity
    from fastlm.gpt2 import GPT2
    from fastlm.pretrained import find, save_quantised
    from fastlm.quantised import KINDS, quantise_

    if dtype not in KINDS:
        raise ValueError(f"--dtype is {dtype!r}, wanted {' or '.join(KINDS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} exists; pass another, or remove it")
    directory = find(model)
    try:
        vocabulary = Tokenizer.load(tokenizer or directory)
    except ValueError as error:
        raise ValueError(f"{error}; pass a tokenizer's directory with --tokenizer") from None
    try:
        ids = vocabulary.encode(read(text))[:MOST]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text: {text} cannot be read ({error})") from None
    gpt2 = GPT2.from_pretrained(directory)
    if gpt2.quantised:
        raise ValueError(f"--model: {directory} is {gpt2.quantised} already; convert the model that it came from")
    found = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for when in ("before", "after"):
            task = progress.add_task(f"perplexity {when}", total=len(ids))
            if when == "after":
                quantise_(gpt2, dtype)

            def tell(done, total, task=task):
                progress.update(task, completed=done)

            found[when] = perplexity(gpt2, ids, progress=tell)
    notes = {f"perplexity_{when}": f"{value:.4f}" for when, value in found.items()}
    save_quantised(gpt2, out, tokenizer=vocabulary, notes={**notes, "perplexity_tokens": str(len(ids))})
    before, after = found["before"], found["after"]
    size = (out / "model.safetensors").stat().st_size
    print(f"perplexity {before:.3f} before, {after:.3f} after ({after / before - 1:+.2%}), on {len(ids):,} tokens")
    print(f"wrote {out}: {dtype}, {size / 1e6:,.0f} MB; fastlm generate --model {out} takes it")
