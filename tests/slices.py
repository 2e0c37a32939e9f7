"""which slow tests run: all; NAME,… of the slices; or auto: the slices whose files changed in the last commits, those
with the most changes for their time first, as far as the time goes, and one more, by the number of commits; the head of
the output says which, and why"""

import re
import subprocess
from pathlib import Path, PurePath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SECONDS = 500  # what those that changed may take in `auto`
DAYS, COMMITS = 3, 10  # changed lately: in the commits of so many days, but at least so many, or not committed yet


class Slice(NamedTuple):
    """Slow tests that belong together."""

    tests: str  # found in their ids
    files: str  # whose changes they are there for
    seconds: int  # on two cores


def planted(where, files):
    return rf"::test_every_bug_in_{where}_is_caught\[({'|'.join(files.split())}):"


def cpu(files, others, seconds):
    """Bugs in csrc/cpu/<files>, found by the tests of `others`."""
    shared = ("csrc/*.h csrc/cpu/simd.h csrc/cpu/simd/* csrc/cpu/halves.h csrc/cpu/isa* csrc/cpu/parallel.h "
              "csrc/cpu/team.h csrc/bindings.cpp csrc/declared.py tests/sanitized.py")
    own = " ".join(f"csrc/cpu/{name}.*" for name in files.split())
    names = " ".join(rf"{name}\.\w+" for name in files.split())
    return Slice(planted("cpu", names), f"{own} {others} {shared} tests/test_planted_layers.py", seconds)


def cuda(op, seconds):
    """Everything that is slow about csrc/cuda/<op>.cu."""
    files = f"csrc/cuda/{op}.cu csrc/cuda/*.cuh csrc/*.h tests/emulation/*.h tests/emulation/sweep_{op}.cpp"
    tests = rf"::test_(sanitizers_at_whole_sizes|every_barrier_and_bound_is_needed|every_bug_in_cuda_is_caught)\[{op}\b"
    return Slice(tests, f"{files} tests/emulation/build.py tests/test_cuda_emulated.py", seconds)


def triton(files, others, seconds):
    """Bugs in kernels/<files>.py, found by the tests of `others`."""
    own = " ".join(f"kernels/{name}.py" for name in files.split())
    nothing = rf"|test_planted_kernels.py::test_nothing_planted\[({'|'.join(files.split())})\]"
    return Slice(planted("triton", files) + nothing, f"{own} {others} tests/guard.py tests/interpreter.py", seconds)


def layer(pattern, files, others, seconds):
    """Bugs in the package's files of a pattern, found by the tests of `others`."""
    return Slice(planted("a_layer", pattern), f"{files} {others} tests/test_planted_layers.py", seconds)


SANITIZED = "csrc/bindings.cpp csrc/declared.py tests/sanitized.py tests/test_sanitizers.py tests/compiled.py"
SLICES = {
    "cuda attention": cuda("attention", 25),
    "cuda softmax_xent": cuda("softmax_xent", 30),
    "cuda decode_attention": cuda("decode_attention", 20),
    "cuda cache_append": cuda("cache_append", 5),
    "nvcc": Slice("::test_nvcc_resources", "csrc/cuda/* csrc/*.h tests/resources.py benchmarks/machine_code.py "
                  "benchmarks/results/resources-nvcc*", 40),
    "triton attention": triton("attention dropout", "tests/test_attention.py", 50),
    "triton decode": triton("decode_attention cache_append",
                            "tests/test_decode_attention.py tests/test_cache_append.py", 15),
    "triton softmax_xent": triton("softmax_xent", "tests/test_softmax_xent.py", 5),
    "triton training": triton("layer_norm bias_gelu column_sums adamw grad_norm",
                              "tests/test_layer_norm.py tests/test_bias_gelu.py tests/test_adamw.py "
                              "tests/test_grad_norm.py", 10),
    "triton resources": Slice("test_triton_resources.py", "kernels/*.py tests/resources.py benchmarks/machine_code.py "
                              "benchmarks/prediction.py benchmarks/results/resources-triton*", 230),
    "cpu attention": cpu("attention", "csrc/cpu/products/cached.h tests/test_attention.py", 10),
    "cpu decode": cpu("decode_attention running simd cache_append draw",
                      "tests/test_decode_attention.py tests/test_cache_append.py", 10),
    "cpu softmax_xent": cpu("softmax_xent", "tests/test_softmax_xent.py", 5),
    "cpu training": cpu("gelu bias_gelu columns layer_norm adamw grad_norm",
                        "tests/test_layer_norm.py tests/test_bias_gelu.py tests/test_adamw.py tests/test_grad_norm.py",
                        10),
    "cpu blocks": cpu("gpt2_blocks products/blocked", "tests/test_gpt2_blocks.py", 10),
    "cpu engine": cpu("gpt2_step checksum normalise paged products/packed products/cut products/tiles products/bytes "
                      "products/f32 products/bf16 products/int8 products/int4", "csrc/cpu/phases.h csrc/cpu/heap.h "
                      "tests/test_engine.py tests/test_generation_state.py", 40),
    "cpu none": Slice("test_no_(cpu_bug|bug_in_a_layer)", "tests/test_planted_layers.py", 10),
    **{f"sanitizers {isa}": Slice(rf"test_cpu_kernels\[{isa}\]", f"csrc/cpu/* csrc/cpu/*/* csrc/*.h {SANITIZED}", 60)
       for isa in ("generic", "avx2", "avx512", "avx512bf16")},
    "sanitizers": Slice("test_sanitizers.py::test_(an|changed)_", f"CMakeLists.txt {SANITIZED}", 60),
    "changed models": Slice("test_changed_models.py", "fastlm/*.py fastlm/generation/* fastlm/ops/* csrc/cpu/*.cpp "
                            "tests/changes.py tests/test_changed_models.py", 100),
    "build": Slice("test_build.py::(?!test_a_wheel)", "CMakeLists.txt pyproject.toml tests/test_build.py", 50),
    "wheel": Slice("test_build.py::test_a_wheel", "CMakeLists.txt pyproject.toml csrc/bindings.cpp csrc/cpu/isa* "
                   "tests/test_build.py", 60),
    "model": Slice("test_planted.py", "fastlm/*.py fastlm/backends/* fastlm/dispatch/* fastlm/ops/* "
                   "fastlm/generation/* tests/parity.py tests/test_planted.py", 10),
    "124M": Slice("test_parity.py", "fastlm/gpt2.py fastlm/fast_path.py fastlm/pretrained.py tests/parity.py "
                  "tests/test_parity.py", 50),
    "package": layer(r"fastlm/((backends|dispatch|ops)/)?\w+\.py",
                     "fastlm/*.py fastlm/backends/* fastlm/dispatch/* fastlm/ops/* fastlm/cli/*",
                     "tests/test_dispatch.py tests/test_linear_xent.py tests/test_refusals.py tests/test_functional.py "
                     "tests/test_adapters.py", 50),
    "generation": layer("fastlm/generation/.*", "fastlm/generation/*",
                        "tests/test_generation*.py tests/test_engine.py tests/test_fast_path.py", 10),
    "measure": layer("fastlm/measure/.*", "fastlm/measure/* fastlm/measure/tables/*",
                     "tests/test_measure.py tests/test_tune.py tests/test_certificate.py tests/test_refusals.py", 10),
    "benchmarks": layer("benchmarks/.*", "benchmarks/*.py", "tests/test_bench.py", 25),
    "training": layer("fastlm/(training|data)/.*", "fastlm/training/* fastlm/data/*",
                      "tests/test_training*.py tests/test_data_loader.py tests/test_tokenizer.py tests/runs.py", 25),
    "killed": Slice("test_training_checkpoint.py", "fastlm/training/* tests/test_training_checkpoint.py tests/runs.py",
                    30),
    "damaged files": Slice("test_(tokenizer|data_shards|data_prepare).py", "fastlm/data/* tests/mutations.py "
                           "tests/test_tokenizer.py tests/test_data_shards.py tests/test_data_prepare.py", 30),
    "gpu command": Slice("test_gpu_command.py", "benchmarks/gpu/* tests/test_gpu_command.py", 100),
}
# Files that the default tests, or a run itself, see to.
DEFAULT = (".ci/run tests/emulation/module.cpp tests/team.cpp *.md LICENSE .gitignore benchmarks/results/* "
           "tests/test_*.py")


