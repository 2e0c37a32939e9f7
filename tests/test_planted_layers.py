"""Bugs planted in the CPU kernels and in every layer, one at a time: each must make a test fail, which is told.

A CPU bug is planted in a copy of csrc/cpu, compiled for the generic instruction set alone, and the tests of its op run
there. A bug of a layer is planted in a copy of the package, and the test file of that layer runs there.
"""

import importlib.util
import re
import shutil
import sysconfig

import compiled
import pytest
from test_planted import ROOT, copy_package
from test_planted_kernels import altered, ids

pytestmark = pytest.mark.slow

# name: (file, text, what it becomes)
CPU = {
    "mask off by one": ("attention.cpp", "std::clamp(t + 1 + (causal", "std::clamp(t + 2 + (causal"),
    "top-left for bottom-right": ("attention.cpp", "causal == kBottomRight ? S - T : 0", "0"),
    "output not rescaled": ("attention.cpp", "load(tile.o + r * Dp + d) * shrink", "load(tile.o + r * Dp + d)"),
    "delta forgotten": ("attention.cpp", "weight * (load(ds + j) - delta)", "weight * load(ds + j)"),
    "scale forgotten backward": ("attention.cpp", "(load(ds + j) - delta) * op.scale", "(load(ds + j) - delta)"),
    "dropout forgotten backward": ("attention.cpp", "if (op.drop) drop_tile(head.ds, mask, rows, t0, j0);", ""),
    "first queries skipped": ("attention.cpp", "std::max(t, int64_t(0)) / kTile * kTile",
                              "(std::max(t, int64_t(0)) + kTile - 1) / kTile * kTile"),
    "newest token unseen": ("decode_attention.cpp", "length - op.T + t + 1 - s0", "length - op.T + t - s0"),
    "page of another sequence": ("decode_attention.cpp", "op.block_table[b * op.stride_tb + s / op.page]",
                                 "op.block_table[s / op.page]"),
    "run not rescaled": ("running.h", "load(o + d + i * kLanes) * shrink", "load(o + d + i * kLanes)"),
    "int4 without its offset": ("products/int4.cpp", "exact[m][p] - 8 * x_sum", "exact[m][p]"),
    "end of the row lost": ("softmax_xent.cpp", "for (; v < V; v += kLanes) {\n    const Floats values = v + kLanes <= "
                            "V ? load(x + v) : load_tail(x + v, V - v, -kInfinity);\n    s[0]",
                            "for (; v + kLanes <= V; v += kLanes) {\n    const Floats values = load(x + v);\n    s[0]"),
    "gradient without -1": ("softmax_xent.cpp", "[0] - 1.0f) * dloss", "[0]) * dloss"),
    "maximum of half the row": ("softmax_xent.cpp", "maximum(maximum(maximum(m[0], m[1]), maximum(m[2], m[3])))",
                                "maximum(maximum(m[0], m[1]))"),
    "gradient over the logits unscaled": ("softmax_xent.cpp", "row_bwd(x, x, op.V, op.y[n], op.ignore, op.lse[n], "
                                          "op.dloss[n])", "row_bwd(x, x, op.V, op.y[n], op.ignore, op.lse[n], 1.0f)"),
    "gelu's cube": ("gelu.h", "x * 0.044715f", "x * 0.04f"),
    "slope of the cube": ("gelu.h", "0.134145f", "0.044715f"),
    "bias forgotten backward": ("bias_gelu.cpp", "gelu_slope(load(x + c) + load(op.bias + c))",
                                "gelu_slope(load(x + c))"),
    "last block's sums lost": ("columns.h", "block < blocks; block++", "block + 1 < blocks; block++"),
    "unbiased variance": ("layer_norm.cpp", "off.other / float(C)", "off.other / float(C - 1)"),
    "norm's mean of the gradient": ("layer_norm.cpp", "- g_mean - at * gh_mean", "- at * gh_mean"),
    "residual's gradient lost": ("layer_norm.cpp", "ds ? load(ds + c) + slope : slope", "slope"),
    "bias that rides lost": ("layer_norm.cpp", "+ load(op.x_bias + c)", ""),
    "gradient of a bias that rides": ("layer_norm.cpp", "store(dx_bias + c, load(dx_bias + c) + load(dx + c))",
                                      "store(dx_bias + c, load(dx + c))"),
    "weights do not decay": ("adamw.cpp", "p = p * keep -", "p = p -"),
    "a step that is not finite": ("adamw.cpp", "!std::isfinite(*op.scale)", "false"),
    "Adam's first bias correction": ("adamw.cpp", "op.learning_rate / op.bias_correction1", "op.learning_rate"),
    "norm of the first piece": ("grad_norm.cpp", "piece < pieces; piece++) total", "piece < 1; piece++) total"),
    "blocks' attention sees too far": ("gpt2_blocks.cpp", "attention.causal = kBottomRight",
                                       "attention.causal = kFull"),
    "blocks' residual lost": ("gpt2_blocks.cpp", "down.residual = op.s;", "down.residual = op.x;"),
    "blocks' slope forgotten": ("gpt2_blocks.cpp", "down.factor = op.slope;", ""),
    "another block's input": ("gpt2_blocks.cpp", "if (l) one.x = op.between + (l - 1) * N * C;", ""),
    "another norm's statistics": ("gpt2_blocks.cpp", "op.s, parts.ln_2, op.statistics + 2 * N,",
                                  "op.s, parts.ln_2, op.statistics,"),
    "a norm's last rows lost": ("gpt2_blocks.cpp", "i < blocks; i++)\n    for (int64_t c = 0", "i + 1 < blocks; i++)\n"
                                "    for (int64_t c = 0"),
    "a bias's sums of another": ("gpt2_blocks.cpp", "d_qkv + 3 * C * C, d_proj + C * C}",
                                 "d_proj + C * C, d_qkv + 3 * C * C}"),
    "a key sees a query too few": ("attention.cpp", "std::clamp(m - shift, int64_t(0), K)",
                                   "std::clamp(m + 1 - shift, int64_t(0), K)"),
    "weights that were not written": ("attention.cpp", "std::min(up(seen + kRows, kLanes), kTile)",
                                      "std::min(up(seen, kLanes), kTile)"),
    "the first of k alone": ("products/blocked.h", "if (!first) each([&](Floats& value, int64_t place, int) "
                             "{ value += load(op.y + place); });", ""),
    "a tile's edge without bias": ("products/blocked.h", "if (last && op.bias) value += op.bias[n + c];", ""),
    "a panel's end lost": ("products/blocked.h", "for (; i < count; i++) to[i] = from[i];", ""),
    "columns of a that are no whole strip": ("products/blocked.h", "if (m < rows) std::memcpy(",
                                             "if (m + 1 < rows) std::memcpy("),
    "engine's epsilon": ("normalise.h", "variance / float(C) + epsilon", "variance / float(C) + 1e-2f"),
    "engine without gelu": ("products/packed.h", "then == Then::gelu ? gelu(y) : y", "y"),
    "a prompt's first rows alone": ("products/cut.h", "m < M; m += block)", "m < M; m += M)"),
    "engine's residual lost": ("products/packed.h", "then == Then::add ? load(to) + y", "then == Then::add ? y"),
    "engine sees too far": ("gpt2_step.cpp", "head, rows_[m].position + 1)", "head, rows_[m].position + 2)"),
    "engine's positions": ("gpt2_step.cpp", "rows_[m].position * C_", "(rows_[m].position + 1) * C_"),
    "int8 without its offset": ("products/int8.cpp", "exact -= sum_w << 7;", ""),
    "waiting rows' logits": ("gpt2_step.cpp", "op_.logits + places_[e] * Vp_", "op_.logits + e * Vp_"),
    "prompts see too far": ("gpt2_step.cpp", "op.causal = kBottomRight", "op.causal = kFull"),
    "an id one too large": ("gpt2_step.cpp", "op_.tokens[b * op_.T + t], 0, op_.V)",
                            "op_.tokens[b * op_.T + t], 0, op_.V + 1)"),
    "a page too many": ("gpt2_step.cpp", "+ i], 0, op_.pages)", "+ i], 0, op_.pages + 1)"),
    "a position behind the room": ("gpt2_step.cpp", "room - count + 1)", "room - count + 2)"),
    "another place of a line": ("checksum.cpp", "of_sums[i] += of[i]", "of_sums[i] += words[i]"),
    "a span's last bytes": ("checksum.cpp", "(bytes_of(span) + kLine - 1) / kLine", "bytes_of(span) / kLine"),
    "another row's number": ("gpt2_step.cpp", "op_.uniform[b * op_.stride_u + *op_.step]",
                             "op_.uniform[*op_.step]"),
    "few rows in blocks": ("products/cut.h", "M < 4 ? M : up(", "up("),
    "a row's activations of another": ("products/tiles.h", "acts.row<typename W::Act>(m0)",
                                      "acts.row<typename W::Act>(0)"),
    "a head's values in place of its keys": ("paged.h", "copy(head.at<T>(head.k, s), k)",
                                             "copy(head.at<T>(head.k, s), v)"),
    "every step's draw alike": ("gpt2_step.cpp", "++*op_.step", "0"),
    "drawn set one short": ("draw.h", "if (before >= wanted)", "if (before + p >= wanted)"),
    "another than the k-th": ("draw.h", "return some[k - 1];", "return some[0];"),
    "infinity may be drawn": ("draw.h", "if (std::fabs(top) == kInfinity) return kBad;", ""),
    "another lane's score": ("simd.h", "kLanes + l / piece * piece + l % half)...>(x[i], x[i + half]) +",
                             "kLanes + l % half)...>(x[i], x[i + half]) +"),
    "values in place of keys": ("cache_append.cpp", "std::memcpy(to_k, k, row);", "std::memcpy(to_k, v, row);"),
    "pad appended": ("cache_append.cpp", "if (position < 0) return;", "if (position < -1) return;"),
}

