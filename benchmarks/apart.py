"""Cases measured in a process of their own.

What the heap of a process looks like decides for its whole life how fast a program that allocates is (whether large
temporaries are mapped anew at every call, three times the time at worst). A second process is a second throw.
"""

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


class Apart:
    """A process that measures cases of the suite (ops, device, shape, dtypes); a context manager, so that it ends."""

    def __init__(self, ops, device, shape, dtypes):
        script = WORK if _editable() else PIN.format(package=str(Path(fastlm.__file__).parent.parent)) + WORK
        self.process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)
        self._send(ops=list(ops or ()), device=str(device), shape=shape, dtypes=list(dtypes or ()))

    def measure(self, case, roofs, *, seconds, cold):
        """The rows of a case, as `harness.measure` returns them.

        Raises ValueError for what harness.measure raises it for, RuntimeError where the process ended.
        """
        try:
            self._send(case=case.name, roofs=vars(roofs), seconds=seconds, cold=cold)
            found = json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise RuntimeError(f"the process that measured {case.name} ended: {_end(self.process.wait())}") from None
        if "refused" in found:
            raise ValueError(found["refused"])
        return found["rows"]

    def _send(self, **message):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def work():
    """The other side: reads the suite, then a case a line, and writes its rows."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    wanted = json.loads(sys.stdin.readline())
    device = wanted["device"]
    cases = {case.name: case for case in harness.suite(wanted["ops"], device=device, shape=wanted["shape"],
                                                       dtypes=wanted["dtypes"])}
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            found = {"rows": cases[asked["case"]].run(device, Roofs(**asked["roofs"]), seconds=asked["seconds"],
                                                      cold=asked["cold"])}
        except ValueError as refused:
            found = {"refused": str(refused)}
        print(json.dumps(found), file=answers, flush=True)


def _editable():
    return any("editable" in type(finder).__module__.lower() for finder in sys.meta_path)


def _end(code):
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
