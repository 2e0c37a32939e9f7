"""Runs of the trainer that take a second: their settings, and what several tests ask of them."""

from fastlm.training.config import TrainConfig
from fastlm.training.listener import Listener

SMALL = {
    "tokenizer": "chars", "n_layer": 2, "n_head": 2, "n_embd": 16, "sequence_length": 16, "batch_size": 4, "steps": 12,
    "warmup_steps": 2, "eval_every": 3, "save_every": 2, "sample_tokens": 0, "dropout": 0.1, "learning_rate": 3e-3,
    "min_learning_rate": 1e-4,
}


def config(text, out, **changes):
    return TrainConfig(**{**SMALL, "data": str(text), "out": str(out), **changes})


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.state.model.named_parameters()}


class Notes(Listener):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)
