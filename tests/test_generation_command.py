"""`fastlm generate`: where prompts come from, what it prints, and its sentences."""

import io
import os
import subprocess
import sys

import pytest
import torch

import fastlm
from fastlm import cli
from fastlm.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = fastlm.GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    fastlm.GPT2(config).save_pretrained(path, tokenizer=Tokenizer.bytes())
    return path


@pytest.fixture
def command(directory, monkeypatch, capsys):
    """Runs the command in this process: (exit code, standard output, standard error)."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["fastlm", "generate", "--model", str(directory), *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capsys.readouterr()

    return run


GREEDY = ["--temperature", "0", "--max-new-tokens", "5"]


def test_where_the_prompt_comes_from(command, tmp_path):
    code, text, told = command(*GREEDY, "--prompt", "Hi")
    assert code == 0 and text.startswith("Hi") and "5 tokens in" in told and "tokens/s" in told
    assert command(*GREEDY, stdin=b"Hi\n")[1] == text
    assert command(*GREEDY, "--prompt", "-", stdin=b"Hi")[1] == text
    assert command(*GREEDY, "--prompt", "Hi", "--dtype", "bf16", "--device", "cpu")[0] == 0
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("Hi\r\n\nüber\u2028Grenzen\n".encode())
    code, texts, told = command(*GREEDY, "--file", prompts)
    assert texts.startswith(text.rstrip("\n") + "\n\nüber\u2028Grenzen") and "10 tokens in" in told
    code, texts, told = command("--prompt", "Hi", "--num-return-sequences", "3", "--max-length", "9", "--seed", "1")
    assert texts.count("Hi") >= 3 and "21 tokens in" in told


def test_streamed_text_is_the_text(command):
    """An untrained model of bytes writes broken UTF-8: what is incomplete at the end is told alike."""
    for seed in range(6):
        arguments = "--prompt", "Zürich", "--seed", seed, "--max-new-tokens", "9"
        assert command(*arguments, "--stream")[1] == command(*arguments, "--no-stream")[1]


def test_a_tokenizer_from_elsewhere(command, directory, tmp_path):
    Tokenizer.bytes().save(tmp_path / "other")
    assert command(*GREEDY, "--prompt", "Hi", "--tokenizer", tmp_path / "other")[0] == 0
    model = fastlm.GPT2.from_pretrained(directory)
    model.save_pretrained(tmp_path / "bare")
    code, _, told = command("--model", tmp_path / "bare", "--prompt", "Hi")
    assert code == 2 and "has neither tokenizer.json" in told and "--tokenizer" in told
    assert command("--model", tmp_path / "bare", "--tokenizer", directory, *GREEDY, "--prompt", "Hi")[0] == 0


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--prompt", ""], "the prompt is empty"),
        ([], "the prompt is empty"),
        (["--prompt", "a", "--max-new-tokens", "99"], "n_positions=64"),
        (["--prompt", "a" * 64], "n_positions=64"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "a", "--max-length", "1"], "wanted fewer than max_length=1"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "a", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "a", "--top-k", "0"], "top_k is 0"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p is 1.5"),
        (["--prompt", "a", "--seed", "-3"], "seed is -3"),
        (["--prompt", "a", "--num-return-sequences", "0"], "num_return_sequences is 0"),
        (["--prompt", "a", "--num-return-sequences", "2", "--stream"], "--stream prints one text, got 1 × 2"),
        (["--prompt", "a", "--dtype", "fp8"], "--dtype is 'fp8', wanted fp32 or bf16"),
        (["--prompt", "a", "--device", "tpu"], "--device is 'tpu'"),
        (["--prompt", "a\udcff"], "--prompt: is no UTF-8 text"),
        (["--prompt", "a", "--file", "b"], "got both --prompt and --file"),
        (["--file", "/nowhere"], "/nowhere: cannot be read"),
        (["--prompt", "a", "--model", "/nowhere"], "/nowhere: is no directory"),
        (["--prompt", "a", "--tokenizer", "/nowhere"], "/nowhere: no such file or directory"),
    ],
)
def test_it_refuses_with_a_sentence(command, arguments, told):
    code, text, message = command(*arguments)
    assert code == 2 and told in message and message.count("\n") == 1 and not text


def test_standard_input_and_files_that_are_no_text(command, tmp_path):
    assert "standard input: is no UTF-8 text" in command(stdin=b"\xff\xfe")[2]
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "binary: is no UTF-8 text" in command("--file", tmp_path / "binary")[2]
    (tmp_path / "empty").write_bytes(b"\n\n")
    assert "empty: holds no prompt" in command("--file", tmp_path / "empty")[2]


def test_many_prompts_come_in_batches_and_in_order(command, tmp_path, monkeypatch):
    """The same draws however many are computed at once, and no batch larger than asked for."""
    module = sys.modules["fastlm.generation.generate"]
    prompts, sizes, run = tmp_path / "prompts.txt", [], module._run
    prompts.write_text("\n".join(f"{'long ' * (n % 3)}prompt {n}" for n in range(70)))
    monkeypatch.setattr(module, "_run", lambda model, prompts, *rest: sizes.append(len(prompts)) or run(
        model, prompts, *rest))
    options = "--file", prompts, "--max-new-tokens", "3", "--seed", "7"
    texts = command(*options, "--batch-size", "70")[1]
    assert sizes == [70]
    for size, wanted in (("1", [1] * 70), ("32", [32, 32, 6]), (None, [32, 32, 6])):
        sizes.clear()
        code, found, told = command(*options, *(["--batch-size", size] if size else []))
        assert code == 0 and found == texts and "tokens in" in told and sizes == wanted
    sizes.clear()
    command(*options, "--batch-size", "32", "--num-return-sequences", "4")
    assert sizes == [8] * 8 + [6]  # rows, with the texts of a prompt
    code, text, told = command(*options, "--batch-size", "0")
    assert code == 2 and "batch_size is 0, wanted a whole number ≥ 1" in told and not text


def test_a_prompt_that_does_not_fit_is_told_before_the_first_is_written(command, tmp_path):
    """By its number among all, though it lies in the last batch."""
    (tmp_path / "prompts.txt").write_text("a\n" * 5 + "b" * 64)
    code, text, told = command("--file", tmp_path / "prompts.txt", "--batch-size", "2")
    assert code == 2 and not text and "prompt 5 has 64 tokens" in told


def test_batches_from_python(directory):
    model, tokenizer = fastlm.GPT2.from_pretrained(directory), Tokenizer.bytes()
    texts = [f"prompt {n}" for n in range(9)]
    whole = fastlm.generate(model, tokenizer, texts, max_new_tokens=4, seed=3, num_return_sequences=2)
    assert fastlm.generate(model, tokenizer, texts, max_new_tokens=4, seed=3, num_return_sequences=2,
                           batch_size=4) == whole
    torch.manual_seed(5)
    whole = fastlm.generate(model, tokenizer, texts, max_new_tokens=4)
    torch.manual_seed(5)
    assert fastlm.generate(model, tokenizer, texts, max_new_tokens=4, batch_size=2) == whole


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1:surrogateescape"])
def test_what_a_terminal_cannot_show_is_replaced(directory, encoding):
    """The prompt comes back in the text; what is not in the encoding becomes a question mark."""
    arguments = [sys.executable, "-m", "fastlm.cli", "generate", "--model", directory, "--prompt", "aé😀日z", *GREEDY]
    done = subprocess.run(arguments, capture_output=True, timeout=120, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    first = "a?" if encoding == "ascii" else "aé"
    assert done.stdout.startswith(f"{first}??z".encode("latin-1")) and b"5 tokens in" in done.stderr


def test_an_encoding_that_says_what_to_do_is_kept(directory):
    arguments = [sys.executable, "-m", "fastlm.cli", "generate", "--model", directory, "--prompt", "a😀", *GREEDY]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:backslashreplace"}
    done = subprocess.run(arguments, capture_output=True, timeout=120, env=environment)
    assert done.returncode == 0 and done.stdout.startswith(b"a\\U0001f600"), done


BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_text(command, tmp_path):
    """In a file of prompts, and on standard input."""
    (tmp_path / "prompts").write_bytes(BOM + b"Hi\nHo\n")
    code, texts, told = command(*GREEDY, "--file", tmp_path / "prompts")
    assert code == 0 and texts.startswith("Hi") and "\ufeff" not in texts
    assert command(*GREEDY, stdin=BOM + b"Hi\n")[1] == command(*GREEDY, "--prompt", "Hi")[1]
    (tmp_path / "prompts").write_bytes(BOM + b"\n")
    assert "holds no prompt" in command("--file", tmp_path / "prompts")[2]
    (tmp_path / "prompts").write_bytes("Hi".encode("utf-16"))
    assert "is no UTF-8 text (it begins with the byte order mark of UTF-16" in command(
        "--file", tmp_path / "prompts")[2]


@pytest.mark.parametrize("forced", ["cuda", "softmax_xent=cuda", "abacus", "attention=nothing"])
def test_a_backend_that_is_not_here(directory, forced):
    if torch.cuda.is_available() and "cuda" in forced:
        pytest.skip("a GPU is here: cuda runs")
    arguments = [sys.executable, "-m", "fastlm.cli", "generate", "--model", directory, "--prompt", "a"]
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=120, env={**os.environ, "FASTLM_BACKEND": forced}
    )
    assert done.returncode == 2 and done.stderr.startswith("fastlm: FASTLM_BACKEND: ") and not done.stdout
    assert done.stderr.count("\n") == 1