HOMES = {  # the tests of what is no op
    "gpt2_step": "engine", "draw": "engine", "products": "engine", "checksum": "generation_state",
}
HEADERS = {  # and the sources that are compiled with it
    "running.h": ["decode_attention"], "gelu.h": ["bias_gelu"], "columns.h": ["bias_gelu"],
    "draw.h": ["draw", "gpt2_step"], "simd.h": ["decode_attention"], "normalise.h": ["gpt2_step"],
    "paged.h": ["gpt2_step"],
    "products/blocked.h": ["gpt2_blocks"], "products/cut.h": ["gpt2_step"],
    **{f"products/{name}.h": [f"products/{kind}" for kind in ("f32", "bf16", "int8", "int4")] for name in
       ("packed", "tiles")},
}

# name: (file, text, what it becomes, the tests that run)
LAYERS = {
    "GB/s of megabytes": ("benchmarks/harness.py", "case.bytes / taken.median * 1e-9",
                          "case.bytes / taken.median * 1e-6", "test_bench.py"),
    "wrong kernels are timed": ("benchmarks/harness.py", 'if not row["error"] <= 1 and row["ours"]:', "if False:",
                                "test_bench.py"),
    "drift forgotten": ("benchmarks/compare.py", "self.new_us / self.old_us / self.drift", "self.new_us / self.old_us",
                        "test_bench.py"),
    "what lies between two passes hidden": ("benchmarks/harness.py", "max(both.spread, abs(", "min(both.spread, abs(",
                                            "test_bench.py"),
    "operands stay warm": ("fastlm/measure/clock.py", "itertools.cycle(calls)\n        once",
                           "itertools.cycle(calls[:1])\n        once", "test_measure.py"),
    "the first is always first": ("fastlm/measure/clock.py", "first = turn % len(names)", "first = 0",
                                  "test_measure.py"),
    "a busy machine lowers the roof": ("fastlm/measure/roofs.py", "max(found.copy, known.copy), read=max(found.read, "
                                       "known.read)", "found.copy, read=found.read", "test_measure.py"),
    "order of another dtype": ("fastlm/measure/tuned.py", ".get((family, dtype))", '.get((family, DTYPES["fp32"]))',
                               "test_tune.py"),
    "a refused force is passed over": ("fastlm/dispatch/__init__.py", "if backend in row.kernels:  #",
                                       "if backend in row.kernels and why_not(row.name, backend, *args) is None:  #",
                                       "test_dispatch.py"),
    "a hook is passed over": ("fastlm/fast_path.py", 'if why_not(model, "transformer.h") is not None:', "if False:",
                              "test_gpt2_blocks.py"),
    "an instance's forward is passed over": ("fastlm/fast_path.py", "if call in module.__dict__:", "if False:",
                                             "test_fast_path.py"),
    "a model's own hooks are passed over": ("fastlm/generation/generate.py", "if fast_path.own_call(model):",
                                            "if False:", "test_changed_models.py"),
    "an attention's own dropout": ("fastlm/gpt2.py", "elif self.drops_attention():",
                                   "elif self.training and self.config.attn_pdrop:", "test_changed_models.py"),
    "another class's place": ("fastlm/fast_path.py", "if type(module) is not kind:", "if type(module) not in _PLAIN:",
                              "test_fast_path.py"),
    "weights of before": ("fastlm/generation/derived.py", "not found.holds(whole)", "False",
                          "test_generation_state.py"),
    "a view read as if dense": ("fastlm/generation/engine.py", 'detach().contiguous() for name in ("wte"',
                                'detach() for name in ("wte"', "test_fast_path.py"),
    "dropout in generation": ("fastlm/generation/inference.py", "if function in _MODES:", "if False:",
                              "test_generation_state.py"),
    "another sample's operand": ("fastlm/dispatch/samples.py", "leaf.movedim(dim, 0)", "leaf", "test_functional.py"),
    "a profiler that looks on": ("fastlm/dispatch/__init__.py", "or _profiler_enabled()\n",
                                 "\n", "test_dispatch.py"),
    "a gradient's gradient left out": ("fastlm/ops/once.py", 'told = f"{op} is differentiable once: the gradient of '
                                       'its gradient was asked for"', "return run(*operands)", "test_functional.py"),
    "a replaced layer's bias twice": ("fastlm/gpt2.py", "if fast_path.is_plain(self.c_fc, Conv1D) and",
                                      "if hasattr(self.c_fc, 'bias') and", "test_adapters.py"),
    "a replaced head is passed over": ("fastlm/heads.py", "if fast_path.is_plain(head, nn.Linear):",
                                       "if hasattr(head, 'weight'):", "test_adapters.py"),
    "a head's bias is no part of the loss": ("fastlm/heads.py", "w = F.pad(torch.cat([w, head.bias",
                                             "w = F.pad(torch.cat([w, 0 * head.bias", "test_heads.py"),
    "a loss's scale is lost": ("fastlm/ops/linear_xent.py", "factor = factor * scale", "pass",
                               "test_heads.py"),
    "fp16 gradients of a mean are rounded away": ("fastlm/ops/softmax_xent.py", "x.dtype == torch.float16", "False",
                                                  "test_softmax_xent.py"),
    "pads are drawn": ("fastlm/generation/generate.py", "model.config.unpadded_vocab_size or V", "V", "test_heads.py"),
    "a head that differs is tied": ("fastlm/pretrained.py", "torch.equal(model.lm_head.weight, model.transformer.wte",
                                    "torch.equal(model.transformer.wte.weight, model.transformer.wte", "test_heads.py"),
    "an attention's own scale is lost": ("fastlm/generation/cache.py", "self._total, scale=scale)", "self._total)",
                                         "test_parity.py"),
    "a mask's order is not undone": ("fastlm/gpt2.py", "hidden.gather(1, back[..., None].expand_as(hidden))", "hidden",
                                     "test_parity.py"),
    "the config is saved as it was": ("fastlm/described.py", '"n_layer": len(blocks)', '"n_layer": config.n_layer',
                                      "test_model.py"),
    "use is not undone": ("fastlm/dispatch/forcing.py", "_forced.update(self._former)", "", "test_dispatch.py"),
    "an ended row goes on": ("fastlm/generation/step.py", "alive & (drawn != self._stop)", "alive",
                             "test_engine.py"),
    "every step draws alike": ("fastlm/generation/step.py", "self._at.add_(1)", "", "test_engine.py"),
    "an ended row of the engine goes on": ("fastlm/generation/step.py", "0 if token == self._stop else self._left",
                                           "self._left", "test_engine.py"),
    "top_p one short": ("fastlm/generation/sampling.py", "ordered.cumsum(-1) - ordered >= top_p",
                        "ordered.cumsum(-1) >= top_p", "test_generation.py"),
    "accumulation sums": ("fastlm/training/step.py", "scale = count / config.batch_size if", "scale = 1.0 if",
                          "test_training_step.py"),
    "a chunk's gradient lost": ("fastlm/backends/chunked.py", "if total is None else total.add_(part)", "",
                                "test_linear_xent.py"),
    "the mean over all rows": ("fastlm/ops/linear_xent.py", "(y != ignore).sum() if count is None else count",
                               "len(y)", "test_linear_xent.py"),
    "gradients are not clipped": ("fastlm/training/optimizer.py", "weight_decay=part.decay, scale=scale)",
                                  "weight_decay=part.decay)", "test_training_optimizer.py"),
    "a step without a finite loss": ("fastlm/training/optimizer.py", "else norm.isfinite() & loss.isfinite()",
                                     "else norm.isfinite()", "test_training_optimizer.py"),
    "the last step's rate": ("fastlm/training/optimizer.py", "math.cos(math.pi * part)", "math.cos(2 * math.pi * part)",
                             "test_training_optimizer.py"),
    "a skipped step counts": ("fastlm/training/step.py", "if finite := math.isfinite(norm) and math.isfinite(loss):",
                              "if finite := True:", "test_training_step.py"),
    "the random numbers begin anew": ("fastlm/training/state.py", 'generator.set_state(moments[f"rng.{name}"])', "pass",
                                      "test_training_checkpoint.py"),
    "rows of another run": ("fastlm/training/metrics.py", "os.truncate(file, length)", "pass",
                            "test_training_checkpoint.py"),
    "a damaged checkpoint is loaded": ("fastlm/training/checkpoint.py", 'if manifest[name]["sha256"] != _sha256(path / '
                                       'name):', "if False:", "test_training_checkpoint.py"),
    "data of other text is taken": ("fastlm/data/fingerprint.py", "if found.get(key) != wanted[key]], True",
                                    'if key != "text" and found.get(key) != wanted[key]], True',
                                    "test_training_setup.py"),
    "a setting yields to the checkpoint": ("fastlm/training/setup.py", 'if "dropout" in asked:', "if False:",
                                           "test_training_setup.py"),
    "an added token is spelled": ("fastlm/data/tokenizer.py", "index not in added and ", "", "test_tokenizer.py"),
    "every batch draws alike": ("fastlm/generation/generate.py", '"first_prompt": first}', '"first_prompt": 0}',
                                "test_generation_command.py"),
    "targets are the tokens": ("fastlm/data/loader.py", "windows[:, 1:].contiguous()", "windows[:, :-1].contiguous()",
                               "test_data_loader.py"),
    "the certificate allows all": ("fastlm/measure/certificate.py", "return self.ratio <= 1", "return True",
                                   "test_certificate.py"),
    "a failure is a refusal": ("fastlm/measure/certificate.py", "failed = not isinstance(error, Refused)",
                               "failed = False", "test_refusals.py"),
    "our failure is a refusal": ("benchmarks/harness.py", "if not ours or isinstance(error, Refused):",
                                 "if True:", "test_refusals.py"),
    "another's backward is credited": ("fastlm/measure/certificate.py",
                                       "for op, backend in calls:\n        if backward or",
                                       "for op, backend in calls:\n        if False and backward or",
                                       "test_refusals.py"),
    "NaN behind a good result": ("fastlm/measure/numerics.py", "if self.error != self.error:", "if False:",
                                 "test_refusals.py"),
    "the backward's backend for all": ("fastlm/training/setup.py", "if backends.setdefault(", "if backends.get(",
                                       "test_training.py"),
}

