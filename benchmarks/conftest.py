"""pytest-benchmark as the runner: `pytest benchmarks --benchmark-enable` times every contender of every case.

`fastlm bench` times the same ones in turn, with roofs and errors; here they run one after another.
"""

import functools

import pytest
import torch

from fastlm.dispatch.forcing import use

from . import harness

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc):
    if "contestants" in metafunc.fixturenames:
        cases = harness.suite([metafunc.module.__name__.split("bench_")[-1]], device=DEVICE)
        pairs = [(case, name) for case in cases for name in harness.contenders(case, DEVICE)]
        metafunc.parametrize("contestants", pairs, ids=[f"{case.name}/{name}" for case, name in pairs])


@pytest.fixture
def contest(benchmark, contestants):
    case, name = contestants
    function = harness.contenders(case, DEVICE)[name]

    def run():
        benchmark.group = case.name
        with use(**{case.op: getattr(function, "backend", None)}):
            call = functools.partial(function, *case.operands())
            benchmark.pedantic(call, rounds=10, warmup_rounds=2)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

    return run
