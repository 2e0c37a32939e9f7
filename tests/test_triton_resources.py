"""What the Triton kernels use on GPUs that are not here: no spills, shared memory that fits, 64-bit rows."""

import pytest
import resources

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("architecture, dtypes", [
    pytest.param(90, ("bf16",)), *(pytest.param(name, ("bf16", "fp16", "fp32"), marks=pytest.mark.slow)
                                   for name in resources.ARCHITECTURES)
])
def test_budgets(architecture, dtypes):
    rows = resources.report_elsewhere([architecture], dtypes)
    assert {row["dtype"] for row in rows} == set(dtypes) and len(rows) >= 25 * len(dtypes)
    optimizer = {"adamw", "grad_norm_partial", "grad_norm_merge"} if "fp32" not in dtypes else set()  # fp32 alone
    assert {row["kernel"].split()[0] for row in rows} == set(resources.LIMITS) - optimizer
    for row in rows:
        assert row["shared"] <= resources.SHARED_LIMIT[architecture] * 1024, row
        assert row["narrow_rows"] == 0, row
        products = row["kernel"].startswith(("attention_fwd", "attention_bwd", "decode_attention_split"))
        if products and row["dtype"] == "fp32":  # whole products in fp32 spill, whatever the tile
            continue
        assert row["spills"] == 0, row
        assert row["occupancy"] >= (0.12 if products else 0.5), row
        assert row["wide_loads"] > 0 or "tma" in row["kernel"] or "merge" in row["kernel"], row
        if architecture == 90 and products and "decode" not in row["kernel"]:
            assert row["wgmma"] > 0 and (row["tma"] > 0) == ("tma" in row["kernel"]), row
            # ptxas may make every product wait for the one before, and says so to nobody.
            assert row["wgmma_waits"] < row["wgmma"] / 2, row


    kept = resources.golden(resources.triton_version())
    if kept is not None:  # for this very Triton: another one compiles differently
        told = list(resources.differences(rows, kept))
        assert not told, "\n".join([*told, "as intended? then run: python tests/resources.py --golden"])


def test_a_difference_to_the_golden_rows_is_told():
    row = {"kernel": "k D=64", "dtype": "bf16", "sm": 90, "registers": 40, "spills": 0}
    assert list(resources.differences([row], [row])) == []
    assert list(resources.differences([{**row, "registers": 41}], [row])) == ["k D=64 bf16 90: registers 40 -> 41"]
    assert "not in the golden file" in next(resources.differences([{**row, "sm": 80}], [row]))


def test_a_narrow_row_is_found():
    """The check sees what it looks for: a row's offset multiplied in 32 bits."""
    narrow = """
    %n = tt.get_program_id x : i32
    %row = arith.muli %n, %stride : i32
    %p = tt.addptr %x, %row : !tt.ptr<f32>, i32
    """
    wide = narrow.replace("arith.muli %n, %stride : i32", "arith.muli %m, %stride : i64")
    assert resources.narrow_rows(narrow) == 1 and resources.narrow_rows(wide) == 0
