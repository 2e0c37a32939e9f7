"""Bugs planted in the Triton and CUDA kernels, one at a time: each must be caught; which test catches it is told.

A Triton bug is planted in a copy of the package, and the tests of its op run there on interpreted Triton; a CUDA bug is
planted in a copy of the .cu, and its sanitized sweep runs.
"""

import re

import pytest
import test_cuda_emulated
from test_planted import ROOT, copy_package

pytest.importorskip("triton", reason="triton is not installed")

# name: (file, text, what it becomes)
TRITON = {
    "mask off by one": ("attention", "tl.minimum(last, t + offset)", "tl.minimum(last, t + offset + 1)"),
    "keys' mask off by one": ("attention", "(s - offset - t0)[:, None] <=", "(s - offset - t0 - 1)[:, None] <="),
    "a key after the last seen": ("attention", "tl.zeros_like(t) + (S - 1)", "tl.zeros_like(t) + S"),
    "diagonal tiles unmasked": ("attention", "tl.maximum(s0 + BLOCK_S - 1 - offset, 0)", "tl.maximum(s0 - offset, 0)"),
    "whole tiles reach too far": ("attention", "tl.minimum(S, t0 + 1 + offset)", "tl.minimum(S, t0 + 40 + offset)"),
    "top-left for bottom-right": ("attention", "S - T if causal == 1 else 0", "0"),
    "wrong scale": ("attention", "            x *= scale", "            x *= 1.1 * scale"),
    "wrong scale folded": ("attention", "rate = scale * LOG2E", "rate = 1.1 * scale * LOG2E"),
    "a negative one folded": ("attention", "0 < scale <", "abs(scale) <"),
    "folded lse not in base 2": ("attention", "lse * LOG2E if FOLDED else lse", "lse"),
    "rows of lse not padded": ("attention", "lse_padded_ptr + bh * Tp + t", "lse_padded_ptr + bh * T + t"),
    "dk without the scale": ("attention", "dk * scale", "dk"),
    "dq without the scale": ("attention", "dq * scale", "dq"),
    "delta forgotten": ("attention", "p * (dp - delta[None, :])", "p * dp"),
    "first queries skipped": (
        "attention", "tl.maximum(s0 - offset, 0) // BLOCK_T",
        "tl.maximum(s0 - offset + 1, 0) // BLOCK_T",
    ),
    "last tile of keys lost": ("attention", "tl.minimum(S, t0 + BLOCK_T + offset)",
                               "tl.minimum(S // BLOCK_S * BLOCK_S, t0 + BLOCK_T + offset)"),
    "sum not rescaled": ("attention", "l * shrink + tl.sum", "l + tl.sum"),
    "output not rescaled": ("attention", "o * shrink[:, None]", "o"),
    "blind row divided by zero": ("attention", "tl.where(nothing, 1.0, l))[:, None]", "l)[:, None]"),
    "dropout scale": ("attention", "256.0 / (256.0 - DROP) / tl.where", "1.0 / tl.where"),
    "dropout scale backward": ("attention", "dp * (256.0 / (256.0 - DROP))", "dp"),
    "dropout of another head": ("dropout", "<< 16) | h)", "<< 16) | 0 * h)"),
    "dropout bytes exchanged": ("dropout", "tl.join(tl.join(w0, w2), tl.join(w1, w3))",
                                "tl.join(tl.join(w0, w1), tl.join(w2, w3))"),
    "32-bit address of a sequence": (
        "attention", "(tl.program_id(0) // tiles).to(tl.int64)",
        "(tl.program_id(0) // tiles)",
    ),
    "ragged tile read beyond the end": ("attention", "T % block_t == 0", "True"),
    "rows read beyond the end": ("attention", "start + row[:, None] < rows", "start + row[:, None] < rows + 1"),
    "rows beyond the end": ("attention", "inside = row[:, None] < rows", "inside = row[:, None] < rows + 1"),
    "columns beyond D": ("attention", "(d[None, :] < D)", "(d[None, :] < BLOCK_D)"),
    "lost split in the merge": (
        "decode_attention", "for split in range(used)",
        "for split in range(tl.maximum(used - 1, 1))",
    ),
    "merge without rescaling": ("decode_attention", "o * shrink + o_split * shrink_split", "o + o_split"),
    "newest token unseen": (
        "decode_attention", "(s[None, :] <= length - T + t[:, None])",
        "(s[None, :] < length - T + t[:, None])",
    ),
    "page of another sequence": ("decode_attention", "table_ptr += b * stride_tb", "table_ptr += 0 * b * stride_tb"),
    "cache slot after the last": (
        "decode_attention", "inside = (s[:, None] < length)",
        "inside = (s[:, None] <= length)",
    ),
    "32-bit address of a page": (
        "decode_attention", "page_of.to(tl.int64) * stride_p",
        "(page_of * stride_p.to(tl.int32))",
    ),
    "stale cache slot": ("cache_append", "(position % page).to", "(tl.maximum(position - 1, 0) % page).to"),
    "pad appended": ("cache_append", "if position >= 0:", "if position >= -1:"),
    "heads run together": ("cache_append", "h * stride_vph", "h * D"),
    "end of the row unsummed": ("softmax_xent", "        m, s = _take(m, s, x, RUN)\n    top", "    top"),
    "lanes' sums not rescaled": ("softmax_xent", "tl.sum(s * tl.exp2((m - origin) * LOG2E), axis=0)",
                                 "tl.sum(s, axis=0)"),
    "gradient over the logits unscaled": ("softmax_xent", "tl.where(inside, dloss /", "tl.where(inside, 1.0 /"),
    "label's gradient without -1": ("softmax_xent", "/ total - 1.0) * dloss", "/ total) * dloss"),
    "label's gradient without -1 backward": ("softmax_xent", "LOG2E) - 1.0) * dloss", "LOG2E)) * dloss"),
    "label read too late": (
        "softmax_xent", "    at_label = ",
        "    label = tl.load(x_ptr + y, mask=inside, other=0.0).to(tl.float32)\n    at_label = ",
    ),
    "ignored row keeps a gradient": ("softmax_xent", "    if ignored:", "    if ignored & (V < 0):"),
    "unbiased variance": ("layer_norm", "difference, axis=0) / C", "difference, axis=0) / (C - 1)"),
    "norm's mean of the gradient": ("layer_norm", "(g - mean_g - h * mean_gh)", "(g - h * mean_gh)"),
    "residual's gradient lost": ("layer_norm", "dx += ds.to(tl.float32)", "dx += 0.0 * ds.to(tl.float32)"),
    "bias that rides lost": ("layer_norm", "s += tl.load(x_bias_ptr", "s += 0.0 * tl.load(x_bias_ptr"),
    "gradient of a bias that rides": ("layer_norm", "dx_bias += dx", "dx_bias = dx"),
    "third sum of another column": ("column_sums", "third_ptr + (c - 2 * C)", "third_ptr + (c - C) % C // 2"),
    "row ahead is this one": ("layer_norm", "n + programs, N, c, C)", "n, N, c, C)"),
    "32-bit address of a row": ("layer_norm", "n = tl.program_id(0).to(tl.int64)", "n = tl.program_id(0)"),
    "columns beyond C": ("layer_norm", "inside = c < C\n", "inside = c < C + 1\n"),
    "slope of the sigmoid alone": ("bias_gelu", "* (p + bend)", "* p"),
    "bias of another block": ("bias_gelu", "bias_ptr + c, mask=c < C", "bias_ptr + c % BLOCK_C, mask=c < C"),
    "dbias of the last rows alone": ("bias_gelu", "dbias += tl.sum", "dbias = tl.sum"),
    "partial sum lost": ("column_sums", "(p[:, None] < P)", "(p[:, None] < tl.maximum(P - 1, 1))"),
    "moments' bias not corrected": ("adamw", "learning_rate / (1.0 - beta1**step)", "learning_rate"),
    "a step that is not finite": ("adamw", 'if not (tl.abs(scale) < float("inf")):', "if scale_ptr is None:"),
    "rates of another moment": ("adamw", "tl.load(rates_ptr + 2)", "tl.load(rates_ptr + 1)"),
    "gradients not scaled": ("adamw", "mask=inside) * scale", "mask=inside)"),
    "tail of the buffer lost": ("grad_norm", "if program == programs - 1:", "if program == programs:"),
    "every program's first block": ("grad_norm", "g_ptr + block * BLOCK", "g_ptr + program * BLOCK"),
}
CUDA = {
    "mask off by one": ("attention", "s > t + offset", "s > t + offset + 1"),
    "top-left for bottom-right": ("attention", "op.causal == kBottomRight ? op.S - op.T : 0", "0"),
    "wrong scale": ("attention", "op.scale * kLog2e", "1.1f * op.scale * kLog2e"),
    "whole tiles reach too far": ("attention", "min(op.S, t0 + 1 + offset)", "min(op.S, t0 + 64 + offset)"),
    "sum not rescaled": ("attention", "rows.l[r] *= shrink;", ""),
    "output not rescaled": ("attention", "o[n][2 * r] *= shrink;", ""),
    "quad's sum lost": ("attention", "l += __shfl_xor_sync(0xffffffffu, l, 2);", ""),
    "dropout scale": ("attention", "mask.scale() / l", "1.0f / l"),
    "dropout of another query": ("attention", "mask.bytes(t_lane + 8 * r,", "mask.bytes(t_lane,"),
    "operand halves exchanged": ("attention", "lane / 16 * 8 + lane % 8) * kRow + step * 16 + lane / 8 % 2 * 8",
                                 "lane / 8 % 2 * 8 + lane % 8) * kRow + step * 16 + lane / 16 * 8"),
    "32-bit address": ("attention", "b * op.stride_kb + h", "int32_t(b * op.stride_kb) + h"),
    "lost split in the merge": ("decode_attention", "split < used", "split + 1 < used"),
    "lost warp in the merge": (
        "decode_attention", "for (int w = 0; w < kWarps; w++) {",
        "for (int w = 1; w < kWarps; w++) {",
    ),
    "merge without rescaling": ("decode_attention", "o = o * OnlineSoftmax::exp(state.m - origin)", "o = o"),
    "newest token unseen": ("decode_attention", "s <= length - op.T", "s < length - op.T"),
    "page of another sequence": ("decode_attention", "op.block_table + b * op.stride_tb", "op.block_table"),
    "32-bit address of a page": ("decode_attention", "page[i] * op.stride_kp", "int32_t(page[i] * op.stride_kp)"),
    "stale cache slot": ("cache_append", "row = position % op.page", "row = max(position - 1, int64_t(0)) % op.page"),
    "values in place of keys": ("cache_append", "to_v[h * op.stride_vph + d] = v[", "to_v[h * op.stride_vph + d] = k["),
    "label read too late": ("softmax_xent", "const float p = OnlineSoftmax::exp(x_label - origin)",
                            "const float p = OnlineSoftmax::exp(to_float(x[y]) - origin)"),
    "label's gradient without -1": ("softmax_xent", "x[y] = from_float<T>((p - 1.0f) * dloss);", ""),
    "label of another thread": ("softmax_xent", "(y - head) / kSize % kThreads", "y / kSize % kThreads"),
    "label of another thread backward": ("softmax_xent", "(y - head) / kSize : y - tail", "y / kSize : y - tail"),
    "label read too late backward": ("softmax_xent", "exp(x_label - lse)", "exp(to_float(x[y]) - lse)"),
    "label's gradient without -1 backward": ("softmax_xent", "(OnlineSoftmax::exp(x_label - lse) - 1.0f) * dloss",
                                             "OnlineSoftmax::exp(x_label - lse) * dloss"),
    "edge unsummed": ("softmax_xent", "  state.merge({x_edge, 1.0f});\n", ""),
    "edge unwritten": ("softmax_xent", "  if (at_edge) x[edge] = from_float<T>(OnlineSoftmax", "  if (false) x[edge] = "
                       "from_float<T>(OnlineSoftmax"),
    "gradient over the logits unscaled": ("softmax_xent", "scale = dloss / state.s", "scale = 1.0f / state.s"),
    "label's gradient unscaled": ("softmax_xent", "(p - 1.0f) * dloss", "p - 1.0f"),
    "warps' sums unmerged": ("softmax_xent", "merge_lanes(of_warp[threadIdx.x % kWarps], kWarps)",
                             "of_warp[threadIdx.x / 32]"),
    "more shared memory than asked for": ("softmax_xent", "op.V * int64_t(sizeof(T)) / 16 * 16",
                                          "(op.V * int64_t(sizeof(T)) - 1) / 16 * 16"),
    "ignored row keeps a gradient": ("softmax_xent", "if (y == op.ignore || !valid) {", "if (!valid) {"),
    "32-bit address of a slot": ("cache_append", "page * op.stride_kpp", "int32_t(page * op.stride_kpp)"),
}

