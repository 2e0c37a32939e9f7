"""The clock and the roofs."""

import contextlib
import itertools
import json
import time
from types import SimpleNamespace

import pytest
import torch

from fastlm.measure import roofs as module
from fastlm.measure.clock import Times, cache_bytes, race, replays, sets_beyond_cache
from fastlm.measure.roofs import Roofs, roofs


def test_contenders_take_turns_and_their_operands_rotate():
    seen, ahead = [], []
    calls = {name: [lambda name=name, i=i: seen.append((name, i)) for i in range(3)] for name in "ab"}
    times = race(calls, seconds=1e-9, batch_seconds=1e-9, rounds=(4, 4), before=ahead.append)
    assert {name: len(taken.samples) for name, taken in times.items()} == {"a": 4, "b": 4}
    assert ahead == list("ab" + "ab" + "ba" + "ab" + "ba")  # each round begins with another one
    assert [i for name, i in seen if name == "a"][:12] == [0, 1, 2, 0, 1, 2] * 2


def test_a_race_that_nobody_entered():
    """Where every contender refused or was wrong."""
    assert race({}) == {}


def test_a_sample_is_the_time_of_one_call():
    """Only that the units are right: 5 ms of sleep are neither 0.5 nor 50."""
    (times,) = race({"": [lambda: time.sleep(5e-3)]}, rounds=(3, 3)).values()
    assert 4e-3 < times.median < 50e-3
    assert len(times.samples) == 3


def test_the_spread_is_between_the_quartiles():
    times = Times((1.0, 2.0, 3.0, 4.0, 100.0))
    assert times.median == 3.0 and times.spread == pytest.approx(2 / 3) and times.noisy
    assert not Times((1.0, 1.01, 1.02)).noisy and Times((1.0,)).noisy


def test_what_cannot_be_captured_is_called_as_it_is(monkeypatch):
    class Graph:
        def replay(self):
            return "replayed"

    @contextlib.contextmanager
    def graph(_):
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def fails():
        raise RuntimeError("operation not permitted when stream is capturing")

    good = [lambda: "called"] * 2
    assert [call() for call in replays(good)] == ["replayed"] * 2
    assert replays([*good, fails]) == [*good, fails]

    class CompilationError(Exception):
        """Triton's is no RuntimeError."""

    def does_not_compile():
        raise CompilationError

    assert replays([does_not_compile]) == [does_not_compile]


@pytest.mark.parametrize("calls", [0, 9])
def test_what_raises_leaves_the_race(calls):
    """At its first call, or in a later round."""
    class OutOfResources(Exception):
        pass

    left = iter(range(calls))

    def fails():
        if next(left, None) is None:
            raise OutOfResources

    failed = {}
    times = race({"bad": [fails], "good": [lambda: None]}, batch_seconds=1e-9, rounds=(20, 20), failed=failed)
    assert set(times) == {"good"} and len(times["good"].samples) == 20
    assert isinstance(failed["bad"], OutOfResources)
    assert race({"bad": [fails]}, failed=failed) == {}
    with pytest.raises(OutOfResources):
        race({"bad": [fails], "good": [lambda: None]})


def test_a_machine_that_becomes_busy_ends_a_race_in_time():
    """Calls that took no time when the rounds were counted: fifty rounds of eight calls would take 20 s."""
    calm = iter(range(8))

    def call():
        if next(calm, None) is None:
            time.sleep(0.05)

    begun = time.perf_counter()
    times = race({"a": [call], "b": [call]}, seconds=0.5, batch_seconds=1e-9, limit=0.2)
    assert time.perf_counter() - begun < 2 and all(0 < len(taken.samples) < 10 for taken in times.values())
    assert len(race({"": [lambda: None]}, limit=0.0)[""].samples) == 1  # one round whatever the limit


def test_sets_exceed_the_cache_twice():
    size = cache_bytes("cpu")
    assert size >= 2**18 and sets_beyond_cache(size, "cpu") == 2 and sets_beyond_cache(100 * size, "cpu") == 1


def test_the_floor_is_the_slower_of_bytes_and_flops():
    some = Roofs(copy=10.0, read=20.0, products={"fp32": 5.0}, launch=0.0, taken=0.0)
    assert some.floor(bytes=100, flops=10, dtype="fp32") == 10.0
    assert some.floor(bytes=100, flops=10, dtype="fp32", traffic="read") == 5.0
    assert some.floor(bytes=100, flops=500, dtype="fp32") == 100.0


def test_roofs_are_measured_once_and_never_sink(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path))
    found = iter([Roofs(10.0, 20.0, {"fp32": 5.0}, 2.0, 1.0), Roofs(8.0, 30.0, {"fp32": 4.0}, 3.0, 2.0)])
    monkeypatch.setattr(module, "measure", lambda device: next(found))
    assert roofs() == roofs() == Roofs(10.0, 20.0, {"fp32": 5.0}, 2.0, 1.0)
    assert roofs(fresh=True) == roofs() == Roofs(10.0, 30.0, {"fp32": 5.0}, 2.0, 2.0)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"copy": 1}'])
def test_a_damaged_cache_is_measured_again(monkeypatch, tmp_path, text):
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path))
    some = Roofs(10.0, 20.0, {"fp32": 5.0}, 2.0, 1.0)
    monkeypatch.setattr(module, "measure", lambda device: some)
    roofs()
    (path,) = (tmp_path / "roofs").iterdir()
    path.write_text(text)
    assert roofs() == some and json.loads(path.read_text())["copy"] == 10.0


def test_every_part_of_measuring_has_its_share_of_the_limit(monkeypatch):
    limits, busy = [], Times((1e-3,))

    def instant(contenders, *, limit, **options):
        limits.append(limit)
        return dict.fromkeys(contenders, busy)

    monkeypatch.setattr(module, "race", instant)
    module.measure("cpu", bytes=2**12, size=256)
    assert len(limits) == 5 and sum(limits) <= module.LIMIT
    seconds = itertools.count()  # a part takes one
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(seconds), time=time.time))
    limits.clear()
    module.measure("cpu", bytes=2**12, size=2**12, limit=10.0)
    assert len(limits) == 5  # no larger product where 1.5 s have passed


def test_measured_for_real():
    found = module.measure("cpu", bytes=2**22, size=128, seconds=0.01)
    assert min(found.copy, found.read, *found.products.values()) > 1e6 and found.launch > 0
    assert found.products.keys() == {"fp32", "bf16", "fp16"} and torch.get_num_threads() > 0
