"""What the Triton kernels use on GPUs that are not here: no spills, shared memory that fits, 64-bit rows."""

import pytest
import resources

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("architecture", [
    pytest.param(name, marks=[] if name == 90 else pytest.mark.slow) for name in resources.ARCHITECTURES
])
def test_budgets(architecture):
    rows = resources.report_elsewhere([architecture])
    assert {row["dtype"] for row in rows} == set(resources.DTYPES) and len(rows) >= 12
    for row in rows:
        assert row["shared"] <= resources.SHARED_LIMIT[architecture] * 1024, row
        assert row["narrow_rows"] == 0, row
        assert row["spills"] == 0, row
        assert row["occupancy"] >= 0.5 and row["wide_loads"] > 0, row


def test_a_narrow_row_is_found():
    """The check sees what it looks for: a row's offset multiplied in 32 bits."""
    narrow = """
    %n = tt.get_program_id x : i32
    %row = arith.muli %n, %stride : i32
    %p = tt.addptr %x, %row : !tt.ptr<f32>, i32
    """
    wide = narrow.replace("arith.muli %n, %stride : i32", "arith.muli %m, %stride : i64")
    assert resources.narrow_rows(narrow) == 1 and resources.narrow_rows(wide) == 0
