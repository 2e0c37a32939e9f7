"""Token shards in llm.c's `.bin` format: a header of 256 int32, then the tokens, little-endian.

    header[0] magic, [1] version, [2] token count (unsigned), the others 0
    20240520, version 1: uint16 tokens          20240801, version 7: uint32 tokens, for vocabularies beyond 65536

Every file is written beside its place and renamed when it is whole, so a shard is complete or absent. A file that is
mapped must not be cut short: the operating system ends a process that reads beyond the end of a mapped file.
"""

import os
import re
from pathlib import Path

import numpy as np

HEADER = 256  # int32 words
KINDS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
SHARD_TOKENS = 100_000_000  # tokens a shard, as llm.c writes them
LARGEST = 2**32 - 1  # what the header can count


def token_dtype(vocab_size):
    """The dtype that holds every id of a vocabulary: uint16 or uint32."""
    return KINDS[20240520 if vocab_size <= 2**16 else 20240801][1]


class ShardWriter:
    """Writes a stream of tokens to DIRECTORY/NAME_000000.bin, NAME_000001.bin, ...; a context manager.

    A shard appears when it is full, or when the `with` block ends; one that an exception interrupts never does.
    `tokens` and `paths` say what was written. Raises ValueError for ids outside the vocabulary.
    """

    def __init__(self, directory, name, vocab_size, *, shard_tokens=SHARD_TOKENS):
        if not 0 < shard_tokens <= LARGEST:
            raise ValueError(f"shard_tokens is {shard_tokens}, wanted 1 to {LARGEST}: the header counts no further")
        self._directory, self._name, self._vocab_size = Path(directory), name, vocab_size
        self._shard_tokens, self._file, self._count = shard_tokens, None, 0
        self.tokens, self.paths = 0, []

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self._file is None:
            return
        if kind is None:
            self._finish()
        else:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def write(self, ids):
        """Appends 1-D integer token ids."""
        ids = np.asarray(ids)
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            raise ValueError(f"{self._next}: tokens are {ids.dtype} {ids.shape}, wanted integers (n,)")
        if len(ids) and not (ids.min() >= 0 and ids.max() < self._vocab_size):
            wrong = int(ids[(ids < 0) | (ids >= self._vocab_size)][0])
            raise ValueError(f"{self._next}: token id {wrong} lies outside the vocabulary of {self._vocab_size}")
        while len(ids):
            if self._file is None:
                self._partial = self._next.with_suffix(".partial")
                self._file = open(self._partial, "wb")
                self._file.write(bytes(4 * HEADER))  # filled in when the count is known
            head, ids = np.split(ids, [self._shard_tokens - self._count])
            self._file.write(head.astype(token_dtype(self._vocab_size)).tobytes())
            self._count += len(head)
            if self._count == self._shard_tokens:
                self._finish()

    @property
    def _next(self):
        return self._directory / f"{self._name}_{len(self.paths):06d}.bin"

    def _finish(self):
        dtype = token_dtype(self._vocab_size)
        header = np.zeros(HEADER, dtype="<u4")
        header[:3] = next((magic, version, self._count) for magic, (version, kind) in KINDS.items() if kind == dtype)
        with self._file as file:
            file.seek(0)
            file.write(header.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._partial, self._next)
        self.paths.append(self._next)
        self.tokens += self._count
        self._file, self._count = None, 0


def write_shard(path, tokens, vocab_size=None):
    """Writes one shard of 1-D integer tokens; uint16 unless `vocab_size` or the dtype uint32 asks for more."""
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or not 0 < len(tokens) <= LARGEST:
        raise ValueError(f"{path}: tokens have shape {tokens.shape}, wanted (n,) with 0 < n ≤ {LARGEST}")
    if vocab_size is None:
        vocab_size = 2**32 if tokens.dtype == np.uint32 else 2**16
    with ShardWriter(path.parent, path.stem, vocab_size, shard_tokens=len(tokens)) as writer:
        writer.write(tokens)
    os.replace(writer.paths[0], path)


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
        raise ValueError(f"{path}: {size} bytes, too short for a shard's header of {4 * HEADER}; prepare it again")
    magic, version, count = (int(word) for word in header[:3])
    if magic not in KINDS:
        wanted = " or ".join(map(str, KINDS))
        raise ValueError(f"{path}: magic number {magic}, wanted {wanted}; is it a shard of `fastlm data prepare`?")
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

    A split's shards are called SPLIT.bin, SPLIT_000000.bin, or the same behind a prefix and an underscore, as llm.c's
    tiny_shakespeare_train.bin and fineweb_val_000000.bin.
    """
    directory = Path(directory)
    pattern = re.compile(rf"(.*_)?{split}(_\d+)?\.bin")
    paths = sorted(path for path in directory.glob("*.bin") if pattern.fullmatch(path.name))
    if not paths:
        raise ValueError(f"{directory}: has no {split} shards ({split}_*.bin); make them with `fastlm data prepare`")
    return {str(path): read_shard(path) for path in paths}