def of(test):
    """The names of the slices that a test lies in, by its id."""
    return [name for name, part in SLICES.items() if re.search(part.tests, test)]


def matches(path, patterns):
    return any(PurePath(path).match(pattern) for pattern in patterns.split())


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def changed():
    """{path: lines} of the files that changed lately."""
    commits = max(int(git("rev-list", "--count", f"--since={DAYS} days ago", "HEAD")), COMMITS)
    told = git("log", f"-{commits}", "--numstat", "--no-renames", "--format=") + git("diff", "--numstat", "HEAD")
    lines = dict.fromkeys(git("ls-files", "--others", "--exclude-standard").splitlines(), 1)
    for added, removed, path in (line.split("\t") for line in told.splitlines() if line):
        count = 1 if added == "-" else int(added) + int(removed)
        lines[path] = lines.get(path, 0) + count
    return {path: count for path, count in lines.items() if (ROOT / path).exists()}


def touched(lines):
    """{slice: its lines that changed}, and the first file of no slice: for its sake all slices are touched."""
    weights = {name: sum(count for path, count in lines.items() if matches(path, part.files))
               for name, part in SLICES.items()}
    weights = {name: weight for name, weight in weights.items() if weight}
    foreign = [path for path in sorted(lines) if not matches(path, DEFAULT)
               and not any(matches(path, part.files) for part in SLICES.values())]
    if foreign:
        weights = {**dict.fromkeys(SLICES, 1), **weights}
    return weights, foreign[0] if foreign else None


def auto(lines, count, seconds=SECONDS):
    """(names, lines of text) of the slices for what changed, at a number of commits."""
    weights, foreign = touched(lines)
    names, left_out = [], []
    for name in sorted(weights, key=lambda name: weights[name] / SLICES[name].seconds, reverse=True):
        fits = sum(SLICES[other].seconds for other in (*names, name)) <= seconds
        (names if fits else left_out).append(name)
    why = f"{foreign} belongs to none: all of them" if foreign else "their files changed lately"
    told = [f"slices, as {why}: {', '.join(names) or 'none'}"]
    if others := [name for name in SLICES if name not in names]:
        one = others[count % len(others)]
        told[0] += f"; and one more, at commit {count}: {one}"
        names.append(one)
    if missing := [name for name in left_out if name not in names]:
        told.append(f"slices left out, for want of time: {', '.join(missing)}")
    return names, told


def choose(asked):
    """(names, lines of text) of the slices for the option's value."""
    if asked == "auto":
        try:
            return auto(changed(), int(git("rev-list", "--count", "HEAD")))
        except (OSError, subprocess.CalledProcessError):
            return auto({"what git would tell": 1}, 0)
    names = asked.split(",")
    if unknown := [name for name in names if name not in SLICES]:
        raise pytest.UsageError(f"--slices: there is no {', '.join(unknown)}; wanted auto, all or of "
                                f"{', '.join(SLICES)}")
    return names, [f"slices: {', '.join(names)}"]
