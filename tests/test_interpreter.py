"""The bf16 of the interpreter that stands in for a GPU, and the guard pages that stand in for its memory checks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from conftest import GPU
from guard import guarded

interpreted = pytest.mark.skipif(GPU, reason="a GPU is here: nothing is interpreted")


@triton.jit
def _arithmetic_kernel(out_ptr, a_ptr, b_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(out_ptr + i, a * b + a)
    tl.store(out_ptr + N + i, tl.maximum(a, b))
    tl.store(out_ptr + 2 * N + i, (a.to(tl.float32) * 1.001).to(tl.bfloat16))
    tl.store(out_ptr + 3 * N + i, tl.zeros((N,), tl.bfloat16) + tl.sum(a, axis=0))


@triton.jit
def _dot_kernel(out_ptr, a_ptr, b_ptr, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + i, tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i)))


@interpreted
def test_bf16_arithmetic():
    N = 64
    a, b = torch.randn(2, N).bfloat16().unbind(0)
    out = torch.empty(4, N, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](out, a.contiguous(), b.contiguous(), N)
    assert torch.equal(out[0], a * b + a)
    assert torch.equal(out[1], torch.maximum(a, b))
    assert torch.equal(out[2], (a.float() * 1.001).bfloat16())
    torch.testing.assert_close(out[3][0].float(), a.float().sum(), rtol=2e-2, atol=2e-2)


@interpreted
def test_bf16_dot():
    N = 32
    a, b = torch.randn(2, N, N).bfloat16().unbind(0)
    out = torch.empty(N, N)
    _dot_kernel[(1,)](out, a.contiguous(), b.contiguous(), N)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


OVERSTEP = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, sys.argv[1])
import torch, triton
import triton.language as tl
from guard import guarded

@triton.jit
def _copy_kernel(out_ptr, x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i))

_copy_kernel[(1,)](torch.empty(64), guarded(torch.zeros(int(sys.argv[2]))), 64)
print("survived")
"""


@interpreted
def test_a_kernel_that_oversteps_dies(tmp_path):
    script = tmp_path / "overstep.py"
    script.write_text(OVERSTEP)
    runs = {
        size: subprocess.run(
            [sys.executable, script, Path(__file__).parent, str(size)], capture_output=True, text=True, timeout=120
        )
        for size in (64, 63)
    }
    assert runs[64].returncode == 0 and "survived" in runs[64].stdout, runs[64].stderr
    assert runs[63].returncode < 0 and "survived" not in runs[63].stdout


def test_guarded_tensors_hold_what_they_copy():
    for front in (False, True):
        for tensor in (torch.randn(3, 5), torch.arange(7), torch.zeros(0, 4)):
            assert torch.equal(guarded(tensor, front=front), tensor)
