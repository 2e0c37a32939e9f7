"""`fastlm demo`: a small GPT-2, trained on the source of Python's standard library."""

from pathlib import Path
from typing import Annotated

import typer

SECONDS = 80  # of training; the whole demo takes a little longer


def demo(
    out: Annotated[Path, typer.Option(help="Directory of the run; replaced if an earlier demo made it.")] = Path(
        "runs/demo"
    ),
    seconds: Annotated[int, typer.Option(help="How long to train.")] = SECONDS,
):
    """Train a small GPT-2 on Python's own source in one to two minutes, and see what it learned."""
    import json
    import shutil
    import time

    from fastlm.cli.train import finished
    from fastlm.data.prepare import prepare
    from fastlm.training.bigram import bigram_loss
    from fastlm.training.config import TrainConfig, read_settings
    from fastlm.training.curve import draw, save_png
    from fastlm.training.metrics import read_metrics
    from fastlm.training.report import Terminal
    from fastlm.training.sample import sample
    from fastlm.training.trainer import Trainer

    if seconds < 5:
        raise ValueError(f"--seconds is {seconds}, wanted at least 5")
    began = time.perf_counter()
    report = Terminal()
    source = _standard_library()
    if out.exists():
        if not (out / "demo.json").is_file():
            raise ValueError(f"{out}: exists and was not made by `fastlm demo`; pass another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / "demo.json").write_text('{"made_by": "fastlm demo"}\n', encoding="utf-8")

    report.say(f"training a small GPT-2 on {len(source)} files of Python's standard library")
    settings = read_settings(preset="small", data=str(out / "data"), out=str(out))
    manifest = prepare(
        source, out / "data", tokenizer="bpe", vocab_size=settings["vocab_size"], val_fraction=0.03,
        progress=report.preparing,
    )
    report.prepared(manifest)
    steps = _steps_within(seconds, settings, report)
    changes = {"steps": steps, "warmup_steps": max(1, steps // 20), "eval_every": -(-steps // 10),
               "save_every": steps, "sample_prompt": "def ", "sample_tokens": 100}
    trainer = Trainer(TrainConfig(**{**settings, **changes}), listeners=[report], into=True)
    if not finished(trainer):
        return
    rows = read_metrics(out / "metrics.jsonl")
    splits = [next(iter(loader.shards.values())) for loader in (trainer.train_data, trainer.val_data)]
    bigram = bigram_loss(*splits, trainer.tokenizer.vocab_size)
    before, after = rows[0]["val_loss"], rows[-1]["val_loss"]
    save_png(rows, out / "loss.png", baselines={"bigram model": bigram}, title="GPT-2 on Python's standard library")
    report.say("\n" + draw(rows, baselines={"bigram model": bigram}))
    report.say(f"\nwhat it writes after 'def ':\n\n{sample(trainer)}\n")
    result = {
        "made_by": "fastlm demo", "held_out_before": before, "held_out_after": after, "held_out_bigram": bigram,
        "steps": steps, "seconds": round(time.perf_counter() - began, 1), "backends": trainer.state.backends,
    }
    (out / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    report.say(
        f"held-out loss, nats per token: {before:.3f} before, {after:.3f} after, {bigram:.3f} for a bigram model "
        f"of the same text; {result['seconds']:.0f} s in all"
    )
    if after >= bigram:
        raise RuntimeError(
            f"the model's loss of {after:.3f} is no better than the bigram model's {bigram:.3f}: something is wrong "
            "(or --seconds was too short); see `fastlm doctor`"
        )
    report.say(
        f"\n{out} is a model directory that Hugging Face loads; {out / 'loss.png'} shows its curve. Next:\n"
        f"  fastlm generate --model {out} --prompt 'import ' --temperature 0.8\n"
        f"  fastlm train --preset small --data YOUR_TEXT --out runs/mine\n"
        "  fastlm doctor"
    )


def _standard_library():
    """The Python files of the standard library's own folder, without its packages."""
    import sysconfig

    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    if not files:
        raise ValueError(f"{folder}: holds no Python source here; use `fastlm train --preset small --data TEXT`")
    return files


def _steps_within(seconds, settings, report):
    """How many steps fit into `seconds` here, by a short trial of an untrained model."""
    import time

    import torch

    from fastlm.gpt2 import GPT2, GPT2Config
    from fastlm.training.config import TrainConfig
    from fastlm.training.optimizer import AdamW

    config = TrainConfig(**settings)
    model = GPT2(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.sequence_length, n_embd=config.n_embd,
        n_layer=config.n_layer, n_head=config.n_head,
    ))
    optimizer = AdamW(model, config)
    tokens = torch.randint(config.vocab_size, (config.batch_size, config.sequence_length))
    times = []
    for _ in range(13):
        clock = time.perf_counter()
        model.loss(tokens, tokens).backward()
        optimizer.step(*optimizer.gradients(), learning_rate=0.0)
        optimizer.zero_grad()
        times.append(time.perf_counter() - clock)
    return max(60, int(seconds * 0.9 / sorted(times)[3]))  # a tenth goes to evaluation; the slow ones were disturbed
