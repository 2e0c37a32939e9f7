"""Loader: a batch is a function of seed and step, an epoch has a token once, evaluation a target once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data.loader import Loader
from fastlm.data.shards import read_split, write_shard

VOCAB = 2**20
sizes = st.lists(st.integers(1, 60), min_size=1, max_size=4)


def numbered(lengths):
    """Shards whose tokens are their own places in the whole."""
    ends = np.cumsum([0, *lengths])
    return {f"{n}.bin": np.arange(ends[n], ends[n + 1], dtype=np.uint32) for n in range(len(lengths))}


def test_targets_follow_tokens():
    tokens, targets, index = Loader(numbered([1000]), 16, 4, VOCAB).batch(3)
    assert tokens.shape == targets.shape == (4, 16) and tokens.dtype == targets.dtype == torch.int64
    assert tokens.is_contiguous() and targets.is_contiguous() and index == 12
    assert torch.equal(targets, tokens + 1)
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(16))


def test_the_same_seed_and_step_give_the_same_batch_for_ever():
    """Pinned: a resumed run reads what was read before, also under a later numpy."""
    loader = Loader(numbered([103, 57]), 8, 6, VOCAB, seed=1234)
    assert loader.windows == 17
    assert loader.batch(0)[0][:, 0].tolist() == PINNED[0]
    assert loader.batch(7)[0][:, 0].tolist() == PINNED[1]


PINNED = [113, 48, 105, 56, 40, 72], [27, 75, 11, 137, 51, 83]


def test_batches_do_not_depend_on_what_was_read_before():
    shards = numbered([300, 200])
    one = Loader(shards, 8, 5, VOCAB, seed=3)
    batches = [one.batch(step) for step in range(40)]
    for step in (39, 0, 17, 5, 39):
        for tensor, other in zip(batches[step], Loader(shards, 8, 5, VOCAB, seed=3).batch(step)):
            assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(other))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_micro_batches_are_the_step_s_batch_in_pieces(step, counts):
    loader = Loader(numbered([300, 50]), 8, sum(counts), VOCAB, seed=3)
    tokens, targets, index = loader.batch(step)
    first = 0
    for count in counts:
        micro = loader.batch(step, first, count)
        assert torch.equal(micro[0], tokens[first : first + count])
        assert torch.equal(micro[1], targets[first : first + count])
        assert micro[2] == index + first
        first += count


def test_seeds_and_epochs_differ():
    shards = numbered([2000])
    starts = [Loader(shards, 16, 100, VOCAB, seed=seed).batch(0)[0][:, 0].tolist() for seed in (0, 1)]
    assert sorted(starts[0]) != starts[0] != starts[1]
    loader = Loader(shards, 16, 123, VOCAB)
    assert loader.windows == 124
    epochs = [[int(loader._window(124 * epoch + n)[0]) for n in range(124)] for epoch in range(6)]
    assert len({epoch[0] % 16 for epoch in epochs}) > 2, "offsets should change from epoch to epoch"


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(1, 12), st.integers(0, 3), st.integers(0, 2**64 - 1))
def test_an_epoch_sees_each_token_once_but_for_the_edges(lengths, T, epoch, seed):
    shards = numbered(lengths)
    if max(lengths) <= T:
        with pytest.raises(ValueError, match="too few|need"):
            Loader(shards, T, 1, VOCAB)
        return
    loader = Loader(shards, T, 1, VOCAB, seed=seed)
    windows = [loader.batch(epoch * loader.windows + n) for n in range(loader.windows)]
    seen = np.concatenate([tokens[0].numpy() for tokens, _, _ in windows])
    assert len(seen) == len(set(seen)), "a token came twice as input"
    for array in shards.values():
        inputs = np.sort(seen[np.isin(seen, array)])
        if len(array) > T:
            assert len(inputs) and np.array_equal(inputs, np.arange(inputs[0], inputs[-1] + 1)), "a gap"
            assert inputs[0] - array[0] < T and len(array) - len(inputs) < 2 * T
        else:
            assert not len(inputs)


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(1, 12), st.integers(1, 5))
def test_the_whole_split_has_every_target_once(lengths, T, batch_size):
    shards = numbered(lengths)
    if max(lengths) <= T:
        return
    batches = list(Loader(shards, T, 1, VOCAB).whole(batch_size))
    for tokens, targets in batches:
        assert tokens.shape == targets.shape and len(tokens) <= batch_size and tokens.shape[1] <= T
        assert torch.equal(targets, tokens + 1)
    targets = torch.cat([targets.flatten() for _, targets in batches])
    assert targets.tolist() == [int(token) for array in shards.values() for token in array[1:]]


@pytest.mark.parametrize("bad, place", [(500, 0), (777, 123), (65535, 199)])
def test_an_id_outside_the_vocabulary_is_named_with_its_place(tmp_path, bad, place):
    tokens = np.arange(200) % 500
    tokens[place] = bad
    write_shard(tmp_path / "train_000000.bin", tokens)
    loader = Loader(read_split(tmp_path, "train"), 10, 1, 500)
    message = rf"train_000000.bin: token id {bad} at {place}, but the vocabulary has 500; was the data"
    with pytest.raises(ValueError, match=message):
        list(loader.whole(4))
    if place == 123:  # the edges may be left out
        with pytest.raises(ValueError, match=message):
            [loader.batch(step) for step in range(loader.windows)]


def test_a_negative_id_is_refused():
    with pytest.raises(ValueError, match="token id -1 at 5"):
        list(Loader({"array": np.array([0, 1, 2, 3, 4, -1, 6])}, 3, 1, 500).whole(4))


@pytest.mark.parametrize("arguments, message", [
    (({"a.bin": np.zeros(8, np.uint16)}, 8, 1, 10), "a.bin: a sequence of 8 and its target need 9 .* 8; set "
     "sequence_length to 7 or less, or add text"),
    (({"a.bin": np.zeros(1, np.uint16)}, 8, 1, 10), "shard has 1; add text"),
    (({}, 8, 1, 10), "no shards"),
    (({"a.bin": np.zeros(80, np.uint16)}, 0, 1, 10), "sequence_length is 0"),
    (({"a.bin": np.zeros(80, np.uint16)}, 8, -3, 10), "batch_size is -3"),
    (({"a.bin": np.zeros(80, np.uint16)}, 8, 1, 10, -1), "seed is -1"),
])
def test_wrong_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Loader(*arguments)


@pytest.mark.parametrize("arguments", [(-1,), (0, 4), (0, 3, 2), (0, -1), (0, 0, 0)])
def test_a_batch_outside_its_step_is_refused(arguments):
    with pytest.raises(ValueError, match="Loader.batch: step .* a step has 0 to 3"):
        Loader(numbered([100]), 8, 4, VOCAB).batch(*arguments)


def test_a_batch_of_many_shards_is_quick():
    import time

    loader = Loader(numbered([300_000] * 40), 64, 256, 2**24)
    loader.batch(0)
    began = time.perf_counter()
    for step in range(1, 6):
        loader.batch(step)
    assert (time.perf_counter() - began) / 5 < 0.1
