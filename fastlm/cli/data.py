"""`fastlm data`: text to token shards."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Turn text into token shards.", no_args_is_help=True)


@app.callback()
def data():
    """Turn text into token shards."""


@app.command("prepare")
def prepare(
    paths: Annotated[list[Path], typer.Argument(help="Text files, or folders of them.", metavar="PATH...")],
    out: Annotated[Path, typer.Option(help="Directory to write: shards, tokenizer, manifest.json.")],
    tokenizer: Annotated[
        str, typer.Option(help="bpe (trained on the text), bytes, chars, a directory, or a hub id.")
    ] = "bpe",
    vocab_size: Annotated[
        int | None, typer.Option(help="Tokens of a vocabulary that is trained.", show_default="8192")
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="How much of the end is held out.")] = 0.1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what this made there.")] = False,
):
    """Tokenise text files or folders into train and val shards (llm.c's .bin format)."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from fastlm.data.prepare import prepare

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    learned = (1 - val_fraction) / (2 - val_fraction) if tokenizer == "bpe" else 0  # of all, when a vocabulary is

    def show_progress(done, total):
        what = "learning a vocabulary" if done <= learned * total + 1 else "tokenising"
        bar.update(task, description=what, completed=done, total=total)

    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        manifest = prepare(
            paths, out, tokenizer=tokenizer, vocab_size=vocab_size, val_fraction=val_fraction,
            overwrite=overwrite, progress=show_progress,
        )
    show(manifest, out)


def show(manifest, out):
    """Prints what was prepared as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    tokens = manifest["train_tokens"] + manifest["val_tokens"]
    skipped = f" ({manifest['skipped_files']} without text skipped)" if manifest["skipped_files"] else ""
    table.add_row("files", f"{manifest['files']:,}{skipped}")
    table.add_row("characters", f"{manifest['characters']:,}")
    table.add_row("vocabulary", f"{manifest['vocab_size']:,} ({manifest['tokenizer']})")
    for split in ("train", "val"):
        shards = manifest[f"{split}_shards"]
        table.add_row(split, f"{manifest[f'{split}_tokens']:,} tokens in {shards} shard{'s' * (shards != 1)}")
    table.add_row("characters per token", f"{manifest['characters'] / tokens:.2f}")
    console = Console()
    console.print(table)
    console.print(f"written to {out}", soft_wrap=True, markup=False, highlight=False)