RUN = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__.lower()
                    and "ScikitBuild" not in type(finder).__name__]
sys.path[:0] = [{package!r}, {tests!r}]
import fastlm, pytest
assert fastlm.__file__.startswith({package!r}), fastlm.__file__
sys.exit(pytest.main(["-x", "-q", "--rootdir", {root!r}, "-c", {root!r} + "/pyproject.toml", "-p", "no:cacheprovider",
                      "-k", "triton and ({tests_of_it})", {test!r}]))
"""


def altered(folder, suffix, bug):
    """The source of a kernel file of `folder` with a bug planted."""
    file, text, wrong = bug
    source = (folder / f"{file}{suffix}").read_text()
    assert text in source, f"{text!r} is no longer in {file}{suffix}"
    return source.replace(text, wrong)


SHARED = {"dropout": "attention", "column_sums": "layer_norm"}  # a file of several ops: whose tests are run

# The tests that are run for a bug, by words of its name; a bug of none of them must be caught by the tests of shapes.
CATCHERS = {
    "dropout": "dropout", "32-bit": "2_to_the_31", "beyond": "guard_pages", "negative": "scale",
    "finite": "finite", "rates": "rates",
    "": "shapes or sizes or long or unequal or append or over or below",
}


def run_triton(forks, tmp_path, op, name=None):
    package = copy_package(tmp_path)
    if name is not None:
        kernel = package / "fastlm" / "kernels" / f"{TRITON[name][0]}.py"
        kernel.write_text(altered(ROOT / "kernels", ".py", TRITON[name]))
    catcher = next(tests for word, tests in CATCHERS.items() if word in (name or ""))
    script = RUN.format(package=str(package), tests=str(ROOT / "tests"), root=str(ROOT), tests_of_it=catcher,
                        test=str(ROOT / "tests" / f"test_{op}.py"))
    return forks.run(script, package)


def ids(bugs):
    """Ids that begin with the bug's file."""
    return [f"{bugs[name][0]}: {name}" for name in bugs]


