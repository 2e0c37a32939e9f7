"""The slow tests' slices: each test lies in one; what changed chooses, and what is left out is told."""

import os
import subprocess
import sys

import pytest
import slices
from test_sanitizers import ISAS


@pytest.fixture
def slow_tests(request):
    """The ids of all slow tests."""
    if all(os.path.isdir(argument) for argument in request.config.args):
        return request.config.slow_tests
    command = [sys.executable, "-m", "pytest", "-m", "slow", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=slices.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_each_slow_test_lies_in_one_slice(slow_tests):
    found = {test: slices.of(test) for test in slow_tests}
    wrong = {test: names for test, names in found.items() if len(names) != 1}
    assert len(found) > 250 and not wrong, wrong
    assert {names[0] for names in found.values()} == set(slices.SLICES), "a slice is empty"


def test_the_slices_of_what_changed():
    lines = {"kernels/attention.py": 10, "csrc/cpu/gelu.h": 20, "README.md": 500}
    names, told = slices.auto(lines, 0, seconds=10**6)
    assert names == ["cpu training", *(f"sanitizers {isa}" for isa in ISAS), "triton attention", "triton resources",
                     "cuda attention"]
    assert len(told) == 1 and told[0].endswith("triton resources; and one more, at commit 0: cuda attention")
    ran = {name for count in range(len(slices.SLICES)) for name in slices.auto(lines, count)[0]}
    assert ran == set(slices.SLICES)


def test_a_file_of_no_slice_touches_all():
    names, told = slices.auto({"tests/conftest.py": 1, "kernels/attention.py": 1}, 5, seconds=10**6)
    assert set(names) == set(slices.SLICES)
    assert "tests/conftest.py belongs to none: all of them" in told[0]
    assert slices.touched({"README.md": 1, "tests/test_house.py": 1}) == ({}, None)


def test_what_time_does_not_allow_is_told():
    lines = {"csrc/fastlm.h": 1, "csrc/cpu/attention.cpp": 100}
    names, told = slices.auto(lines, 0, slices.SLICES["cpu attention"].seconds)
    assert names == ["cpu attention", "cuda attention"]
    assert told[1].startswith("slices left out, for want of time: sanitizers generic, ")
    assert "cuda softmax_xent" in told[1] and "cuda attention" not in told[1]


def test_slices_by_name():
    assert slices.choose("nvcc,build")[0] == ["nvcc", "build"]
    with pytest.raises(pytest.UsageError, match="there is no nothing; wanted auto, all or of cuda attention,"):
        slices.choose("nothing")


def test_what_git_tells_is_read():
    lines = slices.changed()
    assert lines and all(count >= 0 for count in lines.values())
