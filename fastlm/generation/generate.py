"""The loop that continues prompts: one prefill of all of them, then a token a step for every row."""

import torch

from fastlm import dispatch
from fastlm.generation.cache import KVCache
from fastlm.generation.sampling import check_sampling, choose, uniforms

END = "end of text"


def generate_tokens(model, tokens, **options):
    """A list of 1-D int64 tensors, each prompt followed by what the model writes after it.

    tokens: (B, T) int64, or a list of 1-D prompts of any lengths; options as for `stream_tokens`. With
    num_return_sequences = n every prompt gives n neighbouring results. There are no pads in them.
    """
    prompts = _prompts(model, tokens)
    rows = [prompt for prompt in prompts for _ in range(options.get("num_return_sequences", 1))]
    written = [[] for _ in rows]
    for new in stream_tokens(model, prompts, **options):
        for row, token in enumerate(new):
            if token >= 0:
                written[row].append(token)
    return [torch.cat([prompt, prompt.new_tensor(new)]) for prompt, new in zip(rows, written)]


def stream_tokens(
    model, tokens, *, max_new_tokens=None, max_length=None, temperature=1.0, top_k=None, top_p=None,
    num_return_sequences=1, seed=None, stop_at=END,
):
    """Yields a step's new tokens, a list with an id for every row, -1 where the row has ended.

    A row ends after max_new_tokens, or when prompt and new tokens together are max_length long (one of the two; 20
    new tokens unless given), or with the token stop_at: the model's end of text unless given, None never.
    temperature 0 is greedy; top_k and top_p narrow the draw, in this order. seed makes draws repeatable (torch's
    generator gives one otherwise); a row's draws do not depend on the other rows. Raises ValueError, before anything
    is computed, for settings or prompts that do not fit.
    """
    prompts = _prompts(model, tokens)
    check_sampling(temperature, top_k, top_p)
    n = num_return_sequences
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"num_return_sequences is {n!r}, wanted a whole number ≥ 1")
    room = _room(model, prompts, max_new_tokens, max_length)
    stop = model.config.eos_token_id if stop_at is END else stop_at
    seed = int(torch.randint(2**62, ())) if seed is None else int(seed)
    if seed < 0:
        raise ValueError(f"seed is {seed}, wanted ≥ 0")
    dispatch.use()  # a forced backend that this machine lacks says so now
    return _run(model, prompts, room, n, (temperature, top_k, top_p), seed, stop)


def _run(model, prompts, room, n, sampling, seed, stop):
    device, was_training = model.device, model.training
    lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device=device)
    T = int(lengths.max())
    padded = torch.stack([torch.nn.functional.pad(prompt, (0, T - len(prompt))) for prompt in prompts])
    left = [count for count in room for _ in range(n)]  # tokens each row may still write
    model.eval()
    try:
        with torch.inference_mode():
            capacity = max(len(prompt) + count for prompt, count in zip(prompts, room))
            cache = KVCache(model.config, len(prompts), capacity, device=device, dtype=model.dtype)
            positions = cache.begin(lengths, T)
            hidden = model.hidden(padded.to(device), positions=positions, cache=cache)  # (P, T, C)
            cache.end()
            hidden = hidden[torch.arange(len(prompts), device=device), lengths.long() - 1]
            logits = model.lm_head(hidden).repeat_interleave(n, 0)
            if n > 1:
                cache.repeat(n)
            uniform = uniforms(seed, len(left), max(left), device) if sampling[0] else None
        for step in range(max(left)):
            with torch.inference_mode():
                if step:
                    # A row that has ended is computed along, but appends nothing and grows no further.
                    positions = cache.begin(torch.tensor(left, dtype=torch.int32, device=device).clamp(max=1), 1)
                    positions = positions.clamp(max=model.config.n_positions - 1)
                    hidden = model.hidden(new[:, None], positions=positions, cache=cache)
                    cache.end()
                    logits = model.lm_head(hidden[:, 0])
                new = choose(logits, *sampling, None if uniform is None else uniform[:, step])
            ids = [token if count > 0 else -1 for token, count in zip(new.tolist(), left)]
            left = [0 if token in (stop, -1) else count - 1 for token, count in zip(ids, left)]
            yield ids
            if max(left) <= 0:
                return
    finally:
        model.train(was_training)


def _prompts(model, tokens):
    """The prompts as a list of 1-D int64 CPU tensors, checked."""
    rows = list(tokens) if not isinstance(tokens, torch.Tensor) or tokens.dim() == 2 else None
    if rows is None:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}, wanted (B, T) or a list of 1-D prompts")
    if not rows:
        raise ValueError("tokens hold no prompt, wanted at least one")
    prompts = []
    for index, row in enumerate(rows):
        row = row.detach().cpu() if isinstance(row, torch.Tensor) else torch.tensor(list(row), dtype=torch.int64)
        if row.dim() != 1 or row.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"prompt {index} is {row.dtype} {tuple(row.shape)}, wanted int64 (T,)")
        if not len(row):
            raise ValueError(f"prompt {index} is empty, wanted at least one token")
        prompts.append(row.long())
        V = model.config.vocab_size
        if int(row.min()) < 0 or int(row.max()) >= V:
            wrong = int(row[(row < 0) | (row >= V)][0])
            raise ValueError(
                f"prompt {index} has token id {wrong}, wanted 0 ≤ id < vocab_size {V}; "
                "was it tokenised with another vocabulary?"
            )
    return prompts


def _room(model, prompts, max_new_tokens, max_length):
    """How many tokens may follow each prompt."""
    if max_new_tokens is not None and max_length is not None:
        raise ValueError("got both max_new_tokens and max_length, wanted one of them")
    name, value = ("max_length", max_length) if max_length is not None else ("max_new_tokens", max_new_tokens)
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} is {value!r}, wanted a whole number ≥ 1")
    limit, room = model.config.n_positions, []
    for index, prompt in enumerate(prompts):
        count = max_length - len(prompt) if max_length is not None else max_new_tokens or 20
        if count < 1:
            raise ValueError(f"prompt {index} has {len(prompt)} tokens, none left to write within max_length={max_length}")
        if len(prompt) + count > limit:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, with {count} new ones {len(prompt) + count}, but the model "
                f"has n_positions={limit}; shorten the prompt or write fewer"
            )
        room.append(count)
    return room


def generate(model, tokenizer, texts, **options):
    """What the model writes after each text, the text included; options as for `stream_tokens`.

    texts: a string, or a list of them. Returns a string for a string and a list for a list; with
    num_return_sequences > 1 a list of strings in each place. The end-of-text token is left out.
    """
    prompts = [tokenizer.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty, wanted at least one character")
    written = [text_of(tokenizer, row) for row in generate_tokens(model, prompts, **options)]
    n = options.get("num_return_sequences", 1)
    results = written if n == 1 else [written[i : i + n] for i in range(0, len(written), n)]
    return results[0] if isinstance(texts, str) else results


def text_of(tokenizer, row):
    """The text of one result, without an end-of-text token at its end."""
    return tokenizer.decode(row[:-1] if int(row[-1]) == tokenizer.end_of_text else row)
