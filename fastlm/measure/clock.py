"""The clock: how long calls take, contenders in turn, so that a machine's moods fall on all of them alike.

A sample is the time of one batch of calls over its length: on a GPU between two CUDA events, on the CPU by the wall.
On a GPU short calls are captured, where they can be, and a batch replays them as CUDA graphs, without the launches.
A contender has one call per set of operands and goes through them in a circle; with sets that together exceed the
cache (`sets_beyond_cache`) every call finds it cold.
"""

import itertools
import math
import statistics
import time
from dataclasses import dataclass

import torch

NOISY = 0.10  # a spread beyond this is marked
LAUNCH_BOUND = 2e-3  # seconds of a call on a GPU below which the host may be what takes them
LONG = 0.1  # seconds of a call that what the others left in the caches does not matter to


@dataclass(frozen=True)
class Times:
    """Seconds a call, one sample a round, in the order they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self):
        return statistics.median(self.samples)

    @property
    def spread(self):
        """The distance between the quartiles, over the median."""
        if len(self.samples) < 2:
            return math.inf
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / self.median

    @property
    def noisy(self):
        return self.spread > NOISY


def race(contenders, *, device="cpu", seconds=1.0, batch_seconds=2e-3, rounds=(5, 50), limit=math.inf, before=None,
         failed=None):
    """Times by name: every round takes one sample of every contender, each round beginning with another one.

    contenders: name → list of calls without arguments. About `seconds` are spent on each, in rounds[0] to rounds[1]
    rounds; a sample is a batch of calls that takes batch_seconds or more. before(name) goes ahead of each batch, and,
    where a call takes less than LONG, one call, both untimed. limit: the seconds after which no further round begins,
    though it be the second: what a call took at first tells little of a machine that others use. failed: a dict that is
    given what a contender raised, by name, while the others go on; without it the race ends.
    """
    end = time.perf_counter() + limit
    timer = _cuda_seconds if torch.device(device).type == "cuda" else _wall_seconds
    circles, lengths, short, costs = {}, {}, set(), {}
    before = before or (lambda name: None)

    def enter(name):
        before(name)
        calls = contenders[name]
        for call in calls:  # chooses, compiles, loads
            call()
        circles[name] = itertools.cycle(calls)
        once = timer(circles[name], 1)
        if once < LONG:
            short.add(name)
            if timer is _cuda_seconds and once < LAUNCH_BOUND:
                circles[name] = itertools.cycle(replays(calls))
            once = max(min(timer(circles[name], 1) for _ in range(2)), 1e-9)
        lengths[name] = max(1, math.ceil(batch_seconds / once))
        costs[name] = once * lengths[name]

    def sample(name):
        before(name)
        if name in short:
            next(circles[name])()
        samples[name].append(timer(circles[name], lengths[name]) / lengths[name])

    def run(part, name):
        try:
            part(name)
        except Exception as error:
            if failed is None:
                raise
            failed[name] = error
            samples.pop(name)

    samples = {name: [] for name in contenders}
    for name in contenders:
        run(enter, name)
    if not samples:
        return {}
    count = min(rounds[1], max(rounds[0], int(seconds * len(samples) / sum(costs[name] for name in samples))))
    names = list(samples)
    for turn in range(count):
        if turn and time.perf_counter() > end:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name in samples:
                run(sample, name)
    return {name: Times(tuple(taken)) for name, taken in samples.items()}


def replays(calls):
    """The calls as replays of CUDA graphs; as they are where one cannot be captured."""
    captured = []
    try:
        for call in calls:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            captured.append(graph.replay)
    except Exception:  # Triton's errors are no RuntimeErrors
        torch.cuda.synchronize()
        return calls
    return captured


def sets_beyond_cache(set_bytes, device):
    """How many sets of operands of set_bytes each exceed twice the last cache of a device."""
    return max(1, math.ceil(2 * cache_bytes(device) / max(set_bytes, 1)))


def cache_bytes(device):
    """The size of the last cache: L2 of a GPU, the largest of CPU 0 (32 MiB where the system does not tell)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for index in range(8):
        try:
            with open(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size", encoding="ascii") as file:
                text = file.read().strip()
        except OSError:
            break
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=32 * 2**20)


def _wall_seconds(calls, count):
    start = time.perf_counter()
    for _ in range(count):
        next(calls)()
    return time.perf_counter() - start


def _cuda_seconds(calls, count):
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        next(calls)()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3
