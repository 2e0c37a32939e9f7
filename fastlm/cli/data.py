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
    paths: Annotated[list[Path], typer.Argument(help="Text files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Directory to write: shards, tokenizer, manifest.json.")],
    tokenizer: Annotated[str, typer.Option(help="bpe, bytes, chars, or a directory or tokenizer.json.")] = "bpe",
    vocab_size: Annotated[int | None, typer.Option(help="Size of a trained bpe vocabulary [8192].")] = None,
    val_fraction: Annotated[float, typer.Option(help="The last part of the text, held out.")] = 0.1,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it was made by this command.")] = False,
):
    """Tokenise text files or folders into train and val shards (llm.c's .bin format)."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    from fastlm.data.prepare import prepare

    with Progress("{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("tokenising", total=None)
        manifest = prepare(
            paths, out, tokenizer=tokenizer, vocab_size=vocab_size, val_fraction=val_fraction, overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    show(manifest, out)


def show(manifest, out):
    """Prints what was prepared as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    tokens = manifest["train_tokens"] + manifest["val_tokens"]
    skipped = f" ({manifest['skipped_files']} skipped)" if manifest["skipped_files"] else ""
    table.add_row("files", f"{manifest['files']:,}{skipped}")
    table.add_row("characters", f"{manifest['characters']:,}")
    table.add_row("vocabulary", f"{manifest['vocab_size']:,} ({manifest['tokenizer']})")
    table.add_row("train", f"{manifest['train_tokens']:,} tokens in {manifest['train_shards']} shards")
    table.add_row("val", f"{manifest['val_tokens']:,} tokens in {manifest['val_shards']} shards")
    table.add_row("characters a token", f"{manifest['characters'] / tokens:.2f}")
    table.add_row("written to", str(out))
    Console().print(table)
