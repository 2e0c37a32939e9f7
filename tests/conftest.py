"""What every test shares: the backends that can run here, NaN-poisoned allocations, and where the data lie.

The whole (`pytest`, `pytest -m slow`) takes a worker a core, of one thread each; files or tests that are named, and
`pytest -n 0`, run in this process. `pytest -m slow --slices auto` runs a part of the slow tests (slices.py).
"""

import contextlib
import fcntl
import functools
import importlib
import importlib.util
import os
import tempfile
import time
from pathlib import Path

import pytest
import slices
import torch
from forked import Forks

MOST_WORKERS = 8  # each holds a GB

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is decorated
    import interpreter

    interpreter.install()

CACHE = tempfile.TemporaryDirectory()
os.environ["FASTLM_CACHE"] = CACHE.name  # what was tuned on this machine chooses nothing here

import numerics  # noqa: E402

import fastlm  # noqa: E402
from fastlm import dispatch, ops  # noqa: E402, F401  ops fills the table
from fastlm.backends import chunked, machine, native  # noqa: E402
from fastlm.dispatch.table import TABLE  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
LAUNCHERS = [native]
if importlib.util.find_spec("triton"):
    names = {row.kernels["triton"].partition(":")[0] for row in TABLE.values() if "triton" in row.kernels}
    LAUNCHERS += [importlib.import_module(name) for name in sorted(names)]


def pytest_addoption(parser):
    parser.addoption("--slices", metavar="auto|all|NAME,…", default="all", help=slices.__doc__)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Workers, unless a number is given (-n), files or tests are named, or pytest-xdist is not there."""
    option = config.option
    if "PYTEST_XDIST_WORKER" in os.environ or not hasattr(option, "numprocesses"):
        return
    whole = all(os.path.isdir(argument) for argument in config.args)
    if option.numprocesses is None and whole and not option.usepdb and not option.collectonly:
        most = MOST_WORKERS // 2 if GPU else MOST_WORKERS  # these share its memory
        option.numprocesses, option.dist = min(len(os.sched_getaffinity(0)), most), "worksteal"
    if option.numprocesses:  # of the workers, and of the processes that they start
        os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # it is told what was chosen
        config.option.slices = config.workerinput["slices"]
    elif config.option.slices != "all":
        names, config.chosen_slices = slices.choose(config.option.slices)
        config.option.slices = ",".join(names)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["slices"] = node.config.option.slices


def pytest_report_header(config):
    return getattr(config, "chosen_slices", None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and this machine has none that torch can use"))
    config.slow_tests = [item.nodeid for item in items if "slow" in item.keywords]
    if config.option.slices != "all":
        wanted = config.option.slices.split(",")
        left_out = [item for item in items if "slow" in item.keywords and slices.of(item.nodeid)[0] not in wanted]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def pytest_sessionstart(session):
    session.config.slow_until = time.monotonic() + float(os.environ.get("FASTLM_SLOW_SECONDS", "inf"))


def pytest_runtest_setup(item):
    if "slow" in item.keywords and time.monotonic() > item.config.slow_until:
        pytest.skip("left out: the slow tests have taken all of FASTLM_SLOW_SECONDS")


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["worst"] = list(numerics.WORST.items())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for key, ratio in getattr(node, "workeroutput", {}).get("worst", ()):
        numerics.WORST[tuple(key)] = max(numerics.WORST.get(tuple(key), 0.0), ratio)


def pytest_terminal_summary(terminalreporter):
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    told = [line for report in reports if getattr(report, "when", None) == "call"
            for name, line in report.user_properties if name == "told"]
    if told:
        terminalreporter.section("what the tests tell")
        for line in told:
            terminalreporter.write_line(line)
    if numerics.WORST:
        terminalreporter.section("worst error / allowed, per op, backend and dtype")
        for line in numerics.table():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def emulated():
    """Registers the test-only backend cuda-emulated: the CUDA kernels, compiled by g++, on CPU tensors."""
    from emulation.build import emulated_module

    if "cuda-emulated" not in machine.BACKENDS:
        native.emulated = native.Launchers(
            emulated_module().cuda, lambda device: {"device": 0, "stream": 0}, split_decoding=True
        )
        chunked.emulated = chunked.Chunked(native.emulated, padded=True)
        machine.BACKENDS["cuda-emulated"] = (("cpu",), lambda: None)
        for row in TABLE.values():
            if "cuda" in row.kernels:
                row.kernels["cuda-emulated"] = row.kernels["cuda"].replace(":cuda", ":emulated")
                object.__setattr__(row, "limits", functools.partial(_cuda_limits, row.limits))


def _cuda_limits(limits, backend, *args):
    return limits(backend.removesuffix("-emulated"), *args)


def pytest_generate_tests(metafunc):
    chosen = any(marker.args[0] == "backend" for marker in metafunc.definition.iter_markers("parametrize"))
    if "backend" in metafunc.fixturenames and hasattr(metafunc.module, "FAMILY") and not chosen:
        row = next(row for row in TABLE.values() if row.family == metafunc.module.FAMILY)
        names = [name for name in ("reference", "torch", "cpu", "triton", "cuda") if name in row.kernels]
        if not GPU:
            names = [name.replace("cuda", "cuda-emulated") for name in names]
        metafunc.parametrize("backend", names, indirect=True)


@contextlib.contextmanager
def two_threads_for(backend):
    """A worker has one thread, but the CPU kernels share their work among two at least."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, 2 if backend == "cpu" else 1))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def backend(request):
    """A backend that has the module's FAMILY of ops, forced while the test runs; skips where it cannot run."""
    name, family = request.param, request.module.FAMILY
    if name == "cuda-emulated":
        request.getfixturevalue("emulated")
    row = next(row for row in TABLE.values() if row.family == family)
    reason = dispatch.why_not(row.name, name)
    if reason is None and DEVICE not in machine.devices(name):
        reason = f"the {name} kernels take no tensors on {DEVICE}"
    if reason is not None:
        pytest.skip(reason)
    with fastlm.use(**{family: name}), two_threads_for(name):
        yield name


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the launchers allocate starts as NaN, so that an element left unwritten shows."""
    empty = torch.empty

    def poison(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    class Torch:
        """torch, but for `empty`."""

        empty = staticmethod(poison)

        def __getattr__(self, name):
            return getattr(torch, name)

    for module in LAUNCHERS:
        monkeypatch.setattr(module, "torch", Torch())


@pytest.fixture
def tell(record_property):
    """Keeps a line of text for the summary at the end."""
    return lambda line: record_property("told", line)


@pytest.fixture(scope="session")
def forks():
    """Runs code in processes that have torch already (forked.py)."""
    with contextlib.closing(Forks()) as forks:
        yield forks


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory, request):
    """A function: the folder of a name, the same in all workers, that is filled by the first to ask; others wait."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if hasattr(request.config, "workerinput") else base

    def folder(name, fill):
        path = base / name
        with open(base / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                partial = base / f"{name}.partial"
                partial.mkdir()
                fill(partial)
                partial.rename(path)
        return path

    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of text that a small model learns something of in a few steps."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"the {n} times {n} is {n * n}, and so it goes on;\n" for n in range(400)))
    return path


@pytest.fixture(scope="session")
def data():
    """The folder of test data (GPT-2's vocabulary, tiny-shakespeare)."""
    folder = os.environ.get("FASTLM_TEST_DATA")
    if not folder:
        pytest.skip("FASTLM_TEST_DATA names no folder with gpt2/vocab.json, gpt2/merges.txt and tinyshakespeare.txt")
    return Path(folder)
