"""Trainer: trains a GPT-2 and can be stopped at any moment.

A run is its State, a Step that changes it, and listeners that are told. A checkpoint holds the whole state, so a run
that was killed and resumed is, bit for bit, the run that was not. OUT is a model directory in Hugging Face's format
from the first checkpoint on.
"""

import contextlib
import functools
import json
import os
import signal
import time
from pathlib import Path

import torch

from fastlm.backends import native
from fastlm.data.disk import naming
from fastlm.dispatch.forcing import use
from fastlm.dispatch.table import TABLE
from fastlm.training import checkpoint
from fastlm.training.config import TrainConfig
from fastlm.training.listener import tell
from fastlm.training.metrics import Metrics
from fastlm.training.optimizer import AdamW, learning_rate
from fastlm.training.setup import find_backends, find_data, find_device, find_dtype, find_loaders, make_model, settled
from fastlm.training.state import State, generators
from fastlm.training.step import Step, autocast, lacks

MOST_SKIPPED = 10  # steps in a row without a finite gradient before the run gives up
EVAL_TOKENS = 8192  # tokens evaluated at a time
NOTICED = 0.5  # seconds of an evaluation that nobody minds


class Trainer:
    """A run. `Trainer(config).run()` trains to the end; `Trainer.resume(out)` goes on where a run stopped.

    config: TrainConfig. listeners: told of the run after metrics.jsonl is. resumed: path of a checkpoint. into: OUT may
    hold other files. asked: the names of the settings that somebody gave, all that the config was made with unless
    given: one that does not fit the data or init_from is refused; another yields to them. Raises ValueError for what is
    wrong with the settings or the data before anything but prepared data is written.
    """

    def __init__(self, config, *, listeners=(), resumed=None, into=False, asked=None):
        self.out, asked = Path(config.out), config.model_fields_set if asked is None else frozenset(asked)
        self.tell = functools.partial(tell, (Metrics(), *listeners))
        taken = self.out.exists() and (not self.out.is_dir() or set(os.listdir(self.out)) - {"data"})
        if taken and resumed is None and not into:
            raise ValueError(f"{self.out}: exists; go on with --resume, or pass another --out")
        self.device = find_device(config.device)
        config = find_dtype(config, self.device)
        if lacks(config.dtype, self.device.type):
            self.tell("say", "this CPU has no bf16 products: they are made in fp32, which is far faster on it")
        again = resumed is not None
        data, self.tokenizer = find_data(config, asked, self.tell, resumed=again)
        self.train_data, self.val_data = find_loaders(config, data, self.tokenizer)
        held_out = 0 if self.val_data is None else self.val_data.targets
        if held_out > (config.eval_tokens or held_out):
            self.tell("say", f"an evaluation reads {config.eval_tokens:,} of {held_out:,} held-out tokens")
        torch.manual_seed(config.seed)
        model = make_model(config, self.tokenizer, asked=asked, resumed=resumed).to(self.device)
        self.config = config = settled(config, model, data)
        model.recomputes = config.recompute
        if config.residual == "bf16" and not lacks(config.dtype, self.device.type):
            model.residual = torch.bfloat16
        for loader in filter(None, (self.train_data, self.val_data)):
            loader.vocab_size = min(loader.vocab_size, model.config.vocab_size)
        self.state = State(model, AdamW(model, config), generators(self.device))
        if resumed is None:
            self.state.backends = find_backends(model, self.state.optimizer, config.dtype)
        else:
            checkpoint.load(resumed, self.state)
            self.tell("resumed", self, resumed)
            self.tell("say", f"resuming {self.out} at step {self.state.step}")
        self.step = Step(model, self.state.optimizer, self.train_data, config)
        self.stopped = None  # by which signal

    @classmethod
    def resume(cls, out, *, listeners=(), asked=None, **changes):
        """The run of directory `out`, from its newest whole checkpoint, with changed settings such as steps."""
        settings = Path(out) / "train.json"
        former, config = TrainConfig.load(settings), TrainConfig.load(settings, **{**changes, "out": str(out)})
        asked = {name for name in (changes if asked is None else asked) if name in changes and name != "out"
                 and getattr(config, name) != getattr(former, name)}
        if "init_from" in asked:
            raise ValueError(f"init_from is {config.init_from!r}, but the run in {out} goes on from its checkpoint; "
                             "leave it out")
        newest = checkpoint.newest(Path(out) / "checkpoints", warn=functools.partial(tell, listeners, "say"))
        return cls(config, listeners=listeners, resumed=newest, asked=asked)

    @property
    def done(self):
        """Whether the last step was taken."""
        return self.state.step >= self.config.steps

    def run(self):
        """Trains to the last step, or until SIGINT, SIGTERM or SIGHUP, which finish the step and save. True at the end;
        `stopped` is the signal where it was not reached.
        """
        config, state = self.config, self.state
        with checkpoint.writing(self.out), naming(self.out / "train.json"):
            self.out.mkdir(parents=True, exist_ok=True)
            config.dump(self.out / "train.json")
        if self.device.type == "cpu":
            native.keep_heap()
        for op, backend in state.backends.items():
            if op in TABLE and (family := TABLE[op].family) != op:
                self.tell("say", f"{family} runs on {state.backends[family]}, but {op} on {backend}")
        with use(**state.backends), self._signals():
            if state.step == 0:
                self._tell_row(self._first_loss(), self.evaluate(), None, None)
            self.tell("started", self)
            clock, clock_step, slow = time.perf_counter(), state.step, False
            while not self.done and self.stopped is None:
                loss, norm = self.train_step()
                self.tell("stepped", self, loss)
                if state.step % config.eval_every == 0 or self.done:
                    elapsed = time.perf_counter() - clock
                    tokens = (state.step - clock_step) * config.batch_size * config.sequence_length
                    mean = state.loss_sum / max(state.loss_steps, 1)
                    val_loss, took = self.evaluate(), time.perf_counter() - clock - elapsed
                    self._tell_row(mean, val_loss, norm, round(tokens / elapsed, 1))
                    if took > max(elapsed, NOTICED) and not slow and not self.done:
                        slow = True
                        self.tell(
                            "say", f"an evaluation takes longer than the {state.step - clock_step} steps between "
                            f"({took:.0f} s, {elapsed:.0f} s); --set eval_tokens=N reads less, eval_every=N is rarer"
                        )
                    state.loss_sum, state.loss_steps = 0.0, 0
                    clock, clock_step = time.perf_counter(), state.step
                if state.step % config.save_every == 0 or self.done:
                    self.save()
            if not self.done:
                self.save()
                self.tell(
                    "say", f"stopped by {self.stopped.name} and saved at step {state.step}; "
                    f"go on with: fastlm train --resume --out {self.out}"
                )
        self.tell("finished", self)
        return self.done

    def train_step(self):
        """Takes the next step; (loss, gradient norm) as floats. RuntimeError where too many in a row were skipped."""
        try:
            loss, norm, taken = self.step(self.state.step)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(self._no_memory(error)) from error
        self.state.count(loss, taken)
        step = self.state.step
        if not taken:
            self.tell("say", f"step {step}: loss {loss}, gradient norm {norm}; the step was skipped")
        if self.state.skipped_in_a_row >= MOST_SKIPPED:
            raise RuntimeError(
                f"{MOST_SKIPPED} steps in a row had no finite gradient, up to step {step}; lower learning_rate, "
                f"or use dtype=fp32. The weights of the last checkpoint in {self.out} are good"
            )
        return loss, norm

    def _no_memory(self, error):
        config, told = self.config, str(error).splitlines()[0]
        less = "" if config.recompute else ", or recompute=true, which keeps what lies between blocks alone"
        return (f"{self.device} has no memory for a step of {config.micro_batch or config.batch_size} sequences of "
                f"{config.sequence_length} tokens at a time: lower micro_batch, which changes no result{less} ({told})")

    def evaluate(self):
        """The mean loss over the val split, or eval_tokens of it, every target counted once, in nats per token; None
        where there is none.
        """
        if self.val_data is None:
            return None
        self.state.model.eval()
        total, count = 0.0, 0
        rows = max(1, EVAL_TOKENS // self.config.sequence_length)
        for tokens, targets in self.val_data.whole(rows, self.config.eval_tokens):
            total, count = total + self._loss(tokens, targets) * targets.numel(), count + targets.numel()
        return total / count

    def _first_loss(self):
        self.state.model.eval()
        tokens, targets, _ = self.train_data.batch(0, 0, self.config.micro_batch or self.config.batch_size)
        return self._loss(tokens, targets)

    @torch.no_grad()
    def _loss(self, tokens, targets):
        with autocast(self.config.dtype, self.device.type):
            return float(self.state.model.loss(tokens.to(self.device), targets.to(self.device)))

    def _tell_row(self, train_loss, val_loss, norm, tokens_per_second):
        state = self.state
        self.tell("evaluated", self, {
            "step": state.step, "train_loss": train_loss, "val_loss": val_loss, "tokens_per_second": tokens_per_second,
            "learning_rate": learning_rate(max(state.step - 1, 0), self.config), "grad_norm": norm,
            "skipped_steps": state.skipped,
        })

    def save(self):
        """Writes a checkpoint and makes OUT the model of this step."""
        path = checkpoint.save(self.out / "checkpoints", self.state)
        with checkpoint.writing(self.out):
            checkpoint.link(path / "model.safetensors", self.out / "model.safetensors")
            partial = self.out / ".config.json.partial"
            with naming(self.out / "config.json"):
                partial.write_text(json.dumps(self.state.model.config.dump(), indent=2) + "\n", encoding="utf-8")
                os.replace(partial, self.out / "config.json")
            self.tokenizer.save(self.out, max_length=self.state.model.config.n_positions)

    @contextlib.contextmanager
    def _signals(self):
        """While it is open, SIGINT, SIGTERM and SIGHUP ask the loop to stop; a second SIGINT interrupts at once.

        Others come in pairs, from a shell and its terminal, and cut no save off. What is ignored, as SIGHUP under
        nohup, stays so.
        """
        def ask(number, frame):
            if self.stopped is None:
                self.stopped = signal.Signals(number)
            elif number == signal.SIGINT:
                raise KeyboardInterrupt

        former = {}
        with contextlib.suppress(ValueError):  # not the main thread: its signals are somebody else's
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    former[number] = signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
