"""State: all that a run is between two steps, and all that a checkpoint holds."""

from dataclasses import dataclass, field, fields

import torch

from fastlm.gpt2 import GPT2
from fastlm.training.optimizer import AdamW


@dataclass
class State:
    """A run between two steps: the next one depends on this and on the run's settings (train.json) alone.

    A checkpoint is these fields, and two notes that nothing reads back: torch's version and its number of threads,
    without which the bits are not the same. The loader has no position to keep: its batches are a function of the seed
    and the step.
    """

    model: GPT2  # its parameters
    optimizer: AdamW  # the moments of every parameter, and the steps that were taken
    generators: dict[str, torch.Generator]  # torch's own, "cpu" and on a GPU "cuda": they draw the dropout
    backends: dict[str, str] = field(default_factory=dict)  # {op: backend}, found once for the whole run
    step: int = 0  # steps behind it, those that were skipped too
    skipped: int = 0  # steps without a finite gradient
    skipped_in_a_row: int = 0
    loss_sum: float = 0.0  # of the loss_steps since the last evaluation
    loss_steps: int = 0
    metrics_bytes: int = 0  # of metrics.jsonl: what lies behind them is another run's

    def count(self, loss, taken):
        """Counts a step, whether it was taken or skipped."""
        self.step += 1
        if taken:
            self.skipped_in_a_row = 0
            self.loss_sum, self.loss_steps = self.loss_sum + loss, self.loss_steps + 1
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1

    def dump(self):
        """(weights, moments, rest): {name: tensor} twice, on the CPU, and a dict that JSON can hold.

        The generators' states (uint8) are among the moments, as rng.cpu and rng.cuda.
        """
        weights = {name: parameter.detach().cpu() for name, parameter in self.model.named_parameters()}
        moments = {name: value.cpu() for name, value in self.optimizer.state().items()}
        moments |= {f"rng.{name}": generator.get_state() for name, generator in self.generators.items()}
        rest = {name: getattr(self, name) for name in NUMBERS}
        rest |= {"backends": self.backends, "torch": torch.__version__, "threads": torch.get_num_threads()}
        return weights, moments, rest

    def fits(self, weights):
        """Whether weights {name: tensor} are of this model."""
        shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        return {name: value.shape for name, value in weights.items()} == shapes

    @torch.no_grad()
    def load(self, weights, moments, rest):
        """Becomes the state that was dumped, by a model which `fits`."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])
        self.optimizer.load(moments)
        for name, generator in self.generators.items():
            if name == "cpu" or f"rng.{name}" in moments:  # the run may have been on a CPU until now
                generator.set_state(moments[f"rng.{name}"])
        for name in (*NUMBERS, "backends"):
            setattr(self, name, rest[name])


NUMBERS = [entry.name for entry in fields(State) if entry.type in (int, float)]


def generators(device):
    """{"cpu": …, "cuda": …}: torch's default generators that a run on `device` draws from."""
    found = {"cpu": torch.default_generator}
    if device.type == "cuda":
        torch.cuda.init()
        found["cuda"] = torch.cuda.default_generators[
            torch.cuda.current_device() if device.index is None else device.index
        ]
    return found
