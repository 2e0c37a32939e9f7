"""The shape of the house: one op, one name, six homes; data falls straight down; nothing unsafe inside."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import compiled
import pytest

from fastlm import ops
from fastlm.dispatch.table import TABLE

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "fastlm").rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PACKAGE}
OPS = sorted(path.stem for path in (ROOT / "fastlm" / "ops").glob("[a-z]*.py") if path.stem not in ("checks", "once"))

# From the ground up: a module imports from its own floor or a lower one. What is not named stands on its folder's.
FLOORS = [
    {"config", "kernels", "ops.checks", "ops.once", "backends", "measure", "dispatch.refusal", "dispatch.table",
     "masks"},
    {"backends.reference", "backends.native"}, {"backends.vendor"}, {"backends.chunked", "backends.composed"},
    {"dispatch.forcing"}, {"dispatch"}, {"ops"}, {"fast_path", "likeness", "quantised", "data"},
    {"activations", "heads"},
    {"generation", "described", "pretrained"},  # they take a model for what it does, and know no class of it
    {"gpt2"}, {"training"}, {"measure.certificate"}, {"benchmarks"}, {"cli"},
]

# The homes of the ops, and who calls some by name. What is not named speaks of ops in general.
NAME_OPS = {
    "ops", "backends.reference", "backends.vendor", "backends.native", "backends.chunked", "backends.composed",
    "__init__", "fast_path", "activations", "heads", "gpt2", "generation", "training", "measure.certificate",
    "measure.cuts", "cli.explain", "cli.generate",
}


def floor(module):
    """The number of the floor of fastlm.<module>."""
    while not any(module in names for names in FLOORS):
        assert "." in module, f"{module} stands on no floor"
        module = module.rpartition(".")[0]
    return next(number for number, names in enumerate(FLOORS) if module in names)


def imports(path):
    """The fastlm modules that a file imports, inside functions too, and its whole imports by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:  # a neighbour has a level
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if node.module == "fastlm" or name in MODULES else node.module for name in names)


@pytest.mark.parametrize("op", OPS)
def test_one_op_six_homes(op):
    kernels = next(row.kernels for row in TABLE.values() if row.family == op)
    assert (ROOT / "tests" / f"test_{op}.py").is_file()
    assert (ROOT / "benchmarks" / f"bench_{op}.py").is_file()
    # Those of linear_xent are softmax_xent's, in chunks.
    homes = {"cpu": ("csrc/cpu", "cpp"), "cuda": ("csrc/cuda", "cu"), "triton": ("kernels", "py")}
    for name, (folder, suffix) in homes.items():
        own = kernels.get(name, "").startswith(("fastlm.backends.native", "fastlm.kernels"))
        assert (ROOT / folder / f"{op}.{suffix}").is_file() == own, name
    assert {"torch", "reference"} <= set(kernels)


def test_every_public_op_is_in_the_package():
    import fastlm

    assert all(callable(getattr(fastlm, name)) or name.isupper() for name in ops.__all__)
    assert {row.family for row in TABLE.values()} == set(OPS) == set(ops.FAMILIES)
    assert {name for family in OPS for name in ops.module(family).__all__} | {"use"} == set(ops.__all__)


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_imports_a_higher_floor(path):
    parts = path.relative_to(ROOT / "fastlm").with_suffix("").parts
    if parts == ("__init__",):
        return
    for name in imports(path):
        below = name.split(".")
        if below[0] != "fastlm" or len(below) < 2 or below[1] in {"_C", "__version__"}:
            continue
        assert floor(".".join(below[1:])) <= floor(".".join(parts)), f"{path.name} imports {name}"


def test_no_imports_in_a_circle():
    """Nor inside functions. What imports a package is not held to import all that the package does."""
    graph = {name: set(imports(path)) & set(MODULES) - {name} for name, path in MODULES.items()}
    assert {"fastlm.generation", "fastlm.fast_path"} <= graph["fastlm.gpt2"]
    graphlib.TopologicalSorter(graph).prepare()  # CycleError tells the circle


