"""Bugs planted on purpose, one at a time: each must be caught by the checks that the other tests make.

A bug is a change of source text, planted in a copy of the package that a process of its own imports. It runs the
checks below, which are those of test_parity, test_attention, test_softmax_xent and test_generation on small sizes, on
the `reference` and `torch` backends; it must fail.
"""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed to compare with")
ROOT = Path(__file__).parent.parent

# name: (file, text, what it becomes)
BUGS = {
    "attention scale 10 % off": ("fastlm/ops/attention.py", "D**-0.5", "1.1 * D**-0.5"),
    "causal mask off by one": ("fastlm/backends/reference.py", "[:, None] + (S - T if", "[:, None] + 1 + (S - T if"),
    "mask top-left for bottom-right": ("fastlm/backends/reference.py", "S - T if causal == 1 else 0", "0"),
    "erf GELU for tanh": ("fastlm/backends/reference.py", "torch.tanh(_gelu_argument(u))))", "torch.erf(u / 2**0.5)))"),
    "layer norm epsilon": ("fastlm/gpt2.py", "eps=config.layer_norm_epsilon", "eps=1e-3"),
    "missing bias": ("fastlm/gpt2.py", "torch.addmm(self.bias,", "torch.addmm(0 * self.bias,"),
    "residual forgotten": ("fastlm/gpt2.py", "return x, *self.mlp.unbiased(normed)",
                           "return 0 * x, *self.mlp.unbiased(normed)"),
    "a bias that rides is lost": ("fastlm/gpt2.py", "bias=False), part.c_proj.bias",
                                  "bias=False), 0 * part.c_proj.bias"),
    "q and k exchanged": ("fastlm/backends/reference.py", 'torch.einsum("bthd,bshd->bhts", q, k) * scale',
                          'torch.einsum("bthd,bshd->bhts", k, q) * scale if q.shape == k.shape else '
                          'torch.einsum("bthd,bshd->bhts", q, k) * scale'),
    "final norm left out": ("fastlm/fast_path.py", "return ln_f(added, x, bias)[0]",
                            "return x + added + bias + 0 * ln_f(added, x, bias)[0]"),
    "lost gradient of the tied head": ("fastlm/heads.py", "h, w = hidden.view(-1, hidden.shape[-1]), head.weight",
                                       "h, w = hidden.view(-1, hidden.shape[-1]), head.weight.detach()"),
    "lost gradient of the embedding": ("fastlm/gpt2.py", "x = (wte(tokens, sparse=True) if sparse else wte(tokens))",
                                       "x = wte(tokens).detach()"),
    "ignored label counted": ("fastlm/ops/softmax_xent.py", "(y != ignore).sum()", "y.numel()"),
    "ignored label counted without logits": ("fastlm/ops/linear_xent.py", "(y != ignore).sum()",
                                             "torch.tensor(y.numel())"),
    "unbiased variance": ("fastlm/backends/reference.py", ".square().mean(1) + epsilon",
                          ".square().sum(1) / (s_.shape[1] - 1) + epsilon"),
    "norm's mean of the gradient": ("fastlm/backends/reference.py", "g - g.mean(1, keepdim=True) -", "g -"),
    "residual's gradient lost": ("fastlm/backends/reference.py", "dx if ds is None else dx + ds.to(mean.dtype)", "dx"),
    "labels shifted again": ("fastlm/gpt2.py", "targets.reshape(-1))", "targets.roll(-1, 1).reshape(-1))"),
    "gradient of an ignored row": ("fastlm/backends/reference.py", ".masked_fill(ignored[:, None], 0.0)", ""),
    "loss gradient without -1": ("fastlm/backends/reference.py", "(dx - (vocab == y[:, None]).to(dx.dtype))", "dx"),
    "delta forgotten": ("fastlm/backends/reference.py", "(dp - delta) * scale", "dp * scale"),
    "scale forgotten backward": ("fastlm/backends/reference.py", "(dp - delta) * scale", "(dp - delta)"),
    "dropout scale": ("fastlm/backends/reference.py", "256 / (256 - drop)", "1.0"),
    "dropout mask of another head": ("fastlm/backends/philox.py", "(seed[2] << 16) | h", "(seed[2] << 16) | 0 * h"),
    "stale cache slot": ("fastlm/backends/reference.py", "block_table[b, position // page]), position % page",
                         "block_table[b, position // page]), max(position - 1, 0) % page"),
    "page of another sequence": ("fastlm/backends/reference.py", "int(block_table[b, position // page])",
                                 "int(block_table[0, position // page])"),
    "lengths without the new token": ("fastlm/generation/cache.py", "self._total = self.lengths + counts",
                                      "self._total = self.lengths + counts - (0 if self._empty else 1)"),
    "position of the pad": ("fastlm/generation/cache.py", "positions = self.lengths[:, None] + columns",
                            "positions = self.lengths.max() + columns.expand(len(self.lengths), -1)"),
    "transposed weight": ("fastlm/pretrained.py", "wanted[name].copy_(tensor)",
                          "wanted[name].copy_(tensor.T if tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1] "
                          "else tensor)"),
}

