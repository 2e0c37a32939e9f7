"""`fastlm generate`: continues prompts with a model."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[str, typer.Option(help="A model directory, or a hub id such as gpt2.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt; standard input unless given.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file with one prompt a line.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Its directory, where the model's has none.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to write [50].")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of prompt and text together.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that reach this probability.")] = None,
    num_return_sequences: Annotated[int, typer.Option(help="Texts a prompt.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Makes the draws repeatable.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    stream: Annotated[bool | None, typer.Option("--stream/--no-stream", help="Print as it is written.")] = None,
):
    """Continue a prompt, standard input, or every line of a file."""
    import torch

    from fastlm import dispatch

    if dtype not in ("fp32", "bf16"):
        raise ValueError(f"--dtype is {dtype!r}, wanted fp32 or bf16")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device is {device!r}, wanted auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but this machine has no CUDA GPU that torch can use")
    dispatch.use()  # a forced backend that this machine lacks says so before a model is loaded
    prompts = _read(prompt, file)

    from fastlm.gpt2 import GPT2

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    gpt2 = GPT2.from_pretrained(model, device=device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    vocabulary = _tokenizer(tokenizer or model)
    if max_new_tokens is None and max_length is None:
        max_new_tokens = 50
    options = {
        "max_new_tokens": max_new_tokens, "max_length": max_length, "temperature": temperature, "top_k": top_k,
        "top_p": top_p, "num_return_sequences": num_return_sequences, "seed": seed,
    }
    one = len(prompts) == 1 and num_return_sequences == 1
    if stream and not one:
        raise ValueError(f"--stream prints one text, got {len(prompts) * num_return_sequences}")
    if one and (sys.stdout.isatty() if stream is None else stream):
        _stream(gpt2, vocabulary, prompts[0], options)
    else:
        _print(gpt2, vocabulary, prompts, options)


def _read(prompt, file):
    """The prompts: the option, the file's lines, or standard input."""
    if prompt is not None and file is not None:
        raise ValueError("got both --prompt and --file, wanted one of them")
    if file is not None:
        try:
            prompts = [line for line in file.read_text(encoding="utf-8").splitlines() if line]
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise ValueError(f"{file}: is no UTF-8 text") from None
        if not prompts:
            raise ValueError(f"{file}: holds no prompt, wanted one a line")
        return prompts
    text = sys.stdin.read().removesuffix("\n") if prompt is None or prompt == "-" else prompt
    if not text:
        raise ValueError("the prompt is empty; pass --prompt TEXT, --file PATH, or text on standard input")
    return [text]


def _tokenizer(name):
    from fastlm.data.tokenizer import Tokenizer
    from fastlm.pretrained import find

    return Tokenizer.load(find(name))


def _told(tokens, started):
    import time

    seconds = time.perf_counter() - started
    print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s", file=sys.stderr)


def _stream(model, tokenizer, prompt, options):
    import time

    from fastlm.generation import stream_tokens

    started, tokens, complete = time.perf_counter(), 0, tokenizer.stream()
    print(prompt, end="", flush=True)
    for (token,) in stream_tokens(model, [tokenizer.encode(prompt)], **options):
        tokens += 1
        if token != tokenizer.end_of_text:
            print(complete(token), end="", flush=True)
    print(flush=True)
    _told(tokens, started)


def _print(model, tokenizer, prompts, options):
    import time

    from fastlm.generation.generate import generate_tokens, text_of

    started = time.perf_counter()
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    rows = generate_tokens(model, encoded, **options)
    print("\n\n".join(text_of(tokenizer, row) for row in rows))
    given = sum(map(len, encoded)) * options["num_return_sequences"]
    _told(sum(map(len, rows)) - given, started)
