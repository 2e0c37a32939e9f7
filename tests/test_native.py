"""How Python's arguments become the structs of csrc/fastlm.h: by name, or an error that names the field."""

import struct

import pytest
import torch

from fastlm import dispatch, quantised
from fastlm.backends import native
from fastlm.generation import derived, engine

if (reason := dispatch.machine_why_not("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

OP = "softmax_xent_fwd"


def given(**changes):
    x = torch.randn(3, 8)
    fields = dict(loss=torch.empty(3), lse=torch.empty(3), x=x, y=torch.zeros(3, dtype=torch.int64), N=3, V=8,
                  ignore=-100, dtype=x.dtype) | changes
    return {name: value for name, value in fields.items() if value != "taken away"}


def test_a_tensor_gives_its_address_and_the_strides_behind_it():
    packer, fields = native.cpu._ops[OP], given(x=torch.randn(3, 20)[:, 3:11])
    values = dict(zip(packer.run.fields, struct.unpack(packer.run.format, packer.pack(fields))))
    assert values == {"loss": fields["loss"].data_ptr(), "lse": fields["lse"].data_ptr(), "x": fields["x"].data_ptr(),
                      "stride_xn": 20, "y": fields["y"].data_ptr(), "N": 3, "V": 8, "ignore": -100, "dtype": 0}
    assert struct.unpack(packer.run.format, packer.pack(fields | {"stride_xn": 7}))[3] == 7
    assert struct.unpack(packer.run.format, packer.pack(fields | {"x": None}))[2:4] == (0, 0)


@pytest.mark.parametrize("changes, told", [
    ({"lse": "taken away"}, f"{OP}: missing argument lse"),
    ({"lse": "taken away", "lsd": 1}, f"{OP}: missing argument lse"),
    ({"stride_yn": 1, "M": 2}, f"{OP}: no argument M, stride_yn"),
    ({"N": 2.5}, f"{OP}: .*N=2.5"),
    ({"N": None}, f"{OP}: .*N=None"),
    ({"N": torch.zeros(2)}, f"{OP}: .*N=tensor"),
    ({"V": torch.float32}, f"{OP}: .*V=torch.float32"),
    ({"ignore": "no"}, f"{OP}: .*ignore='no'"),
    ({"V": 2**63}, f"{OP}: .*V=9223372036854775808"),
    ({"x": 4096}, f"{OP}: missing argument stride_xn"),  # an address has no strides
    ({"x": torch.zeros(())}, f"{OP}: .*stride_xn=None"),
])
def test_what_does_not_fit_is_an_error_by_name(changes, told):
    with pytest.raises(TypeError, match=told):
        native.cpu._run(OP, torch.device("cpu"), **given(**changes))


@pytest.mark.parametrize("size", [0, 8, 1000, 5000])
def test_bytes_of_another_size_are_refused(size):
    with pytest.raises(ValueError, match=f"{OP}: its fields come in {size} bytes, wanted 68"):
        native.cpu._ops[OP].run(bytes(size), threads=1)


def test_numbers_that_python_repeats_are_those_of_the_header():
    found = native._C.cpu
    assert (found.kPanel, found.kWeightGroup, found.kChecksums) == (engine.PANEL, quantised.GROUP, derived.APART[0])


def test_every_struct_fits():
    for name, op in native._C.cpu.ops.items():
        assert len(op.fields) == len(op.format) == len(set(op.fields)), name
        assert struct.calcsize(op.format) <= 1024, name
