"""Work in a process of its own, asked for by messages: cases of the suite, or a contender's training steps.

What the heap of a process looks like decides for its whole life how fast a program that allocates is (whether large
temporaries are mapped anew at every call, three times the time at worst). A second process is a second throw, and a
contender alone in one has the heap that it has with its users.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import fastlm
from fastlm.measure.roofs import Roofs

from . import harness

# The checkout is on meta_path in an editable install; a process that took it off, to measure an installed fastlm
# beside it, passes that on.
PIN = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__.lower()
                    and "ScikitBuild" not in type(finder).__name__]
sys.path.insert(0, {package!r})
import fastlm
assert fastlm.__file__.startswith({package!r}), fastlm.__file__
"""
WORK = """
from fastlm.benchmarks.apart import work
work()
"""


class Process:
    """Another process, in which `function` of a module of benchmarks makes a handler of `arguments`, all of them JSON.

    ask(**message) returns what the handler answers. Raises ValueError for what the handler or its maker refuses,
    RuntimeError where the process ended. A context manager, so that it ends.
    """

    def __init__(self, module, function, **arguments):
        script = WORK if _editable() else PIN.format(package=str(Path(fastlm.__file__).parent.parent)) + WORK
        self.name = f"{module}.{function}"
        self.process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)
        self._send(module=module, function=function, arguments=arguments)

    def ask(self, **message):
        try:
            self._send(**message)
            found = json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise RuntimeError(f"the process of {self.name} ended: {_end(self.process.wait())}") from None
        if "refused" in found:
            raise ValueError(found["refused"])
        return found["answer"]

    def _send(self, **message):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


class Apart(Process):
    """A process that measures cases of the suite (ops, device, shape, dtypes)."""

    def __init__(self, ops, device, shape, dtypes):
        super().__init__("apart", "cases", ops=list(ops or ()), device=str(device), shape=shape,
                         dtypes=list(dtypes or ()))

    def measure(self, case, roofs, *, seconds, cold):
        """The rows of a case, as `harness.measure` returns them."""
        self.name = case.name
        return self.ask(case=case.name, roofs=vars(roofs), seconds=seconds, cold=cold)


def cases(ops, device, shape, dtypes):
    """The handler of Apart."""
    known = {case.name: case for case in harness.suite(ops, device=device, shape=shape, dtypes=dtypes)}

    def handle(case, roofs, seconds, cold):
        return known[case].run(device, Roofs(**roofs), seconds=seconds, cold=cold)

    return handle


def work():
    """The other side: reads what to make, then a message a line, and answers each."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    wanted, refused, handler = json.loads(sys.stdin.readline()), None, None
    try:
        handler = getattr(importlib.import_module(f".{wanted['module']}", __package__), wanted["function"])(
            **wanted["arguments"])
    except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
        refused = error
    for line in sys.stdin:
        try:
            found = {"answer": handler(**json.loads(line))} if refused is None else {"refused": str(refused)}
        except (ValueError, RuntimeError) as error:
            found = {"refused": str(error)}
        print(json.dumps(found), file=answers, flush=True)


def _editable():
    return any("editable" in type(finder).__module__.lower() for finder in sys.meta_path)


def _end(code):
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