RUN = """
import sys
package = {package!r}
if package:
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__.lower()
                        and "ScikitBuild" not in type(finder).__name__]
    sys.path.insert(0, package)
sys.path.insert(0, {tests!r})
import pytest
if package:
    import fastlm
    assert fastlm.__file__.startswith(package), fastlm.__file__
sys.exit(pytest.main(["-x", "-q", "--rootdir", {root!r}, "-c", {root!r} + "/pyproject.toml", "-p", "no:cacheprovider",
                      *{options}, {test!r}]))
"""


def failed(done):
    """The name of the test that failed."""
    names = re.findall(r"^FAILED \S*::(\S+)", done.stdout, re.MULTILINE)
    assert done.returncode == 1 and names, f"nobody noticed\n{done.stdout[-2000:]}{done.stderr[-1000:]}"
    return names[0]


def compile_cpu(sources, folder, level="-O1"):
    """The objects of sources of `folder`, csrc/cpu or a copy, for the generic instruction set."""
    import pybind11

    includes = [f"-I{path}" for path in (ROOT / "csrc", compiled.declared(), pybind11.get_include(),
                                         sysconfig.get_path("include"))]
    flags = ["-std=c++20", level, "-fPIC", "-fopenmp", "-fno-math-errno", "-DFASTLM_ISA=generic",
             "-DFASTLM_BUILT=X(generic)", *includes]
    headers = [*sorted((ROOT / "csrc").glob("*.h")), *sorted(folder.rglob("*.h"))]
    return compiled.objects(dict.fromkeys(sources, flags), headers, [folder])


