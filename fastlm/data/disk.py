"""What is told of a file that cannot be written: which, why, and what to do."""

import contextlib
import errno
from pathlib import Path

FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


@contextlib.contextmanager
def naming(path):
    """An OSError within has the name of the file `path`, which a failed write leaves out."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def cause(error):
    """Why, and the file's name where it is known: "No space left on device, train_000000.bin"."""
    reason = "Not a directory" if isinstance(error, FileExistsError) else getattr(error, "strerror", None)
    name = getattr(error, "filename", None)
    return ", ".join([str(reason or error), *([Path(name).name] if isinstance(name, (str, Path)) else [])])


def advice(error, other):
    """What to do: make room where that is what lacks, or `other`."""
    return f"make room, or {other}" if getattr(error, "errno", None) in FULL else other
