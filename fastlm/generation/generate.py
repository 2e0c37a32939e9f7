"""The loop that continues prompts: one prefill of all of them, then a token a step for every row."""

from collections.abc import Iterable
from numbers import Integral

import torch
import torch.nn.functional as F

from fastlm import fast_path, masks
from fastlm.dispatch.forcing import forced
from fastlm.generation.engine import Engine, fitting, make_cache, packed, serving
from fastlm.generation.inference import inference
from fastlm.generation.sampling import Sampler, check_sampling, uniforms
from fastlm.generation.step import ENDED, EngineStep, Step, reread

END = "end of text"
USUAL = 50  # new tokens, where nothing is asked for
SAMPLING = {"temperature": 1.0, "top_k": None, "top_p": None, "seed": None}
WORTH_CAPTURING = 8  # tokens to write: a capture costs about as much as three of them


def generate_tokens(model, tokens, **options):
    """A list of 1-D int64 tensors, each prompt and what the model writes after it, on the prompt's device.

    tokens: (B, T) int64, or a list of 1-D prompts of any lengths (tensors, or lists of ids); options as for
    `stream_tokens`, and batch_size, the most rows that are computed at once, all unless given: results and
    draws are the same; and attention_mask (B, T), where tokens have that shape and pads, wherever they stand: 1 where
    a token is real. With num_return_sequences = n every prompt gives n neighbouring results. There are no pads in
    results; one that met its end of text ends with that token.
    """
    return [row for rows in generate_batches(model, tokens, **options) for row in rows]


