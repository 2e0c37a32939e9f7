"""`fastlm train`: what it writes and shows, Ctrl-C, and its sentences."""

import json
import os
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


def test_a_terminal_of_few_characters(tmp_path, text):
    """A sample, dots and bars that ASCII lacks end no run."""
    (tmp_path / "text.txt").write_text(text.read_text()[:3000] + "ü😀日" * 400)
    arguments = ["train", "--data", tmp_path / "text.txt", "--out", tmp_path / "run",
                 *settings(sample_tokens=20, sample_prompt="ü😀")]
    run = subprocess.run([sys.executable, "-m", "fastlm.cli", *map(str, arguments)], capture_output=True, timeout=120,
                         env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0 and b"a sample:\n\n??" in run.stdout, run.stdout + run.stderr
    assert (tmp_path / "run" / "loss.png").is_file()


def started(out, source, *, wrapper=(), **options):
    """A long run, that has evaluated once and takes steps."""
    arguments = ["train", "--data", source, "--out", out, *settings(steps=100000, save_every=50000)]
    run = subprocess.Popen([*wrapper, sys.executable, "-m", "fastlm.cli", *map(str, arguments)], **options)
    while not (out / "metrics.jsonl").exists():
        assert run.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)
    return run


def saved_step(out):
    return json.loads((checkpoint.newest(out / "checkpoints") / "state.json").read_text())["step"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_tells_a_scheduler(tmp_path, text, name):
    """143 and 129: a run that was stopped is not finished. A second one does not cut off the save."""
    number = signal.Signals[name]
    run = started(tmp_path / "run", text, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.send_signal(number)
    run.send_signal(number)
    output, error = run.communicate(timeout=60)
    assert run.returncode == 128 + number, output + error
    assert f"stopped by {name} and saved at step" in output and saved_step(tmp_path / "run") > 0 and not error


def test_a_terminal_that_hangs_up_does_not_keep_a_run_from_saving(tmp_path, text):
    master, slave = os.openpty()
    run = started(tmp_path / "run", text, stdout=slave, stderr=slave, stdin=slave, start_new_session=True)
    os.close(slave), os.close(master)
    time.sleep(0.5)
    run.send_signal(signal.SIGHUP)
    assert run.wait(timeout=60) == 129 and saved_step(tmp_path / "run") > 0


def test_a_reader_that_left_does_not_end_a_run(tmp_path, text):
    out = tmp_path / "run"
    run = started(out, text, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    run.stdout.close()
    rows = (out / "metrics.jsonl").read_text().count("\n")
    while (out / "metrics.jsonl").read_text().count("\n") < rows + 3:
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 143 and saved_step(out) > 0


def test_nohup_is_kept(tmp_path, text):
    run = started(tmp_path / "run", text, wrapper=["nohup"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert run.poll() is None
    run.terminate()
    assert run.wait(timeout=60) == 143


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