def words(path):
    """The words of a file's code: names and strings, without docstrings."""
    tree = ast.parse(path.read_text())
    told = {id(node.body[0].value) for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        for value in vars(node).values() if id(node) not in told else ():
            for text in value if isinstance(value, list) else [value]:
                yield from re.findall(r"\w+", text) if isinstance(text, str) else ()


def test_only_their_homes_and_callers_name_ops():
    """Dispatch, table, forcing, measure and the rest know ops by their rows alone."""
    op = re.compile(rf"({'|'.join(OPS)})(_|_qkv)?(_fwd|_bwd|_grad)?")
    assert op.fullmatch("attention_qkv_bwd") and op.fullmatch("adamw_") and not op.fullmatch("layer_norm_epsilon")
    assert all(op.fullmatch(name) for name in TABLE)
    names = {".".join(path.relative_to(ROOT / "fastlm").with_suffix("").parts): path for path in PACKAGE}
    speaking = {name for name, path in names.items() if any(op.fullmatch(word) for word in words(path))}
    allowed = {name: {part for part in NAME_OPS if name == part or name.startswith(f"{part}.")} for name in speaking}
    assert all(allowed.values()), {name for name in speaking if not allowed[name]}
    assert NAME_OPS == set().union(*allowed.values()), "some name none"


def test_kernels_know_nothing_of_the_package():
    for path in (ROOT / "kernels").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= {"torch", "triton"}, path
    for path in (path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")):
        assert not re.search(r"#include\s*<(torch|ATen|c10)", path.read_text()), path
        if path.name not in ("bind.h", "bindings.cpp"):
            assert not re.search("pybind11|Python.h", path.read_text()), path


def test_only_native_calls_the_compiled_module():
    users = {path.name for path in PACKAGE if re.search(r"fastlm\._C|import _C", path.read_text())}
    assert users <= {"native.py", "machine.py", "doctor.py"}  # the other two only ask whether it is there


def test_kernel_files_hold_no_torch_mathematics():
    """Only the torch backend and the oracle may compute with PyTorch."""
    allowed = {"empty", "empty_like", "float32", "bfloat16", "float16", "get_num_threads", "cuda",
               "get_device_capability", "get_device_properties", "current_stream", "device_of", "Tensor", "int8",
               "int64", "dtype", "tensor"}  # of addresses
    for path in (ROOT / "fastlm" / "backends" / "native.py", *(ROOT / "kernels").glob("*.py")):
        used = set(re.findall(r"\btorch\.(?:cuda\.)?(\w+)", path.read_text()))
        assert used <= allowed, (path.name, used - allowed)


@pytest.mark.parametrize(
    "path", [*PACKAGE, *(ROOT / "kernels").glob("*.py")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_runs_foreign_code(path):
    """No pickle, no eval, no shell: what a file holds is never executed."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "os.system"}, name
            assert not any(keyword.arg == "shell" for keyword in node.keywords), name
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "marshal", "shelve", "dill"} & {module.split(".")[0] for module in modules}


def modules_after(code):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_is_light():
    assert not {"torch", "triton", "transformers", "numpy"} & modules_after("import fastlm")
    assert "triton" not in modules_after("import fastlm; fastlm.use")


def test_help_is_light():
    code = "sys.argv = ['fastlm', '--help']\nfrom fastlm.cli import app\napp(standalone_mode=False)"
    assert not {"torch", "transformers", "triton", "tokenizers"} & modules_after(code)


def test_an_op_is_declared_once():
    """What fastlm.h declares is nowhere said again: not in the bindings, the build or the list of instruction sets."""
    structs, _, spaces = compiled.table().declared((ROOT / "csrc" / "fastlm.h").read_text())
    assert len(structs) >= 17 and set(spaces) == {"cpu", "cuda"} and set(spaces["cuda"]) <= set(spaces["cpu"])
    names = {*structs, *spaces["cpu"]}
    for path in (ROOT / "csrc" / "bind.h", ROOT / "csrc" / "bindings.cpp", ROOT / "CMakeLists.txt",
                 ROOT / "csrc" / "cpu" / "isa.h", ROOT / "csrc" / "cpu" / "isa.cpp",
                 ROOT / "tests" / "emulation" / "module.cpp"):
        code = re.sub(r"//.*", "", path.read_text())
        assert not names & set(re.findall(r"\w+", code)), path
