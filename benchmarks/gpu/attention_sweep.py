"""The launch configurations of Triton's attention: each kernel alone, compiled by several processes, timed by one.

Where D = 64 the best of T = 1024 are timed at T = 4096 again, beside descriptors; where D = 128 both ways of reading.
"""

import os
import subprocess
import sys

import torch

from fastlm.measure.clock import race

from .. import harness
from .place import emit

SHAPES = ((32, 1024, 12, 64), (8, 4096, 12, 64), (16, 1024, 16, 128))  # B, T, H, D
POINTERS = {  # D → kernel → BLOCK_T, BLOCK_S, num_warps, num_stages, perhaps maxnreg
    64: {
        "fwd": ((64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 4, 5), (64, 32, 4, 3), (64, 32, 4, 4),
                (32, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 32, 4, 4), (128, 32, 8, 4),
                (64, 64, 4, 2, 128), (64, 32, 4, 3, 96)),
        "keys": ((32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 4, 4), (32, 64, 4, 5), (16, 64, 4, 3), (16, 64, 4, 4),
                 (64, 64, 4, 3), (64, 64, 8, 3), (32, 32, 4, 3), (32, 128, 8, 3), (64, 128, 8, 3), (32, 64, 8, 3)),
        "queries": ((64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (64, 32, 4, 5), (64, 64, 4, 3), (64, 64, 4, 4),
                    (64, 64, 8, 3), (128, 32, 4, 3), (128, 32, 8, 3), (128, 32, 8, 4), (128, 64, 8, 3), (32, 64, 4, 3),
                    (64, 32, 4, 3, 96), (64, 32, 4, 2, 96)),
    },
    128: {
        "fwd": ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 4, 3), (128, 32, 8, 3)),
        "keys": ((16, 64, 4, 3), (32, 64, 4, 2), (32, 64, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (16, 128, 8, 3)),
        "queries": ((64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (128, 64, 8, 2)),
    },
}
DESCRIBED = {
    64: {"fwd": ((64, 64, 4, 3), (128, 64, 4, 3)), "keys": ((32, 64, 4, 3),), "queries": ((64, 32, 4, 3),)},
    128: {
        "fwd": ((64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (128, 128, 8, 2)),
        "keys": ((16, 64, 4, 3), (32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3)),
        "queries": ((64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3), (128, 64, 8, 2)),
    },
}


def tune(place):
    """Every launch configuration of every kernel of attention, at three shapes."""
    if place.dry:
        return emit(told="needs a GPU")
    count = min(14, os.cpu_count() or 1)
    command = [sys.executable, "-m", "fastlm.benchmarks.gpu.steps", "compile"]
    workers = [subprocess.Popen([*command, str(index), str(count)]) for index in range(count)]
    for worker in workers:
        worker.wait()
    best = {}  # (kernel, D) → its configurations by pointers, the fastest first
    for shape in SHAPES:
        for name in POINTERS[shape[3]]:
            if not place.leaves(4, kernel=name, shape=_sizes(shape)):
                continue
            found = _timed(_Case(shape, name), _candidates(shape, name, best))
            best.setdefault((name, shape[3]), [config for described, config in found if not described])
    return None


def compile(place, index, count):
    """Every count-th configuration from the index-th on, compiled and launched on little."""
    jobs = [(D, name, described, config) for described, table in enumerate((POINTERS, DESCRIBED))
            for D, kernels in table.items() for name, configs in kernels.items() for config in configs]
    for D, name, described, config in jobs[int(index)::int(count)]:
        try:
            _Case((1, 256, 12 if D == 64 else 16, D), name).launch(bool(described), config)
            torch.cuda.synchronize()
        except Exception as error:  # the process that times will say so in a row
            print(f"{name} D={D} {config}: {type(error).__name__}", flush=True)


def _sizes(shape):
    return dict(zip("BTHD", shape))


def _candidates(shape, name, best):
    """(by descriptors, configuration) of what is timed at a shape."""
    D = shape[3]
    pointers = [(False, config) for config in POINTERS[D][name]]
    described = [(True, config) for config in DESCRIBED[D][name]]
    if shape == SHAPES[0]:
        return pointers
    return [*([(False, config) for config in best.get((name, D), ())[:3]] or pointers), *described]


class _Case:
    """Operands of one kernel, "fwd", "keys" or "queries", what its usual launch answers, and a launch of it alone."""

    def __init__(self, shape, name, device="cuda"):
        from fastlm.kernels import attention as module

        self.module, self.shape, self.name = module, shape, name
        B, T, H, D = shape
        torch.manual_seed(0)
        self.qkv = torch.randn(B, T, 3, H, D, device=device, dtype=torch.bfloat16)
        self.do = torch.randn(B, T, H, D, device=device, dtype=torch.bfloat16)
        arguments = self.scale, *_ = D**-0.5, 0.0, None
        self.o, self.lse = module.attention_qkv_fwd(self.qkv, 1, *arguments)
        self.padded = module._attention_delta(self.do, self.o, self.lse, module._folded(self.qkv, self.scale))
        if name == "fwd":
            self.expected, self.got = self.o, torch.empty_like(self.o)
        else:
            part = slice(1, 3) if name == "keys" else slice(0, 1)
            self.expected = module.attention_qkv_bwd(self.do, self.qkv, self.o, self.lse, 1, *arguments)[:, :, part]
            self.gradients = torch.empty_like(self.qkv)
            self.got = self.gradients[:, :, part]

    def launch(self, described, config):
        module, (q, k, v), strided = self.module, self.qkv.unbind(2), self.module._strided
        if self.name == "fwd":
            kernel, tensors = module._attention_fwd_kernel, (*strided(self.got), self.lse, *strided(q, k, v))
        else:
            kernel = getattr(module, f"_attention_bwd_{self.name}_kernel")
            tensors = *strided(*self.got.unbind(2)), *strided(self.do, q, k, v), *self.padded
        usual = module._config
        module._config = lambda *_: config
        try:
            module._launch(kernel, self.name, q, q.shape[1], 1, self.scale, 0.0, None, described, *tensors)
        finally:
            module._config = usual

    def far(self, described, config):
        """How far a launch's result is from the usual one, as a share of it."""
        self.got.fill_(float("nan"))
        self.launch(described, config)
        return float((self.got.float() - self.expected.float()).norm() / self.expected.float().norm())


def _timed(case, candidates, seconds=0.03):
    """The candidates that work, the fastest first; a row for each, and what was best to tell."""
    device, contenders, rows = case.qkv.device.type, {}, {}
    for described, config in candidates:
        row = {"op": "attention", "kernel": case.name, "shape": _sizes(case.shape), "dtype": "bf16", "tma": described,
               "config": list(config)}
        try:
            far = case.far(described, config)
        except Exception as error:
            emit(**row, refused=f"{type(error).__name__}: {harness.refusal(error)}")
            continue
        if not far < 1e-2:
            emit(**row, far=far, failed=f"far from the usual result: {far:.3g}")
            continue
        rows[described, config] = {**row, "far": far}
        contenders[described, config] = [lambda described=described, config=config: case.launch(described, config)]
    if not contenders:
        return []
    failed = {}
    taken = race(contenders, device=device, seconds=seconds, failed=failed)
    for key, row in rows.items():
        if key in failed:
            emit(**row, failed=f"{type(failed[key]).__name__}: {harness.refusal(failed[key])}")
        else:
            emit(**row, median_us=taken[key].median * 1e6, spread=taken[key].spread)
    order = sorted((key for key in rows if key not in failed), key=lambda key: taken[key].median)
    q = case.qkv[:, :, 0]
    capability = case.module._capability(q)
    described = case.module._describable(capability, q)
    usual = described, case.module._config(case.name, q.shape[3], 2, False, described, capability)
    sizes = " ".join(f"{letter}={size}" for letter, size in _sizes(case.shape).items())
    emit(told=f"attention {case.name} {sizes}: " + " | ".join(
        f"{config}{' tma' * described}{' (usual)' * ((described, config) == usual)} "
        f"{taken[described, config].median * 1e6:.1f} µs" for described, config in order[:4]
    ) + ("" if usual in order[:4] else f" | usual {usual[1]}{' tma' * described}"))
    return order
