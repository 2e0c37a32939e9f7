"""The choice of a backend: forced, refused with a sentence, counted."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm import dispatch
from fastlm.dispatch.forcing import forced
from fastlm.dispatch.table import TABLE


def run(code, **environment):
    environment = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


def test_use_is_undone():
    with fastlm.use("torch"):
        with fastlm.use(attention="reference"):
            assert forced("attention") == "reference" and forced("softmax_xent") == "torch"
        assert forced("attention") == "torch"
        with fastlm.use(attention=None):
            assert forced("attention") == "torch"  # the force on every op still holds
    assert forced("attention") is None


def test_a_forced_backend_serves_every_op_that_has_it():
    x, y = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
    for backend in ("reference", "torch"):
        with fastlm.use(backend), dispatch.record() as calls:
            fastlm.softmax_xent(x, y).backward()
        assert dict(calls) == {("softmax_xent_fwd", backend): 1, ("softmax_xent_bwd", backend): 1}


def test_a_record_within_another_counts_for_both():
    x, y = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with fastlm.use("torch"), dispatch.record() as outer:
        fastlm.softmax_xent(x, y)
        with dispatch.record() as inner:
            fastlm.softmax_xent(x, y)
        fastlm.softmax_xent(x, y)
    assert dict(inner) == {("softmax_xent_fwd", "torch"): 1} and dict(outer) == {("softmax_xent_fwd", "torch"): 3}


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("opencl",), "no backend 'opencl'; the backends are cuda, triton, cpu"),
        ({"matmul": "cpu"}, "no op 'matmul'; the ops are adamw, attention"),
        ({"cache_append": "triton"}, "cache_append has no triton kernel; it has cuda, cpu, torch, reference"),
    ],
)
def test_unknown_names(arguments, told, monkeypatch):
    monkeypatch.delitem(TABLE["cache_append_"].kernels, "triton")
    with pytest.raises(ValueError, match=told):
        fastlm.use(**arguments) if isinstance(arguments, dict) else fastlm.use(*arguments)
    assert forced("attention") is None


def test_a_backend_without_a_backward_leaves_it_to_others(emulated):
    """The cuda attention has a forward alone."""
    q = torch.randn(1, 5, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    with fastlm.use(attention="cuda-emulated"), dispatch.record() as calls:
        fastlm.attention(q, q, q).sum().backward()
    assert calls["attention_fwd", "cuda-emulated"] == 1
    assert [backend for (op, backend) in calls if op == "attention_bwd"] != ["cuda-emulated"] and len(calls) == 2


def test_a_forced_backend_that_cannot_take_the_call_says_why():
    with fastlm.use("cpu") if dispatch.why_not("attention_fwd", "cpu") is None else pytest.skip("no compiled kernels"):
        with pytest.raises(RuntimeError, match="cannot run on backend 'cpu': .* float32, bfloat16 or float16"):
            fastlm.softmax_xent(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1]))
        with pytest.raises(RuntimeError, match="head dimensions up to 256, got D=300"):
            fastlm.attention(*[torch.zeros(1, 2, 1, 300)] * 3)
        meta = torch.zeros(2, 3, device="meta")
        with pytest.raises(RuntimeError, match="take tensors on cpu, got meta"):
            dispatch._resolve(TABLE["softmax_xent_fwd"], meta, meta, -100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: cuda and triton run")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_environment_names_a_backend_that_cannot_run(backend):
    code = "import torch, fastlm; fastlm.softmax_xent(torch.zeros(2, 3), torch.tensor([0, 1]))"
    done = run(code, FASTLM_BACKEND=backend)
    assert done.returncode == 1
    assert f"fastlm.dispatch.refusal.Refused: FASTLM_BACKEND: backend '{backend}' cannot run here: " in done.stderr
    assert "GPU" in done.stderr or "CUDA" in done.stderr or "compiled kernels" in done.stderr


def test_environment_names_ops():
    code = (
        "import torch, fastlm\nfrom fastlm import dispatch\n"
        "with dispatch.record() as calls: fastlm.softmax_xent(torch.zeros(2, 3), torch.tensor([0, 1]))\n"
        "print(dict(calls))"
    )
    assert "reference" in run(code, FASTLM_BACKEND="softmax_xent=reference,attention=torch").stdout
    assert "wanted a backend, or op=backend" in run(code, FASTLM_BACKEND="softmax_xent=reference,torch").stderr


def test_calls_of_a_model_step():
    """A forward and backward of the model makes each of its ops' calls once a layer, on the chosen backend alone."""
    config = fastlm.GPT2Config(vocab_size=17, n_positions=8, n_embd=16, n_layer=3, n_head=2, attn_pdrop=0.0)
    model = fastlm.GPT2(config)
    tokens = torch.randint(17, (2, 8))
    for backend in ("torch", "reference", "cpu"):
        if dispatch.why_not("attention_fwd", backend) is not None:
            continue
        layers = {"attention_qkv": 3, "bias_gelu": 3, "layer_norm": 7}
        for loss, calls_of_it in ((lambda: model(tokens, tokens)[1], {"softmax_xent_fwd": 1, "softmax_xent_bwd": 1}),
                                  (lambda: model.loss(tokens, tokens), {"linear_xent_grad": 1})):
            with fastlm.use(backend), dispatch.record() as calls:
                loss().backward()
            wanted = {f"{op}_{way}": count for op, count in layers.items() for way in ("fwd", "bwd")} | calls_of_it
            assert dict(calls) == {(op, backend): count for op, count in wanted.items()}


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


