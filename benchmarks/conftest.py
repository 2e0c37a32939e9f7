"""What every benchmark shares: the backends that run natively here, and a check against the reference first."""

import pytest
import torch

from fastlm import dispatch, ops  # noqa: F401  ops fills the table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def native_backends(family, *, but=("reference",)):
    """The backends of an op that run natively (not interpreted) on this machine, best guess first."""
    row = next(row for row in dispatch.TABLE.values() if row.family == family)
    return [
        name for name in row.kernels
        if name not in but and dispatch.why_not(row.name, name) is None and DEVICE in dispatch.devices(name)
    ]


@pytest.fixture
def device():
    return DEVICE


def close(got, wanted, tolerance=2e-3):
    """Fails the benchmark where its op is wrong: a figure without this check is worth nothing."""
    error = (got.float() - wanted.float()).abs().max() / wanted.float().abs().max()
    assert error < tolerance, f"error {float(error):.1e} of the largest value, allowed {tolerance}"
