"""metrics.jsonl: a row for each evaluation of a run, written as it goes.

    step, train_loss, val_loss, tokens_per_second, learning_rate, grad_norm, skipped_steps

Losses are in nats per token; what the first row, of step 0, cannot have is null.
"""

import json
import os
from pathlib import Path

from fastlm.data.disk import naming
from fastlm.training import checkpoint
from fastlm.training.listener import Listener


class Metrics(Listener):
    """Writes OUT/metrics.jsonl. The state counts the bytes that are its past: a resumed run cuts off what lies behind
    them.
    """

    def resumed(self, trainer, path):
        """Raises ValueError where the file is shorter than the checkpoint knows it."""
        file, length = self._file(trainer), trainer.state.metrics_bytes
        if file.exists() and file.stat().st_size < length:
            raise ValueError(f"{file}: shorter than when {path} was saved; was it edited?")
        if file.exists():
            os.truncate(file, length)

    def evaluated(self, trainer, row):
        path = self._file(trainer)
        with checkpoint.writing(trainer.out), naming(path), open(path, "ab") as file:
            file.truncate(trainer.state.metrics_bytes)
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            trainer.state.metrics_bytes = file.tell()

    def _file(self, trainer):
        return trainer.out / "metrics.jsonl"


def read_metrics(path):
    """The rows of a metrics.jsonl: dicts with step, train_loss, val_loss, tokens_per_second."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
