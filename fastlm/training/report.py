"""What a training run shows in a terminal: bars while it works, a line per evaluation."""

import os
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fastlm.training.listener import Listener
from fastlm.training.step import lacks


class Terminal(Listener):
    """Shows a run: progress bar with loss, tokens/s and time left, and every evaluation."""

    def __init__(self, console=None):
        self.console = console or Console(file=Lasting())
        self._bar = self._task = None
        self._shown = self._shown_step = 0

    def say(self, text):
        self.console.print(text, highlight=False, soft_wrap=True)

    def preparing(self, done, total):
        if self._bar is None:
            self._open("tokenising", total)
        self._bar.update(self._task, completed=done)

    def prepared(self, manifest):
        self._close()
        self.say(
            f"{manifest['characters']:,} characters: {manifest['train_tokens']:,} tokens to train on and "
            f"{manifest['val_tokens']:,} held out, vocabulary {manifest['vocab_size']:,}"
        )

    def started(self, trainer):
        parameters = sum(parameter.numel() for parameter in trainer.state.model.parameters())
        ran = ", ".join(f"{op} on {backend}" for op, backend in sorted(trainer.state.backends.items()))
        config, fast = trainer.config, trainer.state.model.residual is not None
        dtype = "fp32" if lacks(config.dtype, trainer.device.type) else config.dtype
        told = f"products in {dtype}{' without TF32' if dtype == 'fp32' and trainer.device.type == 'cuda' else ''}"
        told += ", sums through the blocks in bf16" if fast else ""
        told += ", blocks computed again in the backward" if config.recompute else ""
        self.say(f"{parameters / 1e6:.2f} M parameters in fp32 on {trainer.device}, {told}; {ran}")
        self._open("training", trainer.config.steps, "loss {task.fields[loss]} · {task.fields[rate]} tokens/s")
        self._shown, self._shown_step = time.perf_counter(), trainer.state.step

    def stepped(self, trainer, loss):
        now = time.perf_counter()
        if now - self._shown < 0.25 and trainer.state.step < trainer.config.steps:
            return
        tokens = (trainer.state.step - self._shown_step) * trainer.config.batch_size * trainer.config.sequence_length
        rate = f"{tokens / (now - self._shown):,.0f}"
        self._bar.update(self._task, completed=trainer.state.step, loss=f"{loss:.3f}", rate=rate)
        self._shown, self._shown_step = now, trainer.state.step

    def evaluated(self, trainer, row):
        rate = f", {row['tokens_per_second']:,.0f} tokens/s" if row["tokens_per_second"] else ""
        held_out = "" if row["val_loss"] is None else f", held out {row['val_loss']:.3f}"
        self.say(f"step {row['step']:>6}: training {row['train_loss']:.3f}{held_out}{rate}")
        self._shown, self._shown_step = time.perf_counter(), trainer.state.step

    def finished(self, trainer):
        self._close()

    def _open(self, title, total, *more):
        columns = [TextColumn(column) for column in (f"{title:10}", *more)]
        self._bar = Progress(
            columns[0], BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), *columns[1:], console=self.console
        )
        self._task = self._bar.add_task(title, total=total, loss="…", rate="…")
        self._bar.start()

    def _close(self):
        if self._bar is not None:
            self._bar.stop()
        self._bar = None


class Lasting:
    """Standard output, in silence from where nobody hears it any more: its terminal hung up, or its reader left.

    A run does not end for that.
    """

    def __getattr__(self, name):
        return getattr(self._file, name)

    @property
    def _file(self):
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # bars put a file of theirs in its place

    def write(self, text):
        return self._lasting(self._file.write, text)

    def flush(self):
        self._lasting(self._file.flush)

    def _lasting(self, function, *arguments):
        try:
            return function(*arguments)
        except OSError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._file.fileno())  # what is still held back goes there too
            os.close(nothing)
