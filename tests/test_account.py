"""The account of a training step: by hand where that is easy, and what reads once more shows in it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from conftest import GPU
from typer.testing import CliRunner

pytest.importorskip("triton", reason="triton is not installed")
if GPU:
    pytest.skip("a GPU is here: nothing is interpreted", allow_module_level=True)

import fastlm
from fastlm import ops
from fastlm.benchmarks import account, fake_gpu, harness
from fastlm.cli import app
from fastlm.dispatch.table import TABLE

TINY = {"B": 2, "T": 64, "L": 2, "H": 2, "C": 128, "V": 1000}
N, C, L = TINY["B"] * TINY["T"], TINY["C"], TINY["L"]
LARGE = 2**20  # bytes of an argument from which a second pass of it comes from memory


@pytest.fixture(autouse=True)
def poisoned():
    """Nothing is: a fill would count."""


@pytest.fixture(scope="module")
def tiny():
    return account.step(TINY)


@pytest.fixture(scope="module")
def whole():
    """A step of GPT-2 124M, B = 32, T = 1024."""
    return account.step()


def made(*shape, dtype=torch.bfloat16, **options):
    return torch.empty(*shape, dtype=dtype, device="cuda", **options)


def bytes_of(counts, *key):
    row = counts.account.rows[key]
    return row.read, row.written, row.asked


# ---- by hand


def test_layer_norm_forward():
    """x and y in bf16, the residual and the sum in fp32; each of N programs asks for weight and bias."""
    with account.counting() as counts:
        weight, bias, residual = (made(*shape, dtype=torch.float32) for shape in ((C,), (C,), (N, C)))
        fastlm.layer_norm(made(N, C), weight, bias, residual=residual, dtype=torch.bfloat16)
    read, written, asked = bytes_of(counts, "layer_norm_fwd", "_layer_norm_fwd_kernel")
    assert (read, written) == (6 * N * C + 8 * C, 6 * N * C + 8 * N)
    assert asked == 6 * N * C + 8 * C * N + written
    assert counts.account.minima["layer_norm_fwd", False] == read + written


def test_adamw():
    n = 5000
    with account.counting() as counts:
        fastlm.adamw_(*(made(n, dtype=torch.float32) for _ in range(4)), step=1, learning_rate=1e-3)
    assert bytes_of(counts, "adamw_", "_adamw_kernel") == (16 * n, 12 * n, 28 * n)


def test_attention_asks_for_keys_again():
    """Two tiles of 64 queries: the second looks at the first's keys once more, which are in memory once."""
    B, T, H, D = 1, 128, 2, 64
    one = 2 * B * T * H * D
    with account.counting() as counts, fastlm.use(attention="triton"):
        fastlm.attention_qkv(made(B, T, 3, H, D))
    read, written, asked = bytes_of(counts, "attention_qkv_fwd", "_attention_fwd_kernel")
    assert (read, written) == (3 * one, one + 4 * B * H * T)
    assert asked == one + 2 * 1.5 * one + written


def test_the_loss_on_cuda_kernels():
    """Logits of a chunk are read and written once; the head's copy is padded to a multiple of 64 rows."""
    V, padded = 1000, 1024
    with account.counting() as counts, fake_gpu.autograd_of(leaves := [made(N, C, requires_grad=True)]):
        fastlm.linear_xent(*leaves, made(V, C, dtype=torch.float32), made(N, dtype=torch.int64))
    assert counts.account.backends == {"linear_xent_grad": "cuda"}
    read, written, _ = bytes_of(counts, "linear_xent_grad", "softmax_xent_, CUDA")
    assert (read, written) == (2 * N * V + 4 * N + 8 * N, 2 * N * V + 8 * N)
    products, sizes = counts.account.whole(True), (N * C, padded * C, N * padded)  # of h and dh, of w and dw, of logits
    assert products.read == 2 * sum(2 * size for size in sizes)
    assert products.written == sum(2 * size for size in sizes) + 2 * padded * C  # dw adds up in fp32


