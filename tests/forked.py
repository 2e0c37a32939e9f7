"""A process that has imported torch and what else tests need, and forks one for every piece of code to run alone.

What is changed on purpose (fastlm, and the tests' own modules) is imported in the forked process, never here.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback

IMPORTED = ("numpy", "torch", "torch.testing", "pytest", "hypothesis", "pytest_benchmark.plugin", "xdist.plugin",
            "triton", "triton.language", "triton.runtime.interpreter", "safetensors.torch", "tokenizers", "pydantic",
            "typer", "rich.console", "transformers.models.gpt2.modeling_gpt2")
THREADS = 2  # so that what threads share out is shared out, however many cores there are


class Forks:
    """The process that forks, seen from a test."""

    def __init__(self):
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
        environment |= {"OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=environment)

    def run(self, code, folder, timeout=600, **environment):
        """The finished process that ran code in a folder."""
        paths = [folder / name for name in ("stdout.txt", "stderr.txt")]
        job = {"code": code, "folder": str(folder), "environment": environment, "timeout": timeout,
               "outputs": list(map(str, paths))}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process that forks has ended"
        stdout, stderr = (path.read_text(errors="replace") for path in paths)
        if (code := json.loads(answer)) is None:
            raise subprocess.TimeoutExpired("forked", timeout, stdout, stderr)
        return subprocess.CompletedProcess("forked", code, stdout, stderr)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve():
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            __import__(name)
    for line in sys.stdin:
        job = json.loads(line)
        if not (child := os.fork()):
            work(job)
        print(json.dumps(wait(child, time.monotonic() + job["timeout"])), flush=True)


def wait(child, deadline):
    """The exit code of a process, or None where it was killed at the deadline."""
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def work(job):
    """Runs the code as the whole of this process."""
    import atexit

    os.setpgid(0, 0)
    for number, path in enumerate(job["outputs"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["folder"])
    os.environ.update(job["environment"])
    sys.argv, code = ["-c"], 0
    try:
        exec(compile(job["code"], "<forked>", "exec"), {"__name__": "__main__"})
    except SystemExit as asked:
        code = int(asked.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