CHECKS = """
import sys
sys.path[:0] = [{package!r}, {tests!r}]
import importlib.abc
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__.lower()
                    and "ScikitBuild" not in type(finder).__name__]
import torch, tempfile
import fastlm, parity
assert fastlm.__file__.startswith({package!r}), fastlm.__file__
torch.set_num_threads(1)

def hold(ours, eager, told):
    for name, difference in parity.differences(ours, eager).items():
        assert difference < 2e-5, (told, name, difference)

for backend in ("reference", "torch"):
    with fastlm.use(backend):
        model = parity.make(vocab_size=61, n_positions=24, n_embd=24, n_layer=2, n_head=3)
        theirs = parity.twin(model)
        tokens, targets = parity.batch(model, 4, 20)
        hold(parity.step(model, tokens, targets), parity.step(theirs, tokens, targets), backend)
        without = model.loss(tokens, targets).item()
        assert abs(model(tokens, targets)[1].item() - without) < 1e-4 * without, "the loss with logits"
        folder = tempfile.mkdtemp()
        model.save_pretrained(folder)
        again = fastlm.GPT2.from_pretrained(folder)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters())), "files"
        prompts = [torch.arange(5, n + 5) for n in (1, 7, 3)]  # without 0, which transformers takes for a pad
        for prompt, row in zip(prompts, model.eval().generate(prompts, max_new_tokens=12, temperature=0)):
            wanted = theirs.eval().generate(prompt[None], max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
            assert row.tolist() == wanted.tolist(), "greedy tokens"

from test_attention import check, operands
from test_softmax_xent import check as check_loss, labels
torch.manual_seed(0)
with fastlm.use("reference"):
    for T, S, causal in ((5, 5, True), (3, 8, True), (8, 3, True), (4, 7, "top-left")):
        check("reference", *operands(2, T, S, 2, 8, torch.float32), causal)
    check("reference", *operands(2, 20, 20, 2, 8, torch.float32), dropout=0.25)
    check_loss(torch.randn(4, 37), labels(4, 37), "reference")
    mask = fastlm.backends.philox.keep_mask(torch.tensor([1, 2, 3, 4]), 1, 2, 8, 64, 100)
    assert not torch.equal(mask[:, 0], mask[:, 1]), "heads share a mask"
print("passed")
"""


def run_checks(forks, package):
    return forks.run(CHECKS.format(package=str(package), tests=str(ROOT / "tests")), package, timeout=300)


def copy_package(to):
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "results")
    shutil.copytree(ROOT / "fastlm", to / "fastlm", ignore=ignore)
    for name in ("kernels", "benchmarks"):
        shutil.copytree(ROOT / name, to / "fastlm" / name, ignore=ignore)
    return to


def test_nothing_planted(forks, tmp_path):
    done = run_checks(forks, copy_package(tmp_path))
    assert done.returncode == 0 and "passed" in done.stdout, done.stderr[-3000:]


def plant(forks, tmp_path, name):
    file, text, wrong = BUGS[name]
    path = copy_package(tmp_path) / file
    source = path.read_text()
    assert source.count(text) >= 1, f"{text!r} is no longer in {file}"
    path.write_text(source.replace(text, wrong))
    return run_checks(forks, tmp_path)


def test_a_planted_bug_is_caught(forks, tmp_path):
    done = plant(forks, tmp_path, "attention scale 10 % off")
    assert done.returncode and "AssertionError" in done.stderr, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_every_planted_bug_is_caught(name, forks, tmp_path, tell):
    done = plant(forks, tmp_path, name)
    assert done.returncode and "passed" not in done.stdout, f"{name}: nobody noticed"
    told = done.stderr.splitlines()[-1]  # by a check, not by an import that failed
    assert told.startswith(("AssertionError", "RuntimeError: the logits of row")), done.stderr[-2000:]
    tell(f"{name}: {told[:110]}")
