"""Tuned tables: what is fastest for an op and a dtype on a device, as `fastlm tune` measured it: which backend, and
which way to cut the CPU's products (cuts.py).

A table is a JSON file named after the device, in the user's cache, or else in the package (`tables`, for devices that
were measured). `dispatch` reads it where no backend is forced.
"""

import functools
import json
import warnings
from contextlib import contextmanager
from pathlib import Path

from fastlm.measure import cuts
from fastlm.measure.files import cache_folder, slug, write_json
from fastlm.measure.numerics import DTYPES
from fastlm.measure.roofs import device_name

SHIPPED = Path(__file__).parent / "tables"


def order(family, dtype, device):
    """The backends for an op family on a device, fastest first: those that were measured, () where none were."""
    row = _rows(_name(device)).get((family, dtype))
    return tuple(row["order"]) if row else ()


def cut(op, dtype):
    """{"cut_…": value} for a CPU op of csrc/fastlm.h whose products have weights of a dtype ("fp32", "int8", …)."""
    row = _rows(_name("cpu")).get((op, dtype))
    found = _tried.get(op) or (row["cut"] if row else cuts.every(op)[0])
    return {f"cut_{name}": value for name, value in found.items()}


@contextmanager
def trying(op, cut):
    """While it is open, `cut` is what an op's products are cut by, whatever was measured."""
    _tried[op] = cut
    try:
        yield
    finally:
        del _tried[op]


_tried = {}


def tables(device):
    """The rows that hold for a device: op, dtype, us (name → median), and order and shapes, or cut."""
    return list(_rows(_name(device)).values())


def save(device, head, rows):
    """Writes rows into the user's table of a device, over those of the same op and dtype. Returns its path."""
    path = cache_folder() / "tuned" / f"{slug(_name(device))}.json"
    merged = {(row["op"], row["dtype"], "cut" in row): row for row in [*_read(path), *rows]}
    write_json(path, {"head": head, "rows": list(merged.values())})
    _rows.cache_clear()
    return path


@functools.cache
def _name(device):
    return device_name(device)


@functools.cache
def _rows(name):
    """(family, torch dtype) → row of an order, (op, dtype's name) → row of a cut: the shipped, the user's over them."""
    file = f"{slug(name)}.json"
    rows = [*_read(SHIPPED / file), *_read(cache_folder() / "tuned" / file)]
    return {(row["op"], row["dtype"] if "cut" in row else DTYPES[row["dtype"]]): row for row in rows}


def _read(path):
    try:
        rows = json.loads(path.read_text())["rows"]
        if not all(map(_is_row, rows)):
            raise ValueError("a row lacks op, dtype or order, or its cut is no candidate")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"{path} is damaged ({error}) and ignored; run fastlm tune again", stacklevel=2)
        return []
    return rows


def _is_row(row):
    if "cut" in row:
        return cuts.is_one(row["op"], row["dtype"], row["cut"])
    return bool(row["op"]) and row["dtype"] in DTYPES and isinstance(row["order"], list)
