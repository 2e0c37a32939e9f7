"""Tuned tables: which backend is fastest for an op and a dtype on a device, as `fastlm tune` measured it.

A table is a JSON file named after the device, in the user's cache, or else in the package (`tables`, for devices that
were measured). `dispatch` reads it where no backend is forced.
"""

import functools
import json
import warnings
from pathlib import Path

from fastlm.measure.files import cache_folder, slug, write_json
from fastlm.measure.numerics import DTYPES
from fastlm.measure.roofs import device_name

SHIPPED = Path(__file__).parent / "tables"


def order(family, dtype, device):
    """The backends for an op family on a device, fastest first: those that were measured, () where none were."""
    row = _rows(_name(device)).get((family, dtype))
    return tuple(row["order"]) if row else ()


def tables(device):
    """The rows that hold for a device, each a dict of op, dtype, order, us (backend → median) and shapes."""
    return list(_rows(_name(device)).values())


def save(device, head, rows):
    """Writes rows into the user's table of a device, over those of the same op and dtype. Returns its path."""
    path = cache_folder() / "tuned" / f"{slug(_name(device))}.json"
    merged = {(row["op"], row["dtype"]): row for row in [*_read(path), *rows]}
    write_json(path, {"head": head, "rows": list(merged.values())})
    _rows.cache_clear()
    return path


@functools.cache
def _name(device):
    return device_name(device)


@functools.cache
def _rows(name):
    """(family, torch dtype) → row: the shipped ones, and the user's over them."""
    file = f"{slug(name)}.json"
    rows = [*_read(SHIPPED / file), *_read(cache_folder() / "tuned" / file)]
    return {(row["op"], DTYPES[row["dtype"]]): row for row in rows}


def _read(path):
    try:
        rows = json.loads(path.read_text())["rows"]
        if not all(row["op"] and row["dtype"] in DTYPES and isinstance(row["order"], list) for row in rows):
            raise ValueError("a row lacks op, dtype or order")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"{path} is damaged ({error}) and ignored; run fastlm tune again", stacklevel=2)
        return []
    return rows
