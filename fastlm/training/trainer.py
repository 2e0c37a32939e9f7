"""Trainer: trains a GPT-2 and can be stopped at any moment.

Everything a step depends on is the parameters, the optimizer, torch's generator and the step's number; a checkpoint
holds all four, so a run that was killed and resumed is, bit for bit, the run that was not. OUT is a model directory
in Hugging Face's format from the first checkpoint on.
"""

import contextlib
import json
import math
import os
import signal
import time
from pathlib import Path

import torch

from fastlm import dispatch
from fastlm.backends import native
from fastlm.config import GPT2Config
from fastlm.data.loader import Loader
from fastlm.data.prepare import MANIFEST, load_manifest, prepare
from fastlm.data.shards import read_split
from fastlm.data.tokenizer import Tokenizer
from fastlm.gpt2 import GPT2
from fastlm.measure.numerics import DTYPES
from fastlm.ops import adamw_
from fastlm.training import checkpoint
from fastlm.training.config import TrainConfig
from fastlm.training.optimizer import AdamW, learning_rate

MOST_SKIPPED = 10  # steps in a row without a finite gradient before the run gives up
EVAL_TOKENS = 8192  # tokens evaluated at a time


class Trainer:
    """A run. `Trainer(config).run()` trains to the end; `Trainer.resume(out)` goes on where a run stopped.

    config: TrainConfig. report: an object with the methods of `Silent`, told what happens. into: OUT may hold other
    files. Raises ValueError for what is wrong with the settings or the data before anything but prepared data is
    written.
    """

    def __init__(self, config: TrainConfig, *, report=None, resumed=None, into=False):
        self.config, self.report = config, report or Silent()
        self.out = Path(config.out)
        taken = self.out.exists() and (not self.out.is_dir() or set(os.listdir(self.out)) - {"data"})
        if taken and resumed is None and not into:
            raise ValueError(f"{self.out}: exists; go on with --resume, or pass another --out")
        self.device = _device(config.device)
        if _lacks(config.dtype, self.device.type):
            self.report.say("this CPU has no bf16 products: they are made in fp32, which is far faster on it")
        data = self._prepared()
        self.tokenizer = Tokenizer.load(data)
        vocab = self.tokenizer.vocab_size
        self.train_data, self.val_data = (
            Loader(read_split(data, split), config.sequence_length, config.batch_size, vocab, config.seed)
            for split in ("train", "val")
        )
        torch.manual_seed(config.seed)
        self.model = self._make_model(vocab).to(self.device)
        self.optimizer = AdamW(self.model, config)
        self.step, self.skipped, self.skipped_in_a_row = 0, 0, 0
        self.loss_sum, self.loss_steps = 0.0, 0  # since the last evaluation
        self.metrics_bytes = 0
        self._stop = None
        if resumed is not None:
            self._restore(*resumed)
        self.backends = resumed[3]["backends"] if resumed else self._resolve_backends()
        self._loss = torch.compile(self.model.loss) if config.compile else self.model.loss

    @classmethod
    def resume(cls, out, *, report=None, **changes):
        """The run of directory `out`, from its newest whole checkpoint, with changed settings such as steps."""
        report = report or Silent()
        config = TrainConfig.load(Path(out) / "train.json", **{**changes, "out": str(out)})
        resumed = checkpoint.load_newest(Path(out) / "checkpoints", warn=report.say)
        return cls(config, report=report, resumed=resumed)

    def _prepared(self):
        """The directory of shards: the one given, or OUT/data made from the text given."""
        given, made = Path(self.config.data), self.out / "data"
        for directory in (given, made):
            if (directory / MANIFEST).is_file():
                load_manifest(directory)
                return directory
        if given.is_dir() and list(given.glob("*train*.bin")):  # shards that another program wrote
            return given
        manifest = prepare(
            [given], made, tokenizer=self.config.tokenizer, vocab_size=self.config.vocab_size,
            val_fraction=self.config.val_fraction, progress=self.report.preparing,
        )
        self.report.prepared(manifest)
        return made

    def _make_model(self, vocab):
        config = self.config
        if config.init_from is not None:
            model = GPT2.from_pretrained(config.init_from).train()
            if model.config.vocab_size != vocab or model.config.n_positions < config.sequence_length:
                raise ValueError(
                    f"{config.init_from}: has vocab_size {model.config.vocab_size} and n_positions "
                    f"{model.config.n_positions}, but the run needs {vocab} and {config.sequence_length}"
                )
            return model
        end = self.tokenizer.end_of_text
        return GPT2(GPT2Config(
            vocab_size=vocab, n_positions=config.sequence_length, n_embd=config.n_embd, n_layer=config.n_layer,
            n_head=config.n_head, embd_pdrop=config.dropout, attn_pdrop=config.dropout, resid_pdrop=config.dropout,
            bos_token_id=end, eos_token_id=end,
        ))

    def _resolve_backends(self):
        """{op: backend} that this model's step runs on here, found by a step on two tokens.

        An op whose parts run on several backends has the first's, and each torch op that runs on another stands beside
        it: {"attention": "cuda", "attention_qkv_bwd": "torch"}.
        """
        state = torch.get_rng_state()
        with dispatch.record() as calls, self._autocast():
            tokens = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
            self.model.loss(tokens, tokens).backward()
            self.optimizer.gradients()
            adamw_(*(torch.zeros(1, device=self.device) for _ in range(4)), step=1, learning_rate=0.0)
        self.optimizer.zero_grad()
        torch.set_rng_state(state)
        backends = {}
        for op, backend in calls:
            if backends.setdefault(dispatch.TABLE[op].family, backend) != backend:
                backends[op] = backend
        return backends

    def _autocast(self):
        return autocast(self.config.dtype, self.device.type)

    # ---- the loop

    def run(self):
        """Trains to the last step, or until SIGINT or SIGTERM, which finish the step and save. True at the end."""
        config = self.config
        self.out.mkdir(parents=True, exist_ok=True)
        config.dump(self.out / "train.json")
        if self.device.type == "cpu":
            native.keep_heap()
        for op, backend in self.backends.items():
            if op in dispatch.TABLE and (family := dispatch.TABLE[op].family) != op:
                self.report.say(f"{family} runs on {self.backends[family]}, but {op} on {backend}")
        with dispatch.use(**self.backends), self._signals():
            if self.step == 0:
                self._log(self._first_loss(), self.evaluate(), None, None)
            self.report.started(self)
            clock, clock_step = time.perf_counter(), self.step
            while self.step < config.steps and self._stop is None:
                loss, norm = self.train_step()
                self.report.stepped(self, loss)
                if self.step % config.eval_every == 0 or self.step == config.steps:
                    elapsed = time.perf_counter() - clock
                    tokens = (self.step - clock_step) * config.batch_size * config.sequence_length
                    self._log(self.loss_sum / max(self.loss_steps, 1), self.evaluate(), norm, tokens / elapsed)
                    self.loss_sum, self.loss_steps = 0.0, 0
                    clock, clock_step = time.perf_counter(), self.step
                if self.step % config.save_every == 0 or self.step == config.steps:
                    self.save()
            if self._stop is not None and self.step < config.steps:
                self.save()
                self.report.say(
                    f"stopped by {self._stop} and saved at step {self.step}; "
                    f"go on with: fastlm train --resume --out {self.out}"
                )
        self.report.finished(self)
        return self.step >= config.steps

    def train_step(self):
        """One optimizer step; (loss, gradient norm) as floats. A step without a finite gradient changes nothing."""
        config, step = self.config, self.step
        self.model.train()
        micro, total = config.micro_batch or config.batch_size, 0.0
        for first in range(0, config.batch_size, micro):
            count = min(micro, config.batch_size - first)
            tokens, targets, index = self.train_data.batch(step, first, count)
            seed = torch.tensor([config.seed, step, 0, index]) if config.dropout else None
            tokens, targets, seed = (None if t is None else t.to(self.device) for t in (tokens, targets, seed))
            with self._autocast():
                loss = self._loss(tokens, targets, seed=seed)
            if count < config.batch_size:
                loss = loss * (count / config.batch_size)  # every sequence has as many targets
            loss.backward()
            total = total + loss.detach()
        gradients = self.optimizer.gradients()
        norm, total = float(gradients[1]), float(total)
        finite = math.isfinite(norm) and math.isfinite(total)
        if finite:
            self.optimizer.step(*gradients, learning_rate(step, config))
            self.skipped_in_a_row = 0
            self.loss_sum, self.loss_steps = self.loss_sum + total, self.loss_steps + 1
        self.optimizer.zero_grad()
        self.step += 1
        if not finite:
            self._skip(total, norm)
        return total, norm

    def _skip(self, loss, norm):
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.report.say(f"step {self.step}: loss {loss}, gradient norm {norm}; the step was skipped")
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise RuntimeError(
                f"{MOST_SKIPPED} steps in a row had no finite gradient, up to step {self.step}; lower learning_rate, "
                f"or use dtype=fp32. The weights of the last checkpoint in {self.out} are good"
            )

    @torch.no_grad()
    def evaluate(self):
        """The mean loss over the whole val split, every target counted once, in nats per token."""
        self.model.eval()
        total, count = 0.0, 0
        for tokens, targets in self.val_data.whole(max(1, EVAL_TOKENS // self.config.sequence_length)):
            with self._autocast():
                loss = self.model.loss(tokens.to(self.device), targets.to(self.device))
            total, count = total + float(loss) * targets.numel(), count + targets.numel()
        return total / count

    @torch.no_grad()
    def _first_loss(self):
        self.model.eval()
        tokens, targets, _ = self.train_data.batch(0, 0, self.config.micro_batch or self.config.batch_size)
        with self._autocast():
            return float(self.model.loss(tokens.to(self.device), targets.to(self.device)))

    def _log(self, train_loss, val_loss, norm, tokens_per_second):
        row = {
            "step": self.step, "train_loss": train_loss, "val_loss": val_loss,
            "tokens_per_second": tokens_per_second and round(tokens_per_second, 1),
            "learning_rate": learning_rate(max(self.step - 1, 0), self.config), "grad_norm": norm,
            "skipped_steps": self.skipped,
        }
        with open(self.out / "metrics.jsonl", "ab") as file:
            file.truncate(self.metrics_bytes)
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self.metrics_bytes = file.tell()
        self.report.evaluated(self, row)

    # ---- saving

    def save(self):
        """Writes a checkpoint and makes OUT the model of this step."""
        parameters = dict(self.model.named_parameters())
        moments = {key: value.cpu() for key, value in self.optimizer.state().items()}
        moments["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            moments["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "step": self.step, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row,
            "loss_sum": self.loss_sum, "loss_steps": self.loss_steps, "metrics_bytes": self.metrics_bytes,
            "backends": self.backends, "torch": torch.__version__, "threads": torch.get_num_threads(),
        }
        weights = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
        path = checkpoint.save(self.out / "checkpoints", self.step, weights, moments, state)
        checkpoint.link(path / "model.safetensors", self.out / "model.safetensors")
        partial = self.out / ".config.json.partial"
        partial.write_text(json.dumps(self.model.config.dump(), indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.out / "config.json")
        self.tokenizer.save(self.out)

    def _restore(self, path, weights, moments, state):
        parameters = dict(self.model.named_parameters())
        if set(weights) != set(parameters) or any(weights[n].shape != p.shape for n, p in parameters.items()):
            raise ValueError(f"{path}: the checkpoint is of another model than {self.out / 'train.json'} describes")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        self.optimizer.load(moments)
        torch.set_rng_state(moments["rng.cpu"])
        if "rng.cuda" in moments and self.device.type == "cuda":
            torch.cuda.set_rng_state(moments["rng.cuda"], self.device)
        for key in ("step", "skipped", "skipped_in_a_row", "loss_sum", "loss_steps", "metrics_bytes"):
            setattr(self, key, state[key])
        metrics = self.out / "metrics.jsonl"
        if metrics.exists() and metrics.stat().st_size < self.metrics_bytes:
            raise ValueError(f"{metrics}: shorter than when {path} was saved; was it edited?")
        if metrics.exists():
            os.truncate(metrics, self.metrics_bytes)
        self.report.say(f"resuming {self.out} at step {self.step}")

    @contextlib.contextmanager
    def _signals(self):
        """While it is open, SIGINT and SIGTERM ask the loop to stop; a second SIGINT interrupts at once."""
        def ask(number, frame):
            if self._stop is not None:
                raise KeyboardInterrupt
            self._stop = signal.Signals(number).name

        try:
            former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: its signals are somebody else's
            former = {}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


class Silent:
    """Is told what a run does, and says nothing; a report overrides what it wants to show."""

    def say(self, text):
        """A sentence for the user."""

    def preparing(self, done, total):
        """Characters tokenised so far."""

    def prepared(self, manifest):
        """The data was prepared."""

    def started(self, trainer):
        """The loop begins."""

    def stepped(self, trainer, loss):
        """A step was taken."""

    def evaluated(self, trainer, row):
        """A row was added to metrics.jsonl."""

    def finished(self, trainer):
        """The loop ended."""


def autocast(dtype, device_type):
    """The context of a step whose products are in dtype, "fp32", "bf16" or "fp16".

    A CPU without bf16 products, on which PyTorch's take a hundred times as long as those in fp32, makes them in fp32.
    """
    if dtype == "fp32" or _lacks(dtype, device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=DTYPES[dtype])


def _lacks(dtype, device_type):
    return (dtype, device_type) == ("bf16", "cpu") and not _multiplies_bf16()


def _multiplies_bf16():
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _device(name):
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}, wanted auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but this machine has no CUDA GPU that torch can use; use device=cpu")
    return device
