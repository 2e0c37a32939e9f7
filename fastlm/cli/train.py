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
    """Train a GPT-2. Ctrl-C saves; --resume goes on, bit for bit."""
    from fastlm.training.config import TrainConfig, read_settings
    from fastlm.training.curve import read_metrics, save_png
    from fastlm.training.report import Terminal
    from fastlm.training.trainer import Trainer

    values = read_settings(preset=preset, file=config, settings=settings or (), data=data, out=out)
    report = Terminal()
    if resume:
        if "out" not in values:
            raise ValueError("--resume needs --out, the directory of the run")
        trainer = Trainer.resume(values.pop("out"), report=report, **values)
    else:
        trainer = Trainer(TrainConfig(**values), report=report)
    if not trainer.run():
        return
    save_png(read_metrics(trainer.out / "metrics.jsonl"), trainer.out / "loss.png", title=str(trainer.out))
    report.say(f"the model, its metrics and loss.png are in {trainer.out}")
    if trainer.config.sample_tokens:
        report.say(f"\na sample:\n\n{sample(trainer)}\n")
    report.say(f"try: fastlm generate --model {trainer.out} --prompt 'Once'")


def sample(trainer):
    """A text that the trained model writes, after the configured prompt or the first held-out words.

    Where the text outgrows the model's context, it goes on from the last half of it.
    """
    import torch

    config, tokenizer = trainer.config, trainer.tokenizer
    if config.sample_prompt is None:
        tokens, _ = next(iter(trainer.val_data.whole(1)))
        text = tokens[0, : max(1, min(8, tokens.shape[1] // 4))]
    else:
        text = torch.tensor(tokenizer.encode(config.sample_prompt))
    context, wanted = trainer.model.config.n_positions, len(text) + config.sample_tokens
    if len(text) >= context:
        raise ValueError(f"sample_prompt has {len(text)} tokens, wanted fewer than the context of {context}")
    while len(text) < wanted:
        given = text if len(text) < context else text[-(context // 2 or 1) :]
        count = min(context - len(given), wanted - len(text))
        if count < 1:
            break
        row = trainer.model.generate(
            [given], max_new_tokens=count, temperature=0.8, top_k=200, seed=config.seed + len(text), stop_at=None
        )[0]
        text = torch.cat([text, row[len(given) :]])
    return tokenizer.decode(text)
