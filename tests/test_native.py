"""How Python's arguments become the structs of csrc/fastlm.h: by name, or an error that names the field."""

import struct
import subprocess
from pathlib import Path

import compiled
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
    op, fields = native.cpu._ops[OP], given(x=torch.randn(3, 20)[:, 3:11])
    values = dict(zip(op.fields, struct.unpack(op.format, op.packed(fields))))
    assert values == {"loss": fields["loss"].data_ptr(), "lse": fields["lse"].data_ptr(), "x": fields["x"].data_ptr(),
                      "stride_xn": 20, "y": fields["y"].data_ptr(), "N": 3, "V": 8, "ignore": -100, "dtype": 0}
    assert struct.unpack(op.format, op.packed(fields | {"stride_xn": 7}))[3] == 7
    assert struct.unpack(op.format, op.packed(fields | {"x": None}))[2:4] == (0, 0)
    assert struct.unpack(op.format, op.packed(fields | {"x": 4096, "stride_xn": 7}))[2:4] == (4096, 7)


@pytest.mark.parametrize("changes, told", [
    ({"lse": "taken away"}, f"{OP}: missing argument lse"),
    ({"lse": "taken away", "lsd": 1}, f"{OP}: missing argument lse"),
    ({"stride_yn": 1, "M": 2}, f"{OP}: no argument M, stride_yn"),
    ({"N": 2.5}, f"{OP}: .*N=2.5"),
    ({"N": None}, f"{OP}: .*N=None"),
    ({"N": torch.zeros(2)}, f"{OP}: .*N=tensor"),
    ({"y": "no"}, "no attribute 'data_ptr'"),
    ({"y": -1}, f"{OP}: .*y=-1"),
    ({"dtype": 2**32}, f"{OP}: .*dtype=4294967296"),
    ({"dtype": torch.float64}, f"{OP}: .*dtype=torch.float64"),
    ({"dtype": []}, rf"{OP}: .*dtype=\[\]"),
    ({"V": torch.float32}, f"{OP}: .*V=torch.float32"),
    ({"ignore": "no"}, f"{OP}: .*ignore='no'"),
    ({"V": 2**63}, f"{OP}: .*V=9223372036854775808"),
    ({"x": 4096}, f"{OP}: missing argument stride_xn"),  # an address has no strides
    ({"x": torch.zeros(())}, f"{OP}: missing argument stride_xn"),
])
def test_what_does_not_fit_is_an_error_by_name(changes, told):
    with pytest.raises((TypeError, AttributeError), match=told):
        native.cpu._run(OP, torch.device("cpu"), **given(**changes))


def test_numbers_that_python_repeats_are_those_of_the_header():
    found = native._C.cpu
    assert (found.kPanel, found.kWeightGroup, found.kChecksums) == (engine.PANEL, quantised.GROUP, derived.APART[0])


def test_every_struct_fits():
    for name, op in native._C.cpu.ops.items():
        assert len(op.fields) == len(op.format) == len(set(op.fields)), name
        assert struct.calcsize(op.format) <= 1024, name


def test_a_team_that_keeps_its_caller_waiting_is_done_without_for_a_while(tmp_path):
    program, source, csrc = tmp_path / "team", Path(__file__).parent / "team.cpp", compiled.ROOT / "csrc"
    subprocess.run([compiled.compiler(), "-std=c++20", "-fopenmp", f"-I{csrc}", source, "-o", program], check=True)
    told = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert told == ("late 1, late at a barrier 1, alone 1, tried again 2, even 2, the caller last 2, few pieces 2, "
                    "one asked for 1\n")