def run_cpu(forks, tmp_path, op, altered=(), folder=None):
    """The tests of an op on the CPU kernels, the sources named in `altered` being those of `folder`."""
    own = ROOT / "csrc" / "cpu"
    sources = [ROOT / "csrc" / "bindings.cpp", *sorted(own.rglob("*.cpp"))]
    parts = compile_cpu([path for path in sources if path not in [own / f"{name}.cpp" for name in altered]], own)
    # First: of a header's functions that several sources hold the linker takes the first.
    parts = [*compile_cpu([folder / f"{name}.cpp" for name in altered], folder, "-O0"), *parts] if altered else parts
    library = compiled.linked(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", ["-shared", "-fopenmp"], parts)
    home = HOMES.get(op, op)
    script = RUN.format(
        package="", tests=str(ROOT / "tests"), root=str(ROOT), test=f"{ROOT}/tests/test_{home}.py",
        options=["-p", "sanitized", "-k", "cpu" if home == op else "not lower"])
    return forks.run(script, tmp_path, FASTLM_SANITIZED=str(library))


def test_no_cpu_bug(forks, tmp_path):
    done = run_cpu(forks, tmp_path, "attention")
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name", CPU, ids=ids(CPU))
def test_every_bug_in_cpu_is_caught(name, forks, tmp_path, tell):
    file, folder = CPU[name][0], tmp_path / "cpu"
    shutil.copytree(ROOT / "csrc" / "cpu", folder)
    (folder / file).write_text(altered(folder, "", CPU[name]))
    sources = HEADERS.get(file, [file.removesuffix(".cpp")])
    op = sources[0].split("/")[0]
    tell(f"{name}: {failed(run_cpu(forks, tmp_path, op, sources, folder))}")


def run_layer(forks, package, test):
    if (spec := importlib.util.find_spec("fastlm._C")) is not None:
        shutil.copy(spec.origin, package / "fastlm")
    tests = ROOT / "tests"
    script = RUN.format(package=str(package), tests=str(tests), root=str(ROOT), test=str(tests / test), options=[])
    return forks.run(script, package, timeout=900)


def test_no_bug_in_a_layer(forks, tmp_path):
    done = run_layer(forks, copy_package(tmp_path), "test_measure.py")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name", LAYERS, ids=ids(LAYERS))
def test_every_bug_in_a_layer_is_caught(name, forks, tmp_path, tell):
    file, text, wrong, test = LAYERS[name]
    path = copy_package(tmp_path) / file.replace("benchmarks/", "fastlm/benchmarks/")
    source = path.read_text()
    assert source.count(text) == 1, f"{text!r} is {source.count(text)} times in {file}"
    path.write_text(source.replace(text, wrong))
    tell(f"{name}: {failed(run_layer(forks, tmp_path, test))}")