@pytest.mark.slow
@pytest.mark.parametrize("op", ["cache_append", "decode_attention"])
def test_nothing_planted(op, forks, tmp_path):
    done = run_triton(forks, tmp_path, op)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRITON, ids=ids(TRITON))
def test_every_bug_in_triton_is_caught(name, forks, tmp_path, tell):
    done = run_triton(forks, tmp_path, SHARED.get(TRITON[name][0], TRITON[name][0]), name)
    failed = re.findall(r"^FAILED \S*::(\S+)", done.stdout, re.MULTILINE)
    crashed = done.returncode < 0  # a guard page
    assert crashed or done.returncode == 1 and failed, f"{name}: nobody noticed\n{done.stdout[-2000:]}"
    tell(f"{name}: {'a guard page' if crashed else failed[0]}")


@pytest.mark.slow
@pytest.mark.parametrize("name", CUDA, ids=ids(CUDA))
def test_every_bug_in_cuda_is_caught(name, tmp_path, tell):
    op = CUDA[name][0]
    order = test_cuda_emulated.caught(tmp_path, op, altered(ROOT / "csrc" / "cuda", ".cu", CUDA[name]))
    assert order is not None, f"{name}: nobody noticed"
    tell(f"{name}: the sweep of {op}, threads {order}")
