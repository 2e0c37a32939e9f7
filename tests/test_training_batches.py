"""Batches: what the loader has, in its order, whether a thread reads it ahead or not."""

import threading

import pytest
import torch
from runs import config

from fastlm.training.batches import Batches
from fastlm.training.trainer import Trainer


class Loader:
    """Batches whose numbers say where they are from; notes who read them, and fails at `broken`."""

    def __init__(self, broken=None):
        self.read, self.broken = [], broken

    def batch(self, number, first, count):
        self.read.append((number, first, count, threading.current_thread().name))
        if (number, first) == self.broken:
            raise ValueError(f"shard: token id 99 in step {number}")
        tokens = torch.full((count, 16), 1000 * number + first)
        return tokens, tokens + 1, 4 * number + first


def walk(batches, steps=range(3), micro=None):
    places = [(number, first) for number in steps for first in range(0, 4, micro or 4)]
    return [[tensor.clone() for tensor in batches(*place)] for place in places]


@pytest.mark.parametrize("micro", [None, 1, 3, 4, 7])
def test_the_same_ahead(micro):
    given = config("text", "out", micro_batch=micro, steps=3)
    loaders, found = [Loader(), Loader()], []
    for loader, ahead in zip(loaders, (False, True)):
        batches = Batches(loader, given, torch.device("cpu"), ahead=ahead)
        found.append(walk(batches, micro=micro))
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert [place[:3] for place in loaders[0].read] == [place[:3] for place in loaders[1].read]  # none beyond the last
    assert {place[3] for place in loaders[0].read} == {"MainThread"}
    assert all(place[3].startswith("batches") for place in loaders[1].read)
    assert found[0][0][2].tolist() == [given.seed, 0, 0, 0]


def test_a_batch_stays_what_it_was():
    """The next one is read into other memory."""
    batches = Batches(Loader(), config("text", "out", steps=9), torch.device("cpu"), ahead=True)
    given = [batches(number, 0) for number in range(5)]
    for number, (tokens, targets, seed) in enumerate(given):
        assert set(tokens.flatten().tolist()) == {1000 * number} and torch.equal(targets, tokens + 1)
        assert seed[1] == number


def test_another_step_than_the_next():
    loader = Loader()
    batches = Batches(loader, config("text", "out", micro_batch=2, steps=9), torch.device("cpu"), ahead=True)
    for number, first in ((0, 0), (5, 2), (1, 0), (1, 0), (1, 2), (8, 2)):
        tokens, _, seed = batches(number, first)
        assert set(tokens.flatten().tolist()) == {1000 * number + first} and seed[3] == 4 * number + first


def test_what_the_thread_raises_is_raised_where_its_batch_is_asked_for():
    batches = Batches(Loader(broken=(1, 0)), config("text", "out", steps=9), torch.device("cpu"), ahead=True)
    batches(0, 0)
    for _ in range(2):
        with pytest.raises(ValueError, match="token id 99 in step 1"):
            batches(1, 0)
    assert set(batches(2, 0)[0].flatten().tolist()) == {2000}


def test_a_run_is_the_same_ahead(text, tmp_path):
    found = []
    for ahead in (False, True):
        trainer = Trainer(config(text, tmp_path / str(ahead), micro_batch=3))
        trainer.step.batches = Batches(trainer.train_data, trainer.config, trainer.device, ahead=ahead)
        found.append([trainer.train_step() for _ in range(4)])
    assert found[0] == found[1]
