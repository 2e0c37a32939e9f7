"""The slow tests' slices: each test lies in one; what changed chooses, and what is left out is told."""

import subprocess
import sys

import pytest
import slices


def test_each_slow_test_lies_in_one_slice():
    command = [sys.executable, "-m", "pytest", "-m", "slow", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=slices.ROOT, capture_output=True, text=True)
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    assert done.returncode == 0 and len(tests) > 250, done.stdout[-2000:] + done.stderr[-2000:]
    found = {test: slices.of(test) for test in tests}
    wrong = {test: names for test, names in found.items() if len(names) != 1}
    assert not wrong, wrong
    assert {names[0] for names in found.values()} == set(slices.SLICES), "a slice is empty"


def test_the_slices_of_what_changed():
    names, told = slices.auto({"kernels/attention.py": 10, "csrc/cpu/gelu.h": 20, "README.md": 500}, 0, seconds=10**6)
    assert names == ["cuda attention", "cpu training", "sanitizers", "triton attention", "triton resources"]
    assert len(told) == 1 and told[0].endswith("; and one more, at commit 0: cuda attention")
    one_more = {slices.auto({"kernels/attention.py": 10}, count)[0][0] for count in range(len(slices.SLICES))}
    assert one_more | {"triton attention", "triton resources"} == set(slices.SLICES)


def test_a_file_of_no_slice_touches_all():
    names, told = slices.auto({"tests/conftest.py": 1, "kernels/attention.py": 1}, 5, seconds=10**6)
    assert set(names) == set(slices.SLICES) and "tests/conftest.py belongs to none" in told[0]
    assert slices.touched({"README.md": 1, "tests/test_house.py": 1}) == ({}, None)


def test_what_time_does_not_allow_is_told():
    lines = {"csrc/fastlm.h": 1, "csrc/cpu/attention.cpp": 100}
    seconds = {name: part.seconds for name, part in slices.SLICES.items()}
    one = slices.auto(lines, 3)[0][0]
    names, told = slices.auto(lines, 3, seconds[one] + seconds["cpu attention"])
    assert one not in slices.touched(lines)[0] and names == [one, "cpu attention"]
    assert told[1].startswith("slices left out, for want of time: ") and "cuda attention" in told[1]


def test_slices_by_name():
    assert slices.choose("nvcc,build")[0] == ["nvcc", "build"]
    with pytest.raises(pytest.UsageError, match="there is no nothing; wanted auto, all or of cuda attention,"):
        slices.choose("nothing")


def test_what_git_tells_is_read():
    lines = slices.changed()
    assert lines and all(count >= 0 for count in lines.values())
