"""Text files and folders to a directory of token shards with their tokenizer and a manifest."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from fastlm.data.shards import SHARD_TOKENS, token_dtype, write_shard
from fastlm.data.tokenizer import Tokenizer

MANIFEST = "manifest.json"
KINDS = ("chars", "bytes", "bpe")


def read_texts(paths):
    """(documents, skipped): the UTF-8 texts of files and of all files in folders, in order of path.

    Files that are no UTF-8 text are skipped and counted. Raises ValueError where nothing is left. The whole text is
    held in memory.
    """
    texts, skipped = [], 0
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder; pass text files or folders of them")
        for file in _files(path):
            try:
                text = file.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                text = "\0"
            except OSError as error:
                raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
            if "\0" in text:
                skipped += 1
            elif text:
                texts.append(text)
    if not texts:
        named = ", ".join(map(str, paths))
        raise ValueError(f"{named}: no text found ({skipped} files are empty or no UTF-8 text); pass UTF-8 text files")
    return texts, skipped


def _files(path):
    """The file itself, or all files of a folder but the hidden ones."""
    if path.is_file():
        return [path]
    below = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in below if not any(part[0] == "." for part in file.relative_to(path).parts))


def split_texts(texts, val_fraction):
    """(train, val) documents: the last `val_fraction` of all characters is val; a document on the border is cut."""
    cut = int(sum(map(len, texts)) * (1 - val_fraction))
    train, val = [], []
    for text in texts:
        head = max(min(cut, len(text)), 0)
        train += [text[:head]] if head else []
        val += [text[head:]] if head < len(text) else []
        cut -= len(text)
    return train, val


def make_tokenizer(kind, texts, train, vocab_size=None):
    """The tokenizer `kind`: "chars" (of all texts), "bytes", "bpe" (trained on train), or a path to load."""
    if kind == "chars":
        return Tokenizer.chars("".join(sorted(set().union(*texts))))
    if kind == "bytes":
        return Tokenizer.bytes()
    if kind == "bpe":
        return Tokenizer.train_bpe(train, vocab_size or 8192)
    return Tokenizer.load(kind)


def prepare(paths, out, *, tokenizer="bpe", vocab_size=None, val_fraction=0.1, overwrite=False, progress=None):
    """Writes OUT/train_*.bin, val_*.bin, the tokenizer's files and manifest.json; returns the manifest.

    tokenizer: "bpe" (byte-level, trained on the text, `vocab_size` tokens, 8192 unless given), "bytes", "chars", or a
    directory or tokenizer.json. Documents end with the end-of-text token where the vocabulary has one. OUT appears
    complete or not at all; one that exists is replaced only with `overwrite`, and only if it was made here.
    progress(done, total) is called with characters. Raises ValueError.
    """
    out = Path(out)
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, wanted between 0 and 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / MANIFEST).is_file():
            raise ValueError(f"{out}: exists and was not made by `fastlm data prepare`; pass another --out")
        if not overwrite:
            raise ValueError(f"{out}: exists; pass --overwrite to replace it, or another --out")
    texts, skipped = read_texts(paths)
    train, val = split_texts(texts, val_fraction)
    if not train or not val:
        raise ValueError(f"{', '.join(map(str, paths))}: too little text to split by val_fraction={val_fraction}")
    vocabulary = make_tokenizer(tokenizer, texts, train, vocab_size)
    characters = sum(map(len, texts))

    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        done = 0
        manifest = {
            "format": "fastlm data", "tokenizer": str(tokenizer), "vocab_size": vocabulary.vocab_size,
            "files": len(texts), "skipped_files": skipped, "characters": characters,
        }
        for split, documents in (("train", train), ("val", val)):
            writer = _ShardWriter(staging, split, vocabulary)
            for text in documents:
                writer.add(text)
                done += len(text)
                if progress:
                    progress(done, characters)
            manifest |= {f"{split}_tokens": writer.close(), f"{split}_shards": writer.shards}
        vocabulary.save(staging)
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        os.chmod(staging, 0o755)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
            os.replace(out, old)
            os.replace(staging, out)
            shutil.rmtree(old)
        else:
            os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


class _ShardWriter:
    """Collects a split's tokens and writes a shard whenever one is full."""

    def __init__(self, directory, split, tokenizer):
        self._directory, self._split, self._tokenizer = directory, split, tokenizer
        self._pending, self._count = [], 0
        self.tokens, self.shards = 0, 0

    def add(self, text):
        ids = self._tokenizer.encode_array(text)
        if self._tokenizer.end_of_text is not None:
            ids = np.append(ids, self._tokenizer.end_of_text)
        self._pending.append(ids.astype(token_dtype(self._tokenizer.vocab_size)))
        self._count += len(ids)
        if self._count >= SHARD_TOKENS:
            self._write()

    def _write(self):
        write_shard(self._directory / f"{self._split}_{self.shards:06d}.bin", np.concatenate(self._pending))
        self.tokens, self.shards = self.tokens + self._count, self.shards + 1
        self._pending, self._count = [], 0

    def close(self):
        """Writes what is left; the split's number of tokens."""
        if self._count:
            self._write()
        return self.tokens
