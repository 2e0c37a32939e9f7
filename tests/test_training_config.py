"""The trainer's settings: presets, TOML files, key=value, and what is refused."""

import pytest

from fastlm.training.config import PRESETS, TrainConfig, read_settings


def test_settings_by_precedence(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("steps = 77\nn_layer = 3\n")
    values = read_settings(preset="shakespeare-char", file=file, settings=["n_layer=5", "dtype=bf16"], out="here")
    assert values["steps"] == 77 and values["n_layer"] == 5 and values["dtype"] == "bf16" and values["out"] == "here"
    assert values["batch_size"] == 12
    for name in PRESETS:
        assert TrainConfig(**read_settings(preset=name, data="x", out="y")).steps > 0


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: read_settings(preset="huge"), "preset is 'huge', wanted shakespeare-char"),
        (lambda: read_settings(settings=["learningrate=1"]), "learningrate is .* did you mean learning_rate"),
        (lambda: read_settings(settings=["steps"]), "--set steps: wanted key=value"),
        (lambda: read_settings(file="/nowhere.toml"), "/nowhere.toml: cannot be read"),
        (lambda: TrainConfig(data="x", out="y", steps=0), "steps is 0"),
        (lambda: TrainConfig(data="x", out="y", n_embd=10, n_head=3), "n_embd=10 is no multiple of n_head=3"),
        (lambda: TrainConfig(data="x", out="y", eval_tokens=0), "eval_tokens is 0"),
        (lambda: TrainConfig(out="y"), "data is missing; pass --data"),
        (lambda: TrainConfig(data="x", out="y", dtype="fp8"), "dtype is 'fp8'"),
        (lambda: TrainConfig(data="x", out="y", learning_rate=1e-5), "min_learning_rate=6e-05 is above"),
    ],
)
def test_bad_settings(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_a_byte_order_mark_is_no_setting(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfsteps = 77\n")
    assert read_settings(file=tmp_path / "run.toml") == {"steps": 77}
    TrainConfig(data="x", out="y", steps=7).dump(tmp_path / "train.json")
    (tmp_path / "train.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "train.json").read_bytes())
    assert TrainConfig.load(tmp_path / "train.json").steps == 7


def test_bad_toml(tmp_path):
    (tmp_path / "run.toml").write_text("steps = = 3")
    with pytest.raises(ValueError, match="no valid TOML"):
        read_settings(file=tmp_path / "run.toml")


def test_the_gpt2_presets_micro_batch_fills_the_waves_of_a_large_gpu():
    """The last wave too, of products of C columns in tiles of 128 × 256; 12 sequences would leave 27 % of them idle."""
    preset = PRESETS["gpt2"]
    rows = preset["micro_batch"] * preset["sequence_length"]
    tiles = -(-rows // 128) * -(-preset["n_embd"] // 256)
    waves = -(-tiles // 132)
    assert tiles > 0.95 * 132 * waves and preset["batch_size"] % preset["micro_batch"] == 0
