"""One command for a GPU that is at hand for minutes: `python -m benchmarks.gpu --minutes 9 [--out DIR]`.

Steps in the order of their worth, each a process of its own with a limit. What a step finds is written as it comes
into OUT/gpu.json, what it says into OUT/gpu.log; a step that fails, hangs or dies is named, and the next one runs.

    install    wheels from --wheels, and the package for this GPU where the kernels are not there yet
    there      versions, device, architectures
    warm       (beside the next) compiles what stock PyTorch will need, into the compilers' caches
    smoke      every op × backend × direction against fp64; a training step and a decode step in a CUDA graph
    sanitize   (beside the next) compute-sanitizer's memcheck and racecheck over the CUDA kernels
    tests      the kernels' own tests, several workers
    train      GPT-2 124M, B = 32: ours by backend beside stock PyTorch eager and compiled; the longest kernels
    decode     GPT-2 124M at B = 1 and 64: ours by backend; the kernels of a step
    ops        each op beside its peers at the shapes that decide
    products   the matrix products of a step, 50257 beside 50304 columns, sums in fp32
    launches   what a kernel boundary costs: graph nodes, dependent launch, prefetch, barriers (nvcc needed)
    tune       the launch configurations of Triton's attention, timed
    peers      transformers' decoding, static cache, compiled
    rest       the whole test suite, while time is left

What is timed, from `train` on, runs alone. Nine minutes reach the end or nearly; four are for what was mended: name
its steps, `... --minutes 4 smoke train`.
Nothing is fetched: where pydantic or plotext may be missing, put their wheels, and fastlm's own, built for the same
Python (`pip wheel . --no-deps -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=90a-real`), into a folder for --wheels.
`--dry` rehearses all of it on the CPU, with tiny shapes. Only the standard library is imported here. Exit code 1
where a step failed, 2 for wrong arguments or without a GPU.
"""

import argparse
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ROW = "@row "  # a line of a step's output that begins so holds a row as JSON, the others go into the log


@dataclass(frozen=True)
class Step:
    """limit: the seconds that it may take; least: those without which it is not begun; beside: with what follows it."""

    name: str
    limit: float
    least: float = 5
    beside: bool = False


STEPS = (
    Step("install", 100), Step("there", 60), Step("warm", 200, beside=True), Step("smoke", 90),
    Step("sanitize", 120, 25, beside=True), Step("tests", 80, 20), Step("train", 70, 20), Step("decode", 50, 15),
    Step("ops", 100, 15), Step("products", 25, 10), Step("launches", 40, 15), Step("tune", 70, 25),
    Step("peers", 80, 40), Step("rest", 600, 30),
)
FIRST = ("install", "there")  # run whatever is named
TIMED = ("train", "decode", "ops", "products", "launches", "tune", "peers")
VERDICT = re.compile(r"(?:^|\] )(PASSED|FAILED|ERROR|SKIPPED) (\S.*::.*)")  # of a worker, with pytest -v
LATE = 124  # the exit code of what is ended at its limit, as the shell's timeout has it
PATIENCE = 25  # seconds that what is timed waits for what still runs beside


