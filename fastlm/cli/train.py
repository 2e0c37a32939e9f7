"""`fastlm train`: trains a GPT-2 on shards or straight on text."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    data: Annotated[str | None, typer.Option(help="Prepared shards, or a text file or folder.")] = None,
    out: Annotated[str | None, typer.Option(help="Directory of the run; afterwards a model directory.")] = None,
    preset: Annotated[str | None, typer.Option(help="shakespeare-char, small or gpt2.")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file of settings.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting, key=value; may be repeated.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
):
    """Train a GPT-2. Ctrl-C and signals save; --resume goes on, bit for bit."""
    from fastlm.training.config import TrainConfig, read_settings
    from fastlm.training.curve import Curve
    from fastlm.training.report import Terminal
    from fastlm.training.sample import Sample
    from fastlm.training.trainer import Trainer

    values = read_settings(preset=preset, file=config, settings=settings or (), data=data, out=out)
    asked = set(values) & set(read_settings(file=config, settings=settings or (), data=data, out=out))
    listeners = Terminal(), Curve(), Sample()
    if resume:
        if "out" not in values:
            raise ValueError("--resume needs --out, the directory of the run")
        trainer = Trainer.resume(values.pop("out"), listeners=listeners, asked=asked, **values)
    else:
        trainer = Trainer(TrainConfig(**values), listeners=listeners, asked=asked)
    if finished(trainer):
        trainer.tell("say", f"try: fastlm generate --model {trainer.out} --prompt 'Once'")


def finished(trainer):
    """Runs to the end, or until Ctrl-C: whether it was reached. Ends the command with 128 and the number of a signal of
    others (143 for SIGTERM), so that a scheduler does not take the run for finished.
    """
    import signal

    if not trainer.run() and trainer.stopped not in (None, signal.SIGINT):
        raise typer.Exit(128 + trainer.stopped)
    return trainer.done
