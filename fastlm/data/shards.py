"""Token shards in llm.c's `.bin` format: a header of 256 int32, then the tokens, little-endian.

    header[0] magic, [1] version, [2] token count (unsigned), the others 0 20240520, version 1: uint16
    tokens        20240801, version 7: uint32 tokens, for vocabularies beyond 65536

Every file is written beside its place and renamed when it is whole, so a shard is complete or absent. A
file that is mapped must not be cut short: the system ends a process that reads beyond the end of a mapped
file.
"""

import contextlib
import os
import re
from pathlib import Path

import numpy as np

from fastlm.data.disk import naming

HEADER = 256  # int32 words
KINDS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
SHARD_TOKENS = 100_000_000  # tokens a shard, as llm.c writes them
LARGEST = 2**32 - 1  # what the header can count


def token_dtype(vocab_size):
    """The dtype that holds every id of a vocabulary: uint16 or uint32."""
    return KINDS[20240520 if vocab_size <= 2**16 else 20240801][1]


class ShardWriter:
    """Writes a stream of tokens to DIRECTORY/NAME_000000.bin, NAME_000001.bin, ...; a context manager.

    A shard appears when it is full or the `with` block ends; one that an exception interrupts never does.
    `tokens` and `paths` say what was written. Raises ValueError for ids outside the vocabulary.
    """

    def __init__(self, directory, name, vocab_size, *, shard_tokens=SHARD_TOKENS):
        if not 0 < shard_tokens <= LARGEST:
            raise ValueError(f"shard_tokens is {shard_tokens}, wanted 1 to {LARGEST}, the most of a header")
        self._directory, self._name, self._vocab_size = Path(directory), name, vocab_size
        self._shard_tokens, self._shard = shard_tokens, None
        self.tokens, self.paths = 0, []

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self._shard is not None:
            self._shard.abandon() if kind else self._finish()

    def write(self, ids):
        """Appends 1-D integer token ids."""
        path = self._directory / f"{self._name}_{len(self.paths):06d}.bin"
        ids = _checked(path, ids, self._vocab_size)
        while len(ids):
            if self._shard is None:
                path = self._directory / f"{self._name}_{len(self.paths):06d}.bin"
                self._shard = _Shard(path, token_dtype(self._vocab_size))
            room = self._shard_tokens - self._shard.count
            self._shard.write(ids[:room])
            ids = ids[room:]
            if self._shard.count == self._shard_tokens:
                self._finish()

    def _finish(self):
        shard, self._shard = self._shard, None
        shard.finish()
        self.paths.append(shard.path)
        self.tokens += shard.count


class _Shard:
    """A shard being written beside its place."""

    def __init__(self, path, dtype):
        self.path, self.count, self._dtype = path, 0, dtype
        self._partial = path.with_name(f".{path.name}.partial")
        with naming(path):
            self._file = open(self._partial, "wb")
            self._file.write(bytes(4 * HEADER))  # filled in when the count is known

    def write(self, ids):
        try:
            with naming(self.path):
                self._file.write(ids.astype(self._dtype).data)
        except BaseException:
            self.abandon()
            raise
        self.count += len(ids)

    def finish(self):
        header = np.zeros(HEADER, dtype="<u4")
        magic = next(magic for magic, (_, dtype) in KINDS.items() if dtype == self._dtype)
        header[:3] = magic, KINDS[magic][0], self.count
        try:
            with naming(self.path):
                self._file.seek(0)
                self._file.write(header.data)
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._partial, self.path)
        except BaseException:
            self.abandon()
            raise

    def abandon(self):
        with contextlib.suppress(OSError):  # a full disk fails again in close
            self._file.close()
        self._partial.unlink(missing_ok=True)


def _checked(path, ids, vocab_size):
    """The ids as an array, all integers of the vocabulary."""
    ids = np.asarray(ids)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise ValueError(f"{path}: tokens are {ids.dtype} of shape {ids.shape}, wanted integers (n,)")
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise ValueError(f"{path}: token id {wrong} lies outside the vocabulary of {vocab_size}")
    return ids


def write_shard(path, tokens, vocab_size=None):
    """Writes one shard of 1-D integer tokens: uint16, or uint32 where `vocab_size` or dtype asks for it."""
    path, tokens = Path(path), np.asarray(tokens)
    if vocab_size is None:
        vocab_size = 2**32 if tokens.dtype == np.uint32 else 2**16
    tokens = _checked(path, tokens, vocab_size)
    if not 0 < len(tokens) <= LARGEST:
        raise ValueError(f"{path}: {len(tokens)} tokens, wanted 1 to {LARGEST} in a shard")
    shard = _Shard(path, token_dtype(vocab_size))
    shard.write(tokens)
    shard.finish()


def read_shard(path):
    """The tokens of a shard, a read-only memory map (n,) of uint16 or uint32.

    Raises ValueError naming the file, what it holds and what was wanted, for anything that is no whole shard.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: is no file, wanted a shard (.bin)")
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<u4", count=HEADER)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if len(header) < HEADER:
        raise ValueError(f"{path}: {size} bytes, a shard's header alone has {4 * HEADER}; prepare it again")
    magic, version, count = (int(word) for word in header[:3])
    if magic not in KINDS:
        wanted = " or ".join(map(str, KINDS))
        raise ValueError(f"{path}: magic number {magic}, wanted {wanted}; is it a shard of llm.c's format?")
    known, dtype = KINDS[magic]
    if version != known:
        raise ValueError(f"{path}: version {version}, wanted {known}; prepare it again")
    wanted = 4 * HEADER + count * dtype.itemsize
    if count == 0:
        raise ValueError(f"{path}: its header counts 0 tokens, wanted at least 1; prepare it again")
    if size != wanted:
        raise ValueError(
            f"{path}: {size} bytes, but its header counts {count} tokens ({wanted} bytes); "
            f"the file was {'cut short' if size < wanted else 'damaged'}; prepare it again"
        )
    return np.memmap(path, dtype=dtype, mode="r", offset=4 * HEADER, shape=(count,))


def read_split(directory, split):
    """{path: tokens} of every shard of a split ("train" or "val") in a directory, in order of name.

    A split's shards are called SPLIT.bin, SPLIT_000000.bin, or the same behind a prefix and an underscore, as
    llm.c's tiny_shakespeare_train.bin and fineweb_val_000000.bin.
    """
    directory = Path(directory)
    pattern = re.compile(rf"(.*_)?{split}(_\d+)?\.bin")
    paths = sorted(path for path in directory.glob("*.bin") if pattern.fullmatch(path.name))
    if not paths:
        raise ValueError(f"{directory}: has no {split}_*.bin; `fastlm data prepare` makes them")
    return {str(path): read_shard(path) for path in paths}
