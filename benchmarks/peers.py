"""Programs that generate from weight files of their own: the same GPT-2, converted on the fly, on the CPU.

    CTranslate2   float32, int8            llama.cpp   f32, f16, bf16, q8_0, q4_0

A peer is a function (transformers' model, prompts (B, T), most new tokens, folder) → write; write(n) generates n
tokens greedily after every prompt and returns each prompt with them, B lists of ids.
"""

import copy
import ctypes
import importlib.util

import numpy as np
import torch

INSTALL = "not installed: pip install 'fastlm[peers]'"


def peers(dtype, device):
    """({name: peer}, {name: why it does not take part}) for weights of a width, as `dtype` names it."""
    if torch.device(device).type != "cpu":
        return {}, {}
    known = {
        "fp32": {"CTranslate2": _ctranslate2("float32"), "llama.cpp": _llama("f32")},
        "bf16": {"llama.cpp": _llama("bf16")},
        "int8": {"CTranslate2": _ctranslate2("int8"), "llama.cpp, q8_0": _llama("q8_0")},
        "int4": {"llama.cpp, q4_0": _llama("q4_0")},
        "fp16": {"llama.cpp": _llama("f16")},
    }[dtype]
    needs = {"CTranslate2": ("ctranslate2",), "llama.cpp": ("llama_cpp", "gguf")}
    here = {name: all(importlib.util.find_spec(package) for package in needs[name.split(",")[0]]) for name in known}
    return {name: known[name] for name in known if here[name]}, {name: INSTALL for name in known if not here[name]}


def _ctranslate2(kind):
    def make(model, prompts, new, folder):
        import ctranslate2
        from ctranslate2.converters.transformers import GPT2Loader

        spec = GPT2Loader().get_model_spec(copy.deepcopy(model).float())  # quantising writes into the weights
        spec.register_vocabulary([str(token) for token in range(model.config.vocab_size)])
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
        spec.validate()
        spec.optimize(quantization=kind)
        path = folder / f"ctranslate2-{kind}"
        path.mkdir()
        spec.save(str(path))
        generator = ctranslate2.Generator(
            str(path), device="cpu", compute_type=kind, inter_threads=1, intra_threads=torch.get_num_threads()
        )
        texts = [[str(token) for token in row] for row in prompts.tolist()]

        def write(n):
            found = generator.generate_batch(texts, max_length=n, min_length=n, beam_size=1, sampling_topk=1,
                                             end_token=[], include_prompt_in_result=False)
            return [row + one.sequences_ids[0] for row, one in zip(prompts.tolist(), found)]

        return write

    return make


def _llama(kind):
    def make(model, prompts, new, folder):
        import llama_cpp as llama

        llama.llama_log_set(_silent(), ctypes.c_void_p())
        path = folder / f"llama-{kind}.gguf"
        _write_gguf(path, model, kind)
        loading = llama.llama_model_default_params()
        loading.n_gpu_layers = 0
        weights = llama.llama_model_load_from_file(str(path).encode(), loading)
        if not weights:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        B, T = prompts.shape
        sizes = llama.llama_context_default_params()
        sizes.n_ctx, sizes.n_seq_max, sizes.n_batch = B * (-(-(T + new) // 256) * 256), B, max(B * T, 32)
        sizes.n_threads = sizes.n_threads_batch = torch.get_num_threads()
        context = llama.llama_init_from_model(weights, sizes)
        if not context:
            raise RuntimeError(f"llama.cpp has no room for {B} sequences of {T + new} tokens")
        batch = llama.llama_batch_init(B * T, 0, 1)

        def decode(rows, first):
            """Runs the columns rows (B lists) from position `first` on; the largest logit's id of every row."""
            batch.n_tokens, at, last = sum(map(len, rows)), 0, []
            for b, row in enumerate(rows):
                for t, token in enumerate(row):
                    batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = token, first + t, 1, b
                    batch.logits[at] = t + 1 == len(row)
                    at += 1
                last.append(at - 1)
            if code := llama.llama_decode(context, batch):
                raise RuntimeError(f"llama.cpp: llama_decode returned {code}")
            V = (model.config.vocab_size,)
            return [int(np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), V).argmax()) for i in last]

        def write(n):
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
            rows = prompts.tolist()
            ids = decode(rows, 0)
            for step in range(n):
                for row, token in zip(rows, ids):
                    row.append(token)
                if step + 1 < n:
                    ids = decode([[token] for token in ids], T + step)
            return rows

        return write

    return make


_kept = []


def _silent():
    """A log callback that says nothing, alive as long as the process."""
    if not _kept:
        import llama_cpp

        _kept.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
    return _kept[0]


def _write_gguf(path, model, kind):
    """A GPT-2 as a GGUF file without a tokenizer; matrices in `kind`, the rest in fp32."""
    import gguf

    config, quantized = model.config, gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    names = {"wte.weight": "token_embd.weight", "wpe.weight": "position_embd.weight", "ln_f.weight":
             "output_norm.weight", "ln_f.bias": "output_norm.bias"}
    parts = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
             "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    for layer in range(config.n_layer):
        names |= {f"h.{layer}.{ours}.{what}": f"blk.{layer}.{theirs}.{what}" for ours, theirs in parts.items()
                  for what in ("weight", "bias")}
    state = model.transformer.state_dict()
    for ours, theirs in names.items():
        value = state[ours].float()
        value = (value.T if ".c_" in ours and value.dim() == 2 else value).contiguous().numpy()
        plain = value.ndim == 1 or ours == "wpe.weight" or kind == "f32"
        raw = gguf.GGMLQuantizationType.F32 if plain else quantized
        writer.add_tensor(theirs, value if plain else gguf.quants.quantize(value, quantized), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