class Asked(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "_opname", None))
        return func(*args, **(kwargs or {}))


class Named(torch.Tensor):
    """A subclass that is told of what it is given to."""

    names = []

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.names.append(func._opname)
        return func(*(x.inner if isinstance(x, Named) else x for x in args), **(kwargs or {}))


def a_call(x, weight):
    return fastlm.layer_norm(x, weight, torch.zeros(4, device=x.device))


def test_what_looks_on_sees_the_ops():
    """Calls that pass torch's dispatcher over do so where nobody sees it."""
    x, weight = torch.randn(3, 4, device=DEVICE), torch.ones(4, device=DEVICE, requires_grad=True)
    both = ["layer_norm_fwd", "layer_norm_bwd"]
    with Seen() as mode:
        a_call(x, weight).sum().backward()
    assert [name for name in mode.names if "layer_norm" in name] == both
    with torch.profiler.profile() as profiler:
        a_call(x, weight).sum().backward()
    told = {event.name for event in profiler.events()}
    assert {f"fastlm::{name}" for name in both} <= told
    with torch.no_grad():
        assert "fastlm::grad_norm" in str(torch.jit.trace(fastlm.grad_norm, (x.flatten(),), check_trace=False).graph)
    with torch.no_grad(), Asked() as mode:
        fastlm.grad_norm(x.flatten())
    assert "grad_norm" in mode.names
    with torch.no_grad(), FakeTensorMode() as fake:
        assert a_call(fake.from_tensor(x), fake.from_tensor(weight)).shape == (3, 4)
    with torch.no_grad():
        wanted, found = a_call(x, weight), a_call(x, Named(weight.detach()))
    assert Named.names == ["layer_norm_fwd"] and torch.equal(found, wanted)


@pytest.mark.parametrize("T, D, dtype, capability, first", [
    (1024, 64, torch.bfloat16, (9, 0), "triton"), (2048, 32, torch.float16, (9, 0), "triton"),
    (4096, 64, torch.bfloat16, (9, 0), "torch"), (1024, 128, torch.bfloat16, (9, 0), "torch"),
    (1024, 64, torch.float32, (9, 0), "torch"), (1024, 64, torch.bfloat16, (8, 0), "torch"),
])
def test_who_runs_the_backward_of_attention_on_a_gpu(T, D, dtype, capability, first, monkeypatch):
    """As measured: the order depends on the call, and what it depends on is part of the key."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    qkv, do = torch.empty(1, T, 3, 1, D, dtype=dtype), torch.empty(1, T, 1, D, dtype=dtype)
    row = TABLE["attention_qkv_bwd"]
    assert row.order["cuda"](do, qkv)[0] == first
    short = row.key(do[:, :1], qkv[:, :1], do, None, 1, 1.0, 0.0, None)
    assert (row.key(do, qkv, do, None, 1, 1.0, 0.0, None) == short) == (T <= 2048)