def test_operations_between_ops():
    with account.counting() as counts:
        x, few = made(8, 4, dtype=torch.float32), made(3, dtype=torch.int64)
        x.t().unsqueeze(0).expand(5, 4, 8)
        assert not counts.account.rows
        x[:1].expand(8, 4) + x  # four numbers, read once, and 32
        assert bytes_of(counts, "add, forward", "add") == (16 + 128, 128, 272)
        x.mul_(2.0)
        assert bytes_of(counts, "mul_, forward", "mul_") == (128, 128, 256)
        x.zero_()
        assert bytes_of(counts, "zero_, forward", "zero_") == (0, 128, 128)
        torch.nn.functional.embedding(few, x)
        assert bytes_of(counts, "embedding, forward", "embedding") == (3 * 16 + 24, 3 * 16, 2 * 48 + 24)
        x.scatter_add_(0, made(1, 4, dtype=torch.int64), made(1, 4, dtype=torch.float32))
        assert bytes_of(counts, "scatter_add_, forward", "scatter_add_") == (32 + 16 + 16, 16, 80)


@pytest.mark.parametrize("op", ["adamw", "attention", "bias_gelu", "grad_norm", "layer_norm", "linear_xent"])
def test_the_minimum_is_the_benchmarks_least_traffic(op):
    """But for what has one dimension less."""
    dtype = "fp32" if op in ("adamw", "grad_norm") else "bf16"
    with account.counting() as counts:
        case = harness.suite([op], device="cuda", shape=None, dtypes=[dtype])[-1]
        case.ours(*case.operands())
    found = sum(bytes for (name, product), bytes in counts.account.minima.items()
                if name.startswith(op) and not product)
    assert case.bytes <= found <= 1.03 * case.bytes


def test_memory_is_counted_while_it_is_there():
    with account.counting() as counts:
        x = made(1024, dtype=torch.float32)
        y = x[:10].clone()
        assert counts.account.memory == 4096 + 512
        view = x[5:]
        del x, y
        assert (counts.account.memory, counts.account.peak) == (4096, 4096 + 512)
        del view
    assert counts.account.memory == 0


def test_a_tiny_step(tiny):
    assert tiny.memory == 0 and len(tiny.waits) == 2
    rows = {key: row.launches for key, row in tiny.rows.items()}
    assert rows["layer_norm_fwd", "_layer_norm_fwd_kernel"] == 2 * L + 1
    assert rows["bias_gelu_bwd", "_bias_gelu_bwd_kernel"] == L
    assert {op: tiny.backends[op] for op in ("attention_qkv_fwd", "attention_qkv_bwd", "linear_xent_grad")} == {
        "attention_qkv_fwd": "torch", "attention_qkv_bwd": "triton", "linear_xent_grad": "cuda"}
    record = tiny.record(TINY, "bf16")
    assert sum(row["launches"] for row in record["totals"]) == sum(rows.values())


# ---- what reads once more shows


def test_a_pass_more_between_ops_shows(tiny, monkeypatch):
    module = ops.module("bias_gelu")
    gradients = module._gradients
    monkeypatch.setattr(module, "_gradients", lambda dy, *rest: gradients(dy.clone(), *rest))
    found = account.step(TINY)
    pass_ = 2 * N * 4 * C
    before, after = tiny.whole(False), found.whole(False)
    assert after.read - before.read == after.written - before.written == L * pass_
    assert after.launches - before.launches == L


# name: (file, op, text, what it becomes, bytes that a launch asks for beyond)
READS = {
    "an input read twice": (
        "layer_norm", "layer_norm_fwd", "    mean = tl.sum(s, axis=0) / C",
        "    mean = tl.sum(s + tl.load(residual_ptr + n * stride_rn + c, mask=inside), axis=0) / C", 4 * N * C),
    "an output read back": (
        "bias_gelu", "bias_gelu_bwd", "        dbias += tl.sum(dx, axis=0)",
        "        dbias += tl.sum(tl.load(dx_ptr + n[:, None] * C + c[None, :], mask=inside).to(tl.float32), axis=0)",
        2 * N * 4 * C),
}


