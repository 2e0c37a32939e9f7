"""`fastlm train`: what it writes and shows, Ctrl-C, and its sentences."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from runs import SMALL

from fastlm.training import checkpoint


def command(*arguments, wait=True):
    run = subprocess.Popen(
        [sys.executable, "-m", "fastlm.cli", "train", *map(str, arguments)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )
    if not wait:
        return run
    output, error = run.communicate(timeout=120)
    return run.returncode, output, error


def settings(**changes):
    values = {**SMALL, **changes}
    return [item for key, value in values.items() for item in ("--set", f"{key}={value}")]


def test_command(tmp_path, text):
    code, output, error = command("--data", text, "--out", tmp_path / "run", *settings(sample_tokens=8))
    assert code == 0, error
    assert "held out" in output and "a sample:" in output and (tmp_path / "run" / "loss.png").is_file()


def test_interrupted_command_saves_and_goes_on(tmp_path, text):
    run = command("--data", text, "--out", tmp_path / "run", *settings(steps=100000, save_every=50000), wait=False)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    output, error = run.communicate(timeout=60)
    assert run.returncode == 0 and "stopped by SIGINT and saved at step" in output, output + error
    assert f"fastlm train --resume --out {tmp_path / 'run'}" in output.replace("\n", " ")
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    step = json.loads((saved / "state.json").read_text())["step"]
    code, output, error = command("--resume", "--out", tmp_path / "run", "--set", f"steps={step + 2}")
    assert code == 0 and f"at step {step}" in output, output + error


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--data", "/nowhere"], "/nowhere: no such file or folder"),
        (["--set", "speed=9"], "speed is no setting"),
        (["--preset", "huge"], "preset is 'huge'"),
        (["--resume"], "no settings of a run"),
        (["--data", "TEXT", "--set", "sequence_length=900000"], "a sequence of 900000"),
        (["--data", "TEXT", "--set", "device=cuda"], "no CUDA GPU"),
    ],
)
def test_command_refuses_with_a_sentence(tmp_path, text, arguments, told):
    if "device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    given = [str(text) if argument == "TEXT" else argument for argument in arguments]
    code, _, error = command("--out", tmp_path / "run", *given)
    assert code == 2 and told in error and "Traceback" not in error
    assert not (tmp_path / "run" / "checkpoints").exists()
