"""`fastlm generate`: continues prompts with a model."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[str, typer.Option(help="A model directory, or a hub id such as gpt2.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt; - or none: standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file with one prompt a line.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Its directory, where the model's has none.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to write [50, or what fits].")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of prompt and text together.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that reach this.")] = None,
    num_return_sequences: Annotated[int, typer.Option(help="Texts a prompt.")] = 1,
    batch_size: Annotated[int, typer.Option(help="The most texts that are written at once.")] = 32,
    seed: Annotated[int | None, typer.Option(help="Makes the draws repeatable.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    stream: Annotated[bool | None, typer.Option("--stream/--no-stream", help="Print as it comes.")] = None,
):
    """Continue a prompt, standard input, or every line of a file."""
    import torch

    from fastlm.cli.device import device_of
    from fastlm.data.tokenizer import Tokenizer
    from fastlm.dispatch.forcing import forced
    from fastlm.generation.sampling import check_sampling
    from fastlm.gpt2 import GPT2
    from fastlm.pretrained import find

    if dtype not in ("fp32", "bf16"):
        raise ValueError(f"--dtype is {dtype!r}, wanted fp32 or bf16")
    device = device_of(device)
    forced("decode_attention")  # a backend of FASTLM_BACKEND that this machine lacks says so now
    check_sampling(temperature, top_k, top_p, seed)  # before the seconds that a large model takes to load
    prompts = _read(prompt, file)
    one = len(prompts) == 1 and num_return_sequences == 1
    if stream and not one:
        raise ValueError(
            f"--stream prints one text, got {len(prompts)} × {num_return_sequences}; use --no-stream"
        )

    directory = find(model)
    try:
        vocabulary = Tokenizer.load(tokenizer or directory)
    except ValueError as error:
        raise ValueError(f"{error}; pass a tokenizer's directory with --tokenizer") from None
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    gpt2 = GPT2.from_pretrained(directory, device=device, dtype=dtypes[dtype])
    options = {
        "max_new_tokens": max_new_tokens, "max_length": max_length, "temperature": temperature,
        "top_k": top_k, "top_p": top_p, "num_return_sequences": num_return_sequences, "seed": seed,
    }
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, wanted a whole number ≥ 1")
    streaming = one and (sys.stdout.isatty() if stream is None else stream)
    if streaming:
        _stream(gpt2, vocabulary, prompts, options)
    else:
        _print(gpt2, vocabulary, prompts, {**options, "batch_size": batch_size})


def _read(prompt, file):
    """The prompts: the option, the file's lines, or standard input."""
    from fastlm.data.text import MARK
    from fastlm.data.text import read as read_text

    if prompt is not None and file is not None:
        raise ValueError("got both --prompt and --file, wanted one of them")
    source = "--prompt" if prompt not in (None, "-") else "standard input"
    try:
        if file is not None:
            source = str(file)
            prompts = [line for line in read_text(file).split("\n") if line]
            if not prompts:
                raise ValueError(f"{file}: holds no prompt, wanted one a line")
            return prompts
        text = prompt if source == "--prompt" else sys.stdin.read().removeprefix(MARK).removesuffix("\n")
        text.encode()  # raises for bytes that the terminal's encoding could not read
    except OSError as error:
        raise ValueError(f"{source}: cannot be read ({error.strerror})") from None
    except UnicodeError as error:
        raise ValueError(f"{source}: is no UTF-8 text ({error.reason})") from None
    if not text:
        raise ValueError("the prompt is empty; pass --prompt TEXT, --file PATH, or text on standard input")
    return [text]


def _stream(model, tokenizer, prompts, options):
    from fastlm.generation.generate import stream_tokens, text_options

    options = {**text_options(model, tokenizer), **options}
    started, tokens, complete = time.perf_counter(), 0, tokenizer.stream()
    steps = stream_tokens(model, [tokenizer.encode(prompts[0])], **options)
    print(prompts[0], end="", flush=True)
    for (token,) in steps:
        tokens += 1
        if token not in (options["stop_at"], tokenizer.end_of_text):
            print(complete(token), end="", flush=True)
    print(complete(None), flush=True)
    _tell_speed(tokens, started)


def _print(model, tokenizer, prompts, options):
    from fastlm.generation.generate import generate_batches, text_of, text_options

    started = time.perf_counter()
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    tokens = -sum(map(len, encoded)) * options["num_return_sequences"]
    between = ""
    for rows in generate_batches(model, encoded, **text_options(model, tokenizer), **options):
        print(between + "\n\n".join(text_of(model, tokenizer, row) for row in rows), end="", flush=True)
        tokens, between = tokens + sum(map(len, rows)), "\n\n"
    print()
    _tell_speed(tokens, started)


def _tell_speed(tokens, started):
    seconds = time.perf_counter() - started
    print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s", file=sys.stderr)