def generate_batches(model, tokens, *, batch_size=None, attention_mask=None, **options):
    """Yields the results of `generate_tokens` as they come, a list for every batch of at most batch_size rows."""
    if attention_mask is not None:
        tokens = _real(tokens, attention_mask)
    prompts, n = _prompts(model, tokens), _whole("num_return_sequences", options.get("num_return_sequences", 1))
    size = len(prompts) if batch_size is None else max(1, _whole("batch_size", batch_size) // n)
    if size < len(prompts):
        check_sampling(*(options.get(name, usual) for name, usual in SAMPLING.items()))
        _room(model, prompts, options.get("max_new_tokens"), options.get("max_length"))  # of all, before the first
        options["seed"] = _seed(options.get("seed"))
    for first in range(0, len(prompts), size):
        yield _batch(model, prompts[first : first + size], n, {**options, "first_prompt": first})


def _batch(model, prompts, n, options):
    steps = stream_tokens(model, prompts, **options)
    rows = [prompt for prompt in prompts for _ in range(n)]
    written = [[] for _ in rows]
    for new in steps:
        for row, token in enumerate(new):
            if token >= 0:
                written[row].append(token)
    return [torch.cat([prompt, prompt.new_tensor(new)]) for prompt, new in zip(rows, written)]


def stream_tokens(
    model, tokens, *, max_new_tokens=None, max_length=None, temperature=1.0, top_k=None, top_p=None,
    num_return_sequences=1, seed=None, stop_at=END, vocab_size=None, first_prompt=0,
):
    """Yields a step's new tokens, a list with an id for every row, -1 where the row has ended.

    A row ends after max_new_tokens, or when prompt and new tokens together are max_length long (one of the
    two; 50 new tokens, or as many as fit, unless given), or with the token stop_at: the model's end of text
    unless given, None never. temperature 0 is greedy; top_k and top_p narrow the draw, in this order; ids are
    below vocab_size, the model's without its padding unless given. seed makes draws repeatable (torch's
    generator gives one otherwise): a token depends on it, on the numbers of its prompt and sequence and on what
    stands before it, not on the other rows; first_prompt is the first one's number, where others went before.
    Raises ValueError, before anything is computed, for what does not fit.
    """
    prompts = _prompts(model, tokens)
    check_sampling(temperature, top_k, top_p, seed)
    n = _whole("num_return_sequences", num_return_sequences)
    room = _room(model, prompts, max_new_tokens, max_length)
    V = model.config.vocab_size
    drawn = model.config.unpadded_vocab_size or V
    vocab_size = drawn if vocab_size is None else min(drawn, _whole("vocab_size", vocab_size))
    stop = model.config.eos_token_id if stop_at is END else stop_at
    if stop is not None and not (isinstance(stop, Integral) and 0 <= stop < V):
        raise ValueError(f"stop_at is {stop!r}, wanted a token id below vocab_size {V}, or None to go on")
    forced("decode_attention")  # a backend of FASTLM_BACKEND that this machine lacks says so now
    sampler = Sampler(vocab_size, temperature, top_k, top_p)
    return _run(model, prompts, room, n, sampler, _seed(seed), stop, first_prompt)


def _run(model, prompts, room, n, sampler, seed, stop, first):
    left = [count for count in room for _ in range(n)]  # tokens each row may still write
    capacity = max(len(prompt) + count for prompt, count in zip(prompts, room))
    fit, reason = serving(model)
    fast = reason is None
    if not fast:
        fast_path.tell(model, unfit=lambda model: fitting(model)[1])
    if fast_path.own_call(model):
        rows = [prompt.to(model.device) for prompt in prompts for _ in range(n)]
        uniform = uniforms(seed, len(prompts), n, max(left), model.device, first)
        yield from reread(model, rows, left, sampler, uniform, stop)
        return
    with torch.inference_mode() if fast else inference(model):  # the engine calls no module
        weights = packed(model, max(left), fit) if fast else None
        cache = make_cache(model, weights, len(prompts), capacity)
        engine = Engine(model, cache, weights) if fast else None
        logits = _prefill(model, prompts, cache, engine).repeat_interleave(n, 0)  # (P · n, V)
        if n > 1:
            cache.repeat(n)
            engine = Engine(model, cache, weights) if fast else None
        uniform = uniforms(seed, len(prompts), n, max(left), model.device, first)
        if fast:
            step = EngineStep(engine, sampler, uniform, stop)
        else:
            captured = model.device.type == "cuda" and max(left) >= WORTH_CAPTURING
            step = Step(model, cache, sampler, uniform, stop, captured=captured)
        ids = step.first(logits, left)
    while True:
        left = [0 if token in (stop, ENDED) else count - 1 for token, count in zip(ids, left)]
        yield ids
        if not any(left):
            if fast:
                weights.done(cache)
            return
        with torch.inference_mode() if fast else inference(model):
            ids = step()


def _prefill(model, prompts, cache, engine):
    """The logits (P, V) behind each prompt, all computed in one batch, right-padded; fills the cache."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device=model.device)
    T = max(len(prompt) for prompt in prompts)
    padded = torch.stack([F.pad(prompt.to(model.device), (0, T - len(prompt))) for prompt in prompts])
    if engine is not None:
        return engine(padded, lengths)
    positions = cache.begin(lengths, T)
    hidden = model.hidden(padded, positions=positions, cache=cache)  # (P, T, C)
    cache.end()
    return model.lm_head(hidden[torch.arange(len(prompts), device=model.device), lengths.long() - 1])


def _seed(seed):
    return int(torch.randint(2**62, (), device="cpu")) if seed is None else int(seed)


def _whole(name, value):
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}, wanted a whole number ≥ 1")
    return int(value)


def _real(tokens, mask):
    """The prompts without the pads that a mask, 1 where a token is real, tells of."""
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2:
        raise ValueError(f"attention_mask goes with tokens (B, T), got {type(tokens).__name__}; prompts of a list have "
                         "no pads")
    return [row[real] for row, real in zip(tokens, masks.check("generate", mask, tokens))]


def _prompts(model, tokens):
    """The prompts as a list of 1-D int64 tensors, checked."""
    shape = tuple(tokens.shape) if isinstance(tokens, torch.Tensor) else None
    if not isinstance(tokens, Iterable) or isinstance(tokens, str) or (shape is not None and len(shape) != 2):
        got = type(tokens).__name__ if shape is None else f"a tensor {shape}"
        raise ValueError(f"tokens are {got}, wanted (B, T) or a list of 1-D prompts; one prompt is [prompt]")
    prompts = [_prompt(index, row, model.config.vocab_size) for index, row in enumerate(tokens)]
    if not prompts:
        raise ValueError("tokens hold no prompt, wanted at least one")
    return prompts


def _prompt(index, row, V):
    if isinstance(row, torch.Tensor):
        if row.dim() != 1 or row.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"prompt {index} is {row.dtype} {tuple(row.shape)}, wanted int64 (T,)")
        ids, device = row.tolist(), row.device
    elif isinstance(row, Iterable) and not isinstance(row, str):
        ids, device = list(row), "cpu"
    else:
        raise ValueError(
            f"prompt {index} is {row!r}, wanted token ids, 1-D; "
            "for text there is fastlm.generate(model, tokenizer, text)"
        )
    if not ids:
        raise ValueError(f"prompt {index} is empty, wanted at least one token")
    wrong = [token for token in ids if not isinstance(token, Integral) or not 0 <= token < V]
    if wrong:
        raise ValueError(
            f"prompt {index} has token id {wrong[0]!r}, wanted whole numbers 0 ≤ id < vocab_size {V}; "
            "was it tokenised with another vocabulary?"
        )
    return torch.tensor(ids, dtype=torch.int64, device=device)


def _room(model, prompts, max_new_tokens, max_length):
    """How many tokens may follow each prompt."""
    if max_new_tokens is not None and max_length is not None:
        raise ValueError("got both max_new_tokens and max_length, wanted one of them")
    new = None if max_new_tokens is None else _whole("max_new_tokens", max_new_tokens)
    whole = None if max_length is None else _whole("max_length", max_length)
    limit, room = model.config.n_positions, []
    for index, length in enumerate(map(len, prompts)):
        count = new or (whole - length if whole else max(1, min(USUAL, limit - length)))
        if count < 1:
            raise ValueError(
                f"prompt {index} has {length} tokens, wanted fewer than max_length={whole}; "
                "raise it, or set max_new_tokens"
            )
        if length + count > limit:
            raise ValueError(
                f"prompt {index} has {length} tokens, with {count} new ones {length + count}, but the model "
                f"has n_positions={limit}; shorten the prompt or write fewer"
            )
        room.append(count)
    return room


def generate(model, tokenizer, texts, **options):
    """What the model writes after each text, the text included; options as for `generate_tokens`.

    texts: a string, or a list of them. Returns a string for a string and a list for a list; with
    num_return_sequences > 1 a list of strings in each place. The end-of-text token is left out.
    """
    if not isinstance(texts, (str, list, tuple)):
        raise TypeError(f"texts are {type(texts).__name__}, wanted a string or a list of strings")
    prompts = [tokenizer.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty, wanted at least one character")
    rows = generate_tokens(model, prompts, **{**text_options(model, tokenizer), **options})
    written = [text_of(model, tokenizer, row) for row in rows]
    n = options.get("num_return_sequences", 1)
    results = written if n == 1 else [written[i : i + n] for i in range(0, len(written), n)]
    return results[0] if isinstance(texts, str) else results


def text_options(model, tokenizer):
    """What `stream_tokens` must know to write text: which ids have one (a model may have more), the end."""
    end = tokenizer.end_of_text if model.config.eos_token_id is None else model.config.eos_token_id
    stop_at = None if end is None or end >= model.config.vocab_size else end
    return {"vocab_size": tokenizer.vocab_size, "stop_at": stop_at}


def text_of(model, tokenizer, row):
    """The text of one result, without an end of text as its last token."""
    ended = int(row[-1]) in (model.config.eos_token_id, tokenizer.end_of_text)
    return tokenizer.decode(row[:-1] if ended else row)
