"""What prepared data was made of: the text, and the settings that decide its tokens.

    {"version": 1, "text": sha256, "tokenizer": "bpe" | "bytes" | "chars" | sha256, "vocab_size": …, "val_fraction": …}

A manifest carries it, so that data can be told from data of another text or other settings. The text is what its files
say, in their order, whatever they are called and wherever they lie.
"""

import hashlib

from fastlm.data.tokenizer import Tokenizer

KINDS = ("chars", "bytes", "bpe")
VOCAB_SIZE = 8192  # of a trained BPE
VERSION = 1  # another where the same text and settings would give other tokens


def fingerprint(corpus, tokenizer, vocab_size, val_fraction):
    """The fingerprint, a dict, of data that `prepare` makes of a Corpus; tokenizer: one of KINDS, or a Tokenizer."""
    own = tokenizer if isinstance(tokenizer, str) else hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()
    size = (VOCAB_SIZE if vocab_size is None else vocab_size) if tokenizer == "bpe" else None
    return {"version": VERSION, "text": corpus.sha256, "tokenizer": own, "vocab_size": size,
            "val_fraction": float(val_fraction)}


def differences(manifest, corpus, tokenizer, vocab_size, val_fraction):
    """(what differs from the data of a manifest, a list of phrases; whether all of it could be compared).

    tokenizer: one of KINDS, a path or hub id, or a Tokenizer. Without a fingerprint, which data made by earlier
    versions lacks, only counts and names are compared.
    """
    vocabulary = tokenizer if isinstance(tokenizer, Tokenizer) or tokenizer in KINDS else Tokenizer.load(tokenizer)
    wanted, found = fingerprint(corpus, vocabulary, vocab_size, val_fraction), manifest.get("fingerprint")
    if isinstance(found, dict):
        names = {"version": "another version of fastlm", "text": "other text", "tokenizer": "another tokenizer"}
        return [names.get(key, f"{key} {found.get(key)}") for key in wanted if found.get(key) != wanted[key]], True
    found = []
    if manifest.get("characters") != corpus.characters:
        found.append("other text")
    own = vocabulary.kind if isinstance(tokenizer, Tokenizer) else str(tokenizer)
    if manifest.get("tokenizer") != own:
        found.append("another tokenizer")
    elif wanted["vocab_size"] is not None and wanted["vocab_size"] < (size := _whole(manifest.get("vocab_size"))):
        found.append(f"vocab_size {size}")  # fewer is what a short text gives
    if manifest.get("val_fraction") != val_fraction:
        found.append(f"val_fraction {manifest.get('val_fraction')}")
    return found, False


def _whole(value):
    return value if isinstance(value, int) else 0
