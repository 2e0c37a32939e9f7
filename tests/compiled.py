"""Compiles C++ for tests once: objects and libraries are kept by the hash of all that went into them, in the system's
temporary directory; of several processes that want the same one, one compiles and the others wait."""

import concurrent.futures
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KEPT = Path(tempfile.gettempdir()) / f"fastlm-compiled-{os.getuid()}"


def compiler():
    if (found := shutil.which("g++")) is None:
        pytest.skip("g++ is not here to compile what this tests")
    return found


def table():
    """The module csrc/declared.py."""
    spec = importlib.util.spec_from_file_location("declared", ROOT / "csrc" / "declared.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def declared():
    """The folder of declared.h, which fastlm.h and declared.py make."""
    content = b"".join((ROOT / "csrc" / name).read_bytes() for name in ("declared.py", "fastlm.h"))
    folder = KEPT / hashlib.sha256(content).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{os.getpid()}-declared.h"
    table().write(partial)
    os.replace(partial, folder / "declared.h")
    return folder


def kept(name, command, inputs, folders=()):
    """The path of what `command` writes behind -o, of the files `inputs`; the names of folders do not count."""
    told = " ".join(map(str, command))
    for folder in (*folders, ROOT):
        told = told.replace(str(folder), "")
    content = told.encode() + b"".join(path.read_bytes() for path in inputs)
    target = KEPT / hashlib.sha256(content).hexdigest()[:24] / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_name(f"{name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                partial = target.with_name(f"{os.getpid()}-{name}")
                done = subprocess.run([*map(str, command), "-o", str(partial)], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr[-3000:]
                os.replace(partial, target)
    return target


def objects(sources, headers, folders=()):
    """The objects of {source: flags}, compiled on all cores."""
    def one(source):
        command = [compiler(), *sources[source], "-c", source]
        return kept(f"{source.stem}.o", command, [source, *headers], folders)

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(one, sources))


def linked(name, flags, parts):
    return kept(name, [compiler(), *flags, *parts], parts, {part.parent for part in parts})