def main(arguments=None):
    """Runs the command; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Prove and measure on this GPU.")
    parser.add_argument("steps", nargs="*", metavar="STEP", help="only these (and install, there)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; later steps are left out")
    parser.add_argument("--out", type=Path, help="the folder of gpu.json and gpu.log; a new one in results/ else")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that are installed first, without a network")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny shapes")
    asked = parser.parse_args(arguments)
    names = [step.name for step in STEPS]
    if not asked.minutes > 0:
        parser.error(f"--minutes is {asked.minutes:g}, wanted more than 0")
    if wrong := [name for name in asked.steps if name not in names]:
        parser.error(f"no step {wrong[0]!r}; the steps are {', '.join(names)}")
    if asked.wheels is not None and not asked.wheels.is_dir():
        parser.error(f"--wheels: {asked.wheels} is no folder")
    out = asked.out or ROOT / "benchmarks" / "results" / time.strftime("gpu-%Y%m%d-%H%M%S")
    try:
        run = Run(out, seconds=60 * asked.minutes, dry=asked.dry, wheels=asked.wheels)
    except OSError as error:
        parser.error(f"--out: {out} cannot be written ({error.strerror})")
    with run:
        return run.all([step for step in STEPS if not asked.steps or step.name in asked.steps + list(FIRST)])


class Run:
    """The steps of one call, the record of what they find, and the end of its time."""

    def __init__(self, out, *, seconds, dry, wheels=None):
        self.out, self.dry, self.wheels = Path(out), dry, wheels
        self.started = time.monotonic()
        self.end = self.started + seconds
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = open(self.out / "gpu.log", "a", encoding="utf-8")
        self.found = {"head": {"date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "commit": commit(), "dry": dry,
                               "minutes": seconds / 60}, "steps": [], "rows": []}
        self.site = tempfile.mkdtemp(prefix="fastlm-gpu-")
        self.lock = threading.RLock()
        self.write()

    def __enter__(self):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs beside is ended too
        return self

    def __exit__(self, *_):
        self.write()
        self.log.close()
        shutil.rmtree(self.site, ignore_errors=True)

    def all(self, steps):
        """Runs steps in turn while time is left, prints the table, and returns the exit code."""
        beside = []
        try:
            for step in steps:
                if step.beside:
                    beside.append(threading.Thread(target=self.step, args=(step,), daemon=True))
                    beside[-1].start()
                    continue
                if step.name in TIMED:
                    self.alone(beside)
                verdict = self.step(step)
                if step.name == "there" and verdict != "passed":
                    break
        finally:
            self.alone(beside, patience=PATIENCE if sys.exc_info()[0] is None else 0)
        return self.table()

    def alone(self, beside, patience=PATIENCE):
        """Waits for the steps that run beside, and ends those that take too long."""
        until = time.monotonic() + min(patience, max(self.left() - 60, 0))
        for thread in beside:
            thread.join(max(until - time.monotonic(), 0))
        with self.lock:
            for process in _running:
                end(process)
        for thread in beside:
            thread.join(10)
        beside.clear()

    def left(self):
        return self.end - time.monotonic()

    def step(self, step):
        """Runs a step to its end or its limit; its verdict: passed, FAILED or left out."""
        at = time.monotonic()
        if self.left() < step.least:
            return self.finished(step, "left out", 0.0, "no time was left")
        limit = min(step.limit, self.left())
        self.say(f"{step.name}: at most {limit:.0f} s")
        for command, why in self.commands(step.name):
            if why is not None:
                return self.finished(step, "left out", time.monotonic() - at, why)
            told = {"rows": 0, "failed": 0, "summary": "", "last": ""}
            code = self.child(step.name, command, limit - (time.monotonic() - at), told)
            summary = told["summary"] or told["last"]
            if code or told["failed"]:
                what = {0: "", LATE: "ran past its limit"}.get(code, f"exit code {code}")
                summary = "; ".join(filter(None, (what, told["failed"] and f"{told['failed']} rows failed", summary)))
                return self.finished(step, "FAILED", time.monotonic() - at, summary)
        return self.finished(step, "passed", time.monotonic() - at, summary)

    def commands(self, name):
        """What a step runs: (command, None or the sentence why it cannot run here)."""
        if name == "install":
            return self.installing()
        if name in ("tests", "rest"):
            return [(pytest(name, self.dry), None)]
        if name == "sanitize" and (why := self.no_sanitizer()):
            return [([], why)]
        if name == "launches" and (self.dry or not shutil.which("nvcc")):
            return [([], "needs a GPU" if self.dry else "nvcc is not on the PATH (it is part of CUDA)")]
        worker = [sys.executable, "-m", "fastlm.benchmarks.gpu.steps", name, *(["--dry"] if self.dry else [])]
        if name != "sanitize":
            return [(worker, None)]
        tool = ["compute-sanitizer", "--error-exitcode", "9", "--kernel-name", "kernel_substring=fastlm"]
        return [([*tool, "--tool", check, *worker], None) for check in ("memcheck", "racecheck")]

    def installing(self):
        """Wheels first; then the package itself, built for the GPUs here, where its kernels are still missing."""
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-cache-dir",
               "--no-compile", "--disable-pip-version-check", "--target", self.site]
        wheels = [] if self.wheels is None else sorted(map(str, self.wheels.resolve().glob("*.whl")))
        commands = [([*pip, "--upgrade", *wheels], None)] if wheels else []
        probe = "import fastlm._C as c, fastlm.benchmarks" + ("" if self.dry else "; c.cuda.architectures()")
        built = any(Path(wheel).name.startswith("fastlm-") for wheel in wheels) or subprocess.run(
            [sys.executable, "-c", probe], cwd=self.site, capture_output=True).returncode == 0
        if not built:
            commands.append(([*pip, "--no-build-isolation", str(ROOT), "-Ccmake.define.FASTLM_TARGETS=native",
                              f"-Cbuild-dir={self.site}/build"], None))
        return commands + [([sys.executable, "-c", probe + "; print('fastlm is here')"], None)]

    def no_sanitizer(self):
        if self.dry:
            return "needs a GPU"
        if not shutil.which("compute-sanitizer"):
            return "compute-sanitizer is not on the PATH (it is part of CUDA)"
        return None

    def child(self, name, command, limit, told):
        """Runs a command, its rows and lines recorded as they come; the exit code, LATE past the limit."""
        # Interpreted kernels must not stand in for the GPU's.
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment = {**inherited, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1",
                       "FASTLM_STEP_SECONDS": str(limit)}
        if self.wheels is not None or os.listdir(self.site):
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (self.site, os.environ.get("PYTHONPATH"))))
        if name == "sanitize":
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # one allocation a tensor: an overstep is seen
        folder = ROOT / "tests" if name in ("tests", "rest") else self.site  # not ROOT: fastlm is what is installed
        try:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)
        except OSError as error:
            self.line(name, str(error), told)
            return 127
        with self.lock:
            _running.add(process)
        lines = queue.Queue()
        threading.Thread(target=lambda: [*map(lines.put, process.stdout), lines.put(None)], daemon=True).start()
        until, line = time.monotonic() + max(limit, 1.0), ""
        while line is not None and time.monotonic() < until:
            try:
                line = lines.get(timeout=max(0.01, min(1.0, until - time.monotonic())))
            except queue.Empty:
                if process.poll() is not None and lines.empty():  # a grandchild may hold the pipe open
                    break
                continue
            if line is not None:
                self.line(name, line.rstrip("\n"), told)
        late = time.monotonic() >= until and process.poll() is None
        if late and name in ("tests", "rest"):  # interrupted, pytest tells what has failed so far
            self.last_words(name, process, lines, told)
        end(process)
        with self.lock:
            _running.discard(process)
        return LATE if late else process.wait()

    def last_words(self, name, process, lines, told, seconds=6):
        process.send_signal(signal.SIGINT)
        until = time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while (line := lines.get(timeout=max(0.01, until - time.monotonic()))) is not None:
                self.line(name, line.rstrip("\n"), told)

    def line(self, name, line, told):
        with self.lock:
            if not line.startswith(ROW):
                self.log.write(f"{name:9}| {line}\n")
                self.log.flush()
                told["last"] = line.strip()[:160] or told["last"]
                if (verdict := VERDICT.search(line)) and name in ("tests", "rest"):
                    self.tested(name, *verdict.groups(), told)
                return
            try:
                row = json.loads(line[len(ROW):])
            except ValueError:
                row = {"failed": f"a row that is no JSON: {line[:200]}"}
            told["summary"] = row.pop("summary", told["summary"])
            self.found["head"] |= row.pop("head", {})
            if row:
                told["rows"] += 1
                told["failed"] += "failed" in row
                self.found["rows"].append({"step": name, **row})
                if "failed" in row:
                    self.say(f"{name}: FAILED {json.dumps(row)[:300]}")
            self.write()

    def tested(self, name, verdict, test, told):
        """Counts a line of pytest's; what failed is a row."""
        counts = told.setdefault("tests", dict.fromkeys(("PASSED", "FAILED", "ERROR", "SKIPPED"), 0))
        counts[verdict] += 1
        told["summary"] = ", ".join(f"{count} {word.lower()}" for word, count in counts.items() if count)
        if verdict in ("FAILED", "ERROR"):
            told["failed"] += 1
            self.found["rows"].append({"step": name, "failed": test})
            self.write()

    def say(self, text):
        with self.lock:
            stamped = f"[{time.monotonic() - self.started:5.1f} s] {text}"
            print(stamped, flush=True)
            self.log.write(stamped + "\n")
            self.log.flush()

    def finished(self, step, verdict, seconds, summary):
        with self.lock:
            self.found["steps"].append({"step": step.name, "verdict": verdict, "seconds": round(seconds, 1),
                                        "summary": summary})
            self.say(f"{step.name}: {verdict} in {seconds:.1f} s. {summary}")
            self.write()
        return verdict

    def write(self):
        with self.lock:
            partial = self.out / ".gpu.json.partial"
            partial.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.out / "gpu.json")

    def table(self):
        steps = self.found["steps"]
        lines = [f"{row['step']:9} {row['verdict']:8} {row['seconds']:6.1f} s   {row['summary']}" for row in steps]
        lines += [f"{row['step']:9} {row['told']}" for row in self.found["rows"] if "told" in row]
        text = "\n".join(["", *lines, f"{self.out / 'gpu.json'}: {len(self.found['rows'])} rows"])
        print(text, flush=True)
        self.log.write(text + "\n")
        if any(row["step"] == "there" and row["verdict"] == "FAILED" for row in steps):
            return 2
        return int(any(row["verdict"] == "FAILED" for row in steps))


_running = set()


def end(process):
    """Kills a child and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def pytest(name, dry):
    """The command of the kernels' own tests (`tests`) or of them all (`rest`)."""
    ops = [path.stem for path in sorted((ROOT / "fastlm" / "ops").glob("[a-z]*.py")) if path.stem != "gpt2_blocks"]
    kernels = [f"test_{op}.py" for op in ops if (ROOT / "tests" / f"test_{op}.py").is_file()]
    files = [*kernels, "-k", "cuda or triton"] if name == "tests" else []
    if dry:
        files = ["test_measure.py"]
    workers = ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    return [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", *workers, *files]


def commit():
    """The commit of this checkout, with + where files were changed; None outside of one."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return None if name.returncode else name.stdout.strip() + "+" * bool(changed.stdout.strip())

