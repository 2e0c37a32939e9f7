"""Checkpoints that survive: complete or absent, verified when read, the last two kept.

    OUT/checkpoints/step_00000500/   model.safetensors optimizer.safetensors state.json manifest.json (sha256)

It holds a State and nothing else: weights, moments and the rest, as State.dump has them. It is written to a directory
of another name, every file and the directory are synced to disk, then it is renamed. Whatever kills the run, the newest
directory that verifies is the last good state.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastlm.data.disk import advice, cause

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
KEPT = 2


def save(directory, state):
    """The path of a State's checkpoint, written under `directory`.

    Raises RuntimeError naming the last good checkpoint where it cannot be written (a full disk); that one is untouched.
    """
    directory = Path(directory)
    target, staging = directory / f"step_{state.step:08d}", directory / f".saving_{state.step:08d}"
    weights, moments, rest = state.dump()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, staging / FILES[0], {"format": "pt"})
        save_file({name: tensor.contiguous() for name, tensor in moments.items()}, staging / FILES[1])
        (staging / FILES[2]).write_text(json.dumps(rest, indent=2), encoding="utf-8")
        manifest = {name: {"sha256": _sha256(staging / name)} for name in FILES}
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for path in staging.iterdir():
            sync(path)
        sync(staging)
        shutil.rmtree(target, ignore_errors=True)  # a damaged one that a resumed run has come to again
        os.rename(staging, target)
        sync(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        last = found(directory)
        kept = f"the last good one is {last[-1]}" if last else "there is none yet"
        other = "save to another disk"
        raise RuntimeError(
            f"{target}: the checkpoint could not be written ({cause(error)}); {kept}; {advice(error, other)}, and go "
            f"on with: fastlm train --resume --out {directory.parent}"
        ) from None
    for old in found(directory)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


@contextlib.contextmanager
def writing(out):
    """An OSError within is told as what keeps the run in OUT from going on, with the last good checkpoint."""
    try:
        yield
    except OSError as error:
        last = found(Path(out) / "checkpoints")
        kept = f"the last good checkpoint is {last[-1]}" if last else "there is no checkpoint yet"
        again = f"go on with: fastlm train --resume --out {out}" if last else "begin anew"
        raise RuntimeError(
            f"{out}: could not be written ({cause(error)}); {kept}; {advice(error, 'mend that')}, and {again}"
        ) from None


def found(directory):
    """The checkpoint directories under `directory`, oldest first, verified or not."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if re.fullmatch(r"step_\d{8,}", path.name))


def newest(directory, *, warn=print):
    """The path of the newest checkpoint that verifies; tells of those that do not.

    Raises ValueError where there is none.
    """
    paths = found(directory)
    for path in reversed(paths):
        try:
            verify(path)
            return path
        except ValueError as error:
            warn(f"{error}; going back to the one before")
    raise ValueError(f"{directory}: no checkpoint to resume from ({len(paths)} found, none whole)")


def load(path, state):
    """Makes `state` the State that was saved at `path`, which `newest` gave.

    Raises ValueError where that is of another model; then `state` is untouched.
    """
    weights, moments = load_file(path / FILES[0]), load_file(path / FILES[1])
    if not state.fits(weights):
        raise ValueError(f"{path}: the checkpoint is of another model than {path.parents[1] / 'train.json'} describes")
    state.load(weights, moments, json.loads((path / FILES[2]).read_text(encoding="utf-8")))


def verify(path):
    """Raises ValueError unless every file of a checkpoint is there and is what was written."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name in FILES:
            if manifest[name]["sha256"] != _sha256(path / name):
                raise ValueError(f"{path / name}: the checkpoint is damaged, its sha256 differs from the manifest's")
    except OSError as error:
        raise ValueError(f"{path}: the checkpoint is not whole ({error})") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path / 'manifest.json'}: the checkpoint's manifest is damaged ({error})") from None


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file):  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def sync(path):
    """Brings a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link(source, target):
    """Makes `target` the file `source`, at once and without a second copy where the file system can."""
    partial = Path(target).with_name(f".{Path(target).name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
        sync(partial)
    os.replace(partial, target)
