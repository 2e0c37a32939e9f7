"""Shards: llm.c's format to the byte, and what is no whole shard is refused by name."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import mutations

from fastlm.data import shards
from fastlm.data.shards import ShardWriter, read_shard, read_split, token_dtype, write_shard


def header(*words):
    return np.array([*words, *[0] * (256 - len(words))], dtype="<u4").tobytes()


@pytest.mark.parametrize("vocab, magic, version, dtype", [
    (50257, 20240520, 1, "<u2"), (2**16, 20240520, 1, "<u2"), (2**16 + 1, 20240801, 7, "<u4"),
])
def test_the_bytes_are_llmc_s(tmp_path, vocab, magic, version, dtype):
    tokens = np.array([0, 1, vocab - 1, 7], dtype=np.int64)
    write_shard(tmp_path / "a.bin", tokens, vocab)
    assert (tmp_path / "a.bin").read_bytes() == header(magic, version, 4) + tokens.astype(dtype).tobytes()
    read = read_shard(tmp_path / "a.bin")
    assert read.dtype == np.dtype(dtype) == token_dtype(vocab) and read.tolist() == tokens.tolist()
    assert isinstance(read, np.memmap) and not read.flags.writeable
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@settings(max_examples=50, deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(0, 99_999), max_size=20), min_size=1, max_size=8),
    shard_tokens=st.integers(1, 30), large=st.booleans(),
)
def test_a_stream_comes_back_whatever_its_parts(tmp_path_factory, parts, shard_tokens, large):
    folder = tmp_path_factory.mktemp("shards")
    vocab = 100_000 if large else 500
    stream = [token % vocab for part in parts for token in part]
    with ShardWriter(folder, "train", vocab, shard_tokens=shard_tokens) as writer:
        for part in parts:
            writer.write(np.array(part, dtype=np.int64) % vocab)
    assert writer.tokens == len(stream)
    assert len(writer.paths) == len(list(folder.iterdir())) == -(-len(stream) // shard_tokens)
    if stream:
        read = read_split(folder, "train")
        assert list(read) == list(map(str, writer.paths))
        assert np.concatenate(list(read.values())).tolist() == stream
        assert all(len(tokens) == shard_tokens for tokens in list(read.values())[:-1])


def test_more_tokens_than_an_int32_counts(tmp_path):
    """llm.c's own reader breaks beyond 2 GiB: the count is unsigned and offsets are 64 bits wide."""
    path, count = tmp_path / "a.bin", 2**31 + 5
    with open(path, "wb") as file:  # a hole: no disk is filled
        file.write(header(20240520, 1, count))
        file.seek(1024 + 2 * (count - 2))
        file.write(np.array([123, 456], dtype="<u2").tobytes())
    tokens = read_shard(path)
    assert len(tokens) == count and tokens[-3:].tolist() == [0, 123, 456] and tokens[2**30] == 0
    from fastlm.data.loader import Loader

    loader = Loader({"a.bin": tokens[-100_000:]}, 1024, 2, 50257)
    assert loader.windows == 96
    last = list(Loader({"a.bin": tokens[count - 11 :]}, 4, 1, 50257).whole(8))[-1]
    assert last[1].tolist() == [[123, 456]]


def test_a_header_cannot_count_more_than_it_holds(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="shard_tokens is 4294967296, wanted 1 to 4294967295"):
        ShardWriter(tmp_path, "train", 10, shard_tokens=2**32)
    monkeypatch.setattr(shards, "LARGEST", 3)
    with pytest.raises(ValueError, match="4 tokens, wanted 1 to 3"):
        write_shard(tmp_path / "a.bin", [1, 2, 3, 4])


@pytest.mark.parametrize("content, message", [
    (b"", "0 bytes, a shard's header alone has 1024"),
    (header(20240520, 1, 2)[:-1], "1023 bytes"),
    (header(20240521, 1, 2) + bytes(4), "magic number 20240521, wanted 20240520 or 20240801"),
    (header(20240520, 7, 2) + bytes(4), "version 7, wanted 1"),
    (header(20240801, 1, 2) + bytes(8), "version 1, wanted 7"),
    (header(20240520, 1, 0), "counts 0 tokens"),
    (header(20240520, 1, 3) + bytes(4), r"1028 bytes, .* 3 tokens \(1030 bytes\); the file was cut short"),
    (header(20240520, 1, 2) + bytes(5), "1029 bytes, but .* damaged"),
    (header(20240801, 7, 2) + bytes(4), "cut short"),
    (header(20240520, 1, 2**32 - 1) + bytes(4), "4294967295 tokens"),
])
def test_what_is_no_shard_is_named(tmp_path, content, message):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_shard(path)
    assert str(path) in str(raised.value)


def test_a_missing_shard_and_a_folder(tmp_path):
    with pytest.raises(ValueError, match="cannot be read .No such file"):
        read_shard(tmp_path / "none.bin")
    with pytest.raises(ValueError, match="is no file"):
        read_shard(tmp_path)
    with pytest.raises(ValueError, match="has no val_.*fastlm data prepare"):
        read_split(tmp_path, "val")


def test_splits_are_told_apart_by_name(tmp_path):
    names = ["train_000001.bin", "train_000000.bin", "fineweb_val_000000.bin", "tiny_train.bin",
             "interval.bin", "val_evaluation_train_000000.bin", "train.bin.partial", "xtrain.bin"]
    for name in names:
        write_shard(tmp_path / name, [1])
    splits = (read_split(tmp_path, split) for split in ("val", "train"))
    val, train = ([path.rsplit("/", 1)[1] for path in split] for split in splits)
    assert val == ["fineweb_val_000000.bin"]
    assert train == [
        "tiny_train.bin", "train_000000.bin", "train_000001.bin", "val_evaluation_train_000000.bin",
    ]


@pytest.mark.parametrize("tokens, message", [
    ([], "0 tokens"), ([[1, 2]], r"shape \(1, 2\)"), ([1.5], "float64"),
    ([1, -1], "token id -1 lies outside"),
    ([1, 65536], "token id 65536 lies outside the vocabulary of 65536"),
])
def test_what_cannot_be_written_leaves_no_file(tmp_path, tokens, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "a.bin", tokens)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_writer_leaves_whole_shards_only(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, "train", 10, shard_tokens=3) as writer:
        writer.write([1, 2, 3, 4])
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["train_000000.bin"]
    assert read_shard(tmp_path / "train_000000.bin").tolist() == [1, 2, 3]


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path / "a.bin", [1, 2, 3])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_damaged_shard_is_refused_or_read_as_it_is(tmp_path, count):
    """Tokens have no checksum in this format (the manifest has one); header and size are never misread."""
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(700) % 300)
    for content in mutations(path.read_bytes(), count):
        path.write_bytes(content)
        words = np.frombuffer(content[:12].ljust(12, b"\0"), dtype="<u4").tolist()
        dtype = {(20240520, 1): "<u2", (20240801, 7): "<u4"}.get(tuple(words[:2]))
        whole = dtype and words[2] and len(content) == 1024 + words[2] * np.dtype(dtype).itemsize
        if whole:
            assert read_shard(path).tobytes() == content[1024:]
        else:
            with pytest.raises(ValueError, match="a.bin"):
                read_shard(path)
