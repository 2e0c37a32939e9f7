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
from fastlm.dispatch.refusal import Refused, failure
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

    ask(**message) returns what the handler answers. Of what the handler or its maker raises, ValueError (bad input) and
    Refused are raised here too, and RuntimeError with the first line of all else; RuntimeError where the
    process ended, of which `ended` then tells. A context manager, so that it ends.
    """

    def __init__(self, module, function, **arguments):
        self.name, self._wanted = f"{module}.{function}", (module, function, arguments)
        self.start()

    def start(self):
        """Starts the process, or another one in its place."""
        script = WORK if _editable() else PIN.format(package=str(Path(fastlm.__file__).parent.parent)) + WORK
        module, function, arguments = self._wanted
        self.ended = False
        self.process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)
        self._send(module=module, function=function, arguments=arguments)

    def ask(self, **message):
        try:
            self._send(**message)
            found = json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.ended = True
            raise RuntimeError(f"the process of {self.name} ended: {_end(self.process.wait())}") from None
        for kind, raised in RAISED.items():
            if kind in found:
                raise raised(found[kind])
        return found["answer"]

    def end(self):
        """Ends the process."""
        self.ended = True
        self.process.kill()
        self.process.communicate()

    def _send(self, **message):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()


RAISED = {"refused": Refused, "invalid": ValueError, "failed": RuntimeError}  # by the key of an answer


class Apart(Process):
    """A process that measures cases of the suite (ops, device, shape, dtypes); a new one after a case that ended it."""

    def __init__(self, ops, device, shape, dtypes):
        self.device = str(device)
        super().__init__("apart", "cases", ops=list(ops or ()), device=str(device), shape=shape,
                         dtypes=list(dtypes or ()))

    def measure(self, case, roofs, *, seconds, cold):
        """The rows of a case, as `harness.measure` returns them; RuntimeError where the process ended in it."""
        self.name = case.name
        if self.ended:
            self.start()
        rows = self.ask(case=case.name, roofs=vars(roofs), seconds=seconds, cold=cold)
        if "cuda" in self.device and any("failed" in row for row in rows):
            self.end()  # a process whose kernel failed may have lost its GPU
        return rows


def cases(ops, device, shape, dtypes):
    """The handler of Apart."""
    known = {case.name: case for case in harness.suite(ops, device=device, shape=shape, dtypes=dtypes)}

    def handle(case, roofs, seconds, cold):
        return known[case].run(device, Roofs(**roofs), seconds=seconds, cold=cold)

    return handle


def work():
    """The other side: reads what to make, then a message a line, and answers each."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    wanted = json.loads(sys.stdin.readline())

    def make():
        module = importlib.import_module(f".{wanted['module']}", __package__)
        return getattr(module, wanted["function"])(**wanted["arguments"])

    made = _answer(make)
    for line in sys.stdin:
        found = _answer(made["answer"], **json.loads(line)) if "answer" in made else made
        print(json.dumps(found), file=answers, flush=True)


def _answer(function, **arguments):
    """{"answer": what it returns}, or what it raised."""
    try:
        return {"answer": function(**arguments)}
    except Refused as error:
        return {"refused": str(error)}
    except ValueError as error:
        return {"invalid": str(error)}
    except Exception as error:
        return {"failed": failure(error)}


def _editable():
    return any("editable" in type(finder).__module__.lower() for finder in sys.meta_path)


def _end(code):
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