@pytest.mark.parametrize("name", READS)
def test_a_kernel_that_reads_once_more_shows(name, monkeypatch, tmp_path):
    file, op, text, more, size = READS[name]
    before = _called(file)
    plant(monkeypatch, tmp_path, file, op, text, more)
    after = _called(file)
    assert after.asked - before.asked == size
    assert after.launches == before.launches


def plant(monkeypatch, tmp_path, file, op, text, more):
    """Has an op run on a copy of its Triton module with another text."""
    source = Path(importlib.import_module(f"fastlm.kernels.{file}").__file__).read_text()
    assert source.count(text) == 1, f"{text!r} is no longer once in {file}"
    path = tmp_path / f"planted_{file}.py"
    path.write_text(source.replace(text, more))
    spec = importlib.util.spec_from_file_location(f"fastlm.kernels.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(TABLE[op].kernels, "triton", spec.name)


def _called(file):
    """What a call of an op comes to; of bias_gelu with its gradient."""
    wide = {"dtype": torch.float32}
    with account.counting() as counts:
        if file == "layer_norm":
            fastlm.layer_norm(made(N, C), made(C, **wide), made(C, **wide), residual=made(N, C, **wide))
        else:
            x = made(N, 4 * C, requires_grad=True)
            torch.autograd.grad(fastlm.bias_gelu(x, made(4 * C, **wide)), x, made(N, 4 * C))
    return counts.account.whole(False)


# ---- GPT-2 124M


def test_124m_asks_for_60_gb(whole, tell):
    rest, products = whole.whole(False), whole.whole(True)
    tell(f"a step of 124M: {rest.bytes / 1e9:.1f} GB beside {products.bytes / 1e9:.1f} of products, "
         f"{rest.launches + products.launches} launches, {whole.peak / 2**30:.2f} GiB")
    assert rest.bytes <= 60e9
    assert whole.peak <= 13.8 * 2**30 and rest.launches + products.launches <= 700


def test_124m_waits_for_its_two_numbers(whole):
    """Norm and loss are read together at the step's end."""
    names = [wait.split(" at ")[0] for wait in whole.waits]
    assert names == ["_local_scalar_dense"] * 2
    assert [wait.split(", ")[-1] for wait in whole.waits] == ["update"] * 2


def test_124m_kernels_read_and_write_once(whole):
    """All that is large, but what attention's tiles share."""
    again = {key: value for key, value in whole.passes.items() if value[0] >= LARGE and max(value[1:]) > 1.02}
    assert {kernel for kernel, _ in again} <= {"_attention_bwd_keys_kernel", "_attention_bwd_queries_kernel"}
    assert len([value for value in whole.passes.values() if value[0] >= LARGE]) > 20


def test_a_kernel_that_is_not_interpreted_is_told():
    from triton.runtime.jit import JITFunction

    kernel = importlib.import_module("fastlm.kernels.adamw")._adamw_kernel.fn
    with account.counting(), pytest.raises(RuntimeError, match="_adamw_kernel is not interpreted"):
        JITFunction(kernel)[(1,)]()


def test_the_command(tmp_path):
    out = tmp_path / "account.json"
    shape = ",".join(f"{letter}={size}" for letter, size in TINY.items())
    done = CliRunner().invoke(app, ["explain", "step", "--shape", shape, "--json", str(out)], env={"COLUMNS": "150"})
    assert done.exit_code == 0, done.output
    assert "layer_norm_bwd" in done.output and "the host waits 2 times" in done.output and out.exists()
    for wrong, told in ((["--shape", "N=3"], "a step has no size N"), (["--dtype", "fp16"], "wanted fp32 or bf16")):
        assert told in str(CliRunner().invoke(app, ["explain", "step", *wrong]).exception)
