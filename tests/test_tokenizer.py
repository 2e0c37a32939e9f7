"""Tokenizer: every text comes back, transformers reads what it writes, and damage is named, not loaded."""

import json
import re
import shutil
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mutations import mutations

from fastlm.data import tokenizer as module
from fastlm.data.tokenizer import Tokenizer

SENTENCE = "Hello, I am a large language model."
AWKWARD = (
    "Hello\n\n  wörld\r\n\ttabs \u00a0\u2003 😀👩‍👩‍👧 e\u0301é \x00\x1c\x85 "
    "'tis don't I'LL 1234 \n \n\n x<|endoftext|>Ġ<|endof|> \ufffd日本語 "
)
TRAINING = (AWKWARD + SENTENCE + "\n") * 20 + "the cat sat on the mat\n" * 50
# No lone surrogates: a text has none. Whole phrases, so that merges and the end of text occur.
texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.sampled_from(["<|endoftext|>", "the cat", " sat\n", "\n", "\n\n", "  ", "\x1c", "\u2028", "'s"]),
    ),
    max_size=30,
).map("".join)


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train_bpe(TRAINING, 340)


@pytest.fixture(scope="module")
def gpt2(data):
    return Tokenizer.load(data / "gpt2")


# ---- GPT-2's own


def test_gpt2_s_files_give_gpt2_s_ids(gpt2):
    assert gpt2.encode(SENTENCE) == [15496, 11, 314, 716, 257, 1588, 3303, 2746, 13]
    assert gpt2.encode("") == [] and gpt2.encode("<|endoftext|>") == [50256] == [gpt2.end_of_text]
    assert (gpt2.vocab_size, gpt2.kind) == (50257, "bpe")
    assert gpt2.decode(gpt2.encode(AWKWARD)) == AWKWARD


def test_tinyshakespeare_in_pieces_is_tinyshakespeare(gpt2, data, monkeypatch):
    text = (data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    counts = [len(gpt2.encode_array(part)) for part in (text, text[:cut], text[cut:])]
    assert counts == [338025, 301966, 36059]
    whole = gpt2.backend.encode(text[:100_000]).ids
    assert gpt2.encode(text[:100_000]) == whole
    monkeypatch.setattr(module, "PIECE", 64)
    parts = (text[at : at + 1000] for at in range(0, 100_000, 1000))
    assert np.concatenate(list(gpt2.encode_stream(parts))).tolist() == whole


def test_transformers_agrees(gpt2, data, tmp_path):
    transformers = pytest.importorskip("transformers")
    gpt2.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (SENTENCE, AWKWARD, (data / "tinyshakespeare.txt").read_text(encoding="utf-8")[:20_000]):
        ids = gpt2.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == gpt2.decode(ids) == text
    assert theirs.eos_token_id == 50256 and len(theirs) == 50257
    assert theirs.decode([15496, 50256, 13], skip_special_tokens=True) == "Hello."


# ---- every kind


def made(kind, text=AWKWARD):
    return Tokenizer.chars(text) if kind == "chars" else Tokenizer.bytes()


@settings(max_examples=200, deadline=None)
@given(texts)
@example(AWKWARD)
@example("")
def test_every_text_comes_back(bpe, text):
    for tokenizer in (bpe, Tokenizer.bytes(), Tokenizer.chars(text or "x")):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer.backend.encode(text).ids
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
        assert tokenizer.encode_array(text).dtype == np.int64


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(1, 20), st.integers(1, 7))
def test_pieces_are_the_whole(bpe, text, size, part):
    """However a long text is divided, its ids are those of the whole."""
    parts = [text[at : at + part] for at in range(0, len(text), part)]
    pieces = list(module._pieces(parts, size))
    assert "".join(pieces) == text and "" not in pieces
    for tokenizer in (bpe, Tokenizer.bytes(), Tokenizer.chars(text or "x")):
        found = [index for piece in pieces for index in tokenizer.backend.encode(piece).ids]
        assert found == tokenizer.backend.encode(text).ids


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=60))
@example([0xF0, 0x9F, 0x98, 0x80, 0xF0, 0x9F, 256, 0x98, 0xC3])
def test_a_stream_of_tokens_decodes_to_the_whole(ids):
    tokenizer = Tokenizer.bytes()
    step = tokenizer.stream()
    pieces = [step(index) for index in ids] + [step(None)]
    theirs = tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert "".join(pieces) == tokenizer.decode(ids) == theirs


def test_a_stream_waits_for_whole_characters():
    tokenizer = Tokenizer.bytes()
    step = tokenizer.stream()
    assert [step(index) for index in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert step(0xF0) == "" and step(None) == "\ufffd"


def test_bytes_are_bytes():
    tokenizer = Tokenizer.bytes()
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.kind) == (257, 256, "bytes")
    assert tokenizer.encode("é\n<|endoftext|><|endoftext|>a") == [0xC3, 0xA9, 10, 256, 256, 97]


def test_characters_are_in_order_of_code_point():
    tokenizer = Tokenizer.chars("hello 😀\n")
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.kind) == (7, None, "chars")
    assert tokenizer.encode("\n eh😀") == [0, 1, 2, 3, 6]


def test_tinyshakespeare_has_65_characters(data):
    text = (data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer.chars(text)
    ids = tokenizer.encode_array(text)
    assert tokenizer.vocab_size == 65 and len(ids) == 1115394
    assert tokenizer.decode(ids[:5000]) == text[:5000]


@pytest.mark.parametrize(
    "text, character, at", [("hexlo", "'x'", 2), ("héllo", "'é'", 1), ("hell😀", "'😀'", 4)]
)
def test_a_character_that_the_vocabulary_lacks_is_named(text, character, at):
    with pytest.raises(ValueError, match=f"character {character} at {at} is not among the 4 of this"):
        Tokenizer.chars("hello").encode(text)


def test_a_lone_surrogate_is_refused(bpe):
    for tokenizer in (bpe, Tokenizer.bytes(), Tokenizer.chars("a")):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match="surrogates not allowed"):
        Tokenizer.chars("a\ud800")


@pytest.mark.parametrize("index", [-1, 257, 10**30])
def test_an_id_outside_the_vocabulary_is_refused(index):
    with pytest.raises(ValueError, match=f"token id {index} lies outside the vocabulary of 257"):
        Tokenizer.bytes().decode([1, index])


def test_what_is_no_text_is_refused():
    with pytest.raises(TypeError, match="text is bytes, wanted str"):
        Tokenizer.bytes().encode(b"abc")


def test_progress_counts_every_character(bpe, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 100)
    told = []
    bpe.encode_array(TRAINING, progress=told.append)
    assert sum(told) == len(TRAINING) and len(told) > 5


# ---- training


def test_a_trained_vocabulary(bpe):
    assert (bpe.vocab_size, bpe.end_of_text, bpe.kind) == (340, 339, "bpe")
    assert len(bpe.encode("the cat sat on the mat\n")) < 8
    assert bpe.encode("a<|endoftext|>b")[1] == 339


def test_training_is_a_function_of_the_text(bpe, monkeypatch):
    parts = [TRAINING[at : at + 77] for at in range(0, len(TRAINING), 77)]
    monkeypatch.setattr(module, "PIECE", 50)
    assert Tokenizer.train_bpe([parts], 340).backend.to_str() == bpe.backend.to_str()


@pytest.mark.parametrize("text", [
    "".join(chr(0x4E00 + n * n % 2500) for n in range(100_000)), "x1" * 100_000, " " * 300_000, "\n" * 300_000,
], ids=["chinese", "no spaces", "spaces", "newlines"])
def test_words_are_bounded_in_training(text):
    """A text without spaces is one word to GPT-2's pattern, and merges take as long as its square."""
    words = list(module._words(text))
    assert "".join(words) == text
    longest = max(len(word) for piece in words for word in re.findall(r"\s+|\S+", piece))
    assert longest <= module.LONGEST_WORD
    begun = time.monotonic()
    tokenizer = Tokenizer.train_bpe(text, 600)
    assert time.monotonic() - begun < 20
    assert tokenizer.decode(tokenizer.encode(text[:1000])) == text[:1000]


def test_bounded_words_change_no_ordinary_text():
    assert list(module._words(TRAINING)) == [TRAINING]
    long = "a" * module.LONGEST_WORD
    assert list(module._words(f"x {long} y")) == [f"x {long} y"]
    assert list(module._words(f"x {long}b y")) == [f"x {long}", "b y"]


def test_the_end_of_text_is_no_word_to_learn():
    tokenizer = Tokenizer.train_bpe("<|endoftext|>" * 50 + "ab" * 50, 300)
    assert "ab" in tokenizer.backend.get_vocab() and "endoftext" not in tokenizer.backend.get_vocab()


def test_a_text_too_short_for_the_vocabulary_gives_a_smaller_one():
    tokenizer = Tokenizer.train_bpe("ab", 5000)
    assert tokenizer.vocab_size == 258 and tokenizer.end_of_text == 257
    assert Tokenizer.train_bpe([], 5000).vocab_size == 257


@pytest.mark.parametrize("size", [0, 256, 2**24 + 1])
def test_a_vocabulary_of_impossible_size_is_refused(size):
    with pytest.raises(ValueError, match=f"vocab_size is {size}, wanted 257"):
        Tokenizer.train_bpe("abc", size)


def test_characters_of_nothing_are_refused():
    with pytest.raises(ValueError, match="the text is empty"):
        Tokenizer.chars("")


# ---- files


@pytest.mark.parametrize("kind", ["bpe", "bytes", "chars"])
def test_what_is_saved_loads_here_and_in_transformers(kind, bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = bpe if kind == "bpe" else made(kind)
    tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    ids = tokenizer.encode(AWKWARD)
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = Tokenizer.load(path)
        assert loaded.encode(AWKWARD) == ids and loaded.decode(ids) == AWKWARD
        assert (loaded.kind, loaded.vocab_size, loaded.end_of_text) == (
            kind, tokenizer.vocab_size, tokenizer.end_of_text,
        )
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')  # as beside a model
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(AWKWARD) == ids and theirs.decode(ids) == AWKWARD
    assert len(theirs) == tokenizer.vocab_size and theirs.eos_token_id == tokenizer.end_of_text
    theirs.save_pretrained(tmp_path / "theirs")
    assert Tokenizer.load(tmp_path / "theirs").encode(AWKWARD) == ids


def test_what_a_file_adds_or_cuts_is_not_ours(bpe, tmp_path):
    """Truncation, padding, and a template that begins every text with a token."""
    bpe.save(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
                         "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    begin = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [339], "tokens": ["<|endoftext|>"]}}
    values["post_processor"] = {"type": "TemplateProcessing", "single": begin, "pair": [*begin, begin[1]],
                                "special_tokens": special}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    loaded = Tokenizer.load(tmp_path)
    for text in (AWKWARD, "a", ""):
        assert loaded.encode(text) == bpe.encode(text)


def test_vocab_and_merges_are_the_same_tokenizer(bpe, tmp_path):
    gpt2_files(bpe, tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(AWKWARD) == bpe.encode(AWKWARD) and loaded.end_of_text == bpe.end_of_text
    text = (tmp_path / "merges.txt").read_text(encoding="utf-8").replace("\n", "\r\n")
    (tmp_path / "merges.txt").write_bytes(text.encode())
    assert Tokenizer.load(tmp_path).encode(AWKWARD) == bpe.encode(AWKWARD)


def gpt2_files(tokenizer, folder):
    values = json.loads(tokenizer.backend.to_str())
    vocab = tokenizer.backend.get_vocab()
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in values["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")


def test_a_byte_order_mark_is_no_token(bpe, tmp_path):
    """In files that an editor saved."""
    gpt2_files(bpe, tmp_path)
    (tmp_path / "other").mkdir()
    bpe.save(tmp_path / "other")
    for folder in (tmp_path, tmp_path / "other"):
        for path in folder.glob("*.*"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert Tokenizer.load(folder).encode(AWKWARD) == bpe.encode(AWKWARD)


def files(folder, **contents):
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


FLAGS = {"lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
ADDED = {
    "added_tokens.json": {"added_tokens": {"<pad>": 340, "<speaker>": 341}},
    "decoder": {"tokenizer_config": {"added_tokens_decoder": {
        "339": {"content": "<|endoftext|>", **FLAGS, "special": True},
        "340": {"content": "<pad>", **FLAGS, "special": True}, "341": {"content": "<speaker>", **FLAGS,
                                                                       "special": False}}}},
    "roles": {"tokenizer_config": {"pad_token": "<pad>", "additional_special_tokens": ["<speaker>"]}},
    "map": {"special_tokens_map": {"pad_token": {"content": "<pad>", **FLAGS}, "extra_special_tokens": ["<speaker>"]}},
    "both": {"added_tokens": {"<pad>": 340, "<speaker>": 341}, "tokenizer_config": {"pad_token": "<pad>"}},
}


@pytest.mark.parametrize("saved", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ADDED)
def test_added_tokens_are_tokens_as_in_transformers(kind, saved, bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    gpt2_files(bpe, tmp_path) if saved == "vocab.json" else bpe.save(tmp_path)
    files(tmp_path, config={"model_type": "gpt2"}, **ADDED[kind])
    tokenizer, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("<speaker> hi<pad>\n<speaker><|endoftext|> the cat", AWKWARD):
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text) and tokenizer.decode(ids) == text
    assert tokenizer.encode("<speaker> hi")[0] == 341 and tokenizer.vocab_size == 342 == len(theirs)
    tokenizer.save(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.encode(text) == ids and again.pad_token == theirs.pad_token
    assert Tokenizer.load(tmp_path / "again").encode(text) == ids


def test_roles_and_lengths_are_kept(bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    gpt2_files(bpe, tmp_path)
    files(tmp_path, config={"model_type": "gpt2"}, added_tokens={"<pad>": 340, "<end>": 341}, tokenizer_config={
        "pad_token": "<pad>", "eos_token": "<end>", "model_max_length": 77, "chat_template": "{{ messages }}",
        "unk_token": None})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.end_of_text == 341 and tokenizer.max_length == 77 and tokenizer.roles["pad_token"] == "<pad>"
    tokenizer.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.model_max_length) == (340, 341, 77)
    assert theirs.chat_template == "{{ messages }}"
    theirs.save_pretrained(tmp_path / "theirs")
    again = Tokenizer.load(tmp_path / "theirs")
    assert (again.end_of_text, again.max_length, again.roles["pad_token"]) == (341, 77, "<pad>")
    again.save(tmp_path / "longer", max_length=99)
    assert Tokenizer.load(tmp_path / "longer").max_length == 99
    assert bpe.max_length is None and bpe.end_of_text == 339


def test_an_added_token_is_text_and_no_spelling_of_bytes(bpe, tmp_path):
    gpt2_files(bpe, tmp_path)
    files(tmp_path, added_tokens={"é<x>": 340, " dé": 341, "<nl>\n": 342, "<Ġ>": 343})
    tokenizer = Tokenizer.load(tmp_path)
    for text in ("aé<x>b", "x dé", "<nl>\n\n the", "<Ġ>"):
        ids = tokenizer.encode(text)
        assert max(ids) >= 340 and tokenizer.decode(ids) == text
        step = tokenizer.stream()
        assert "".join([*map(step, ids), step(None)]) == text


def test_a_token_of_the_vocabulary_that_is_added_is_one_token(bpe, tmp_path):
    """As some write it: in vocab.json too, where no merge makes it."""
    gpt2_files(bpe, tmp_path)
    change(tmp_path / "vocab.json", **{"<pad>": 340})
    files(tmp_path, added_tokens={"<pad>": 340})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("a<pad>")[1:] == [340] and tokenizer.vocab_size == 341


@pytest.mark.parametrize("contents, message", [
    ({"added_tokens": {"<pad>": 400}}, "added_tokens.json: token '<pad>' has id 400, but the next free one is 340"),
    ({"added_tokens": {"<pad>": 3}}, "token '<pad>' has id 3"), ({"added_tokens": {"<pad>": "x"}}, "has id 'x'"),
    ({"added_tokens": []}, "added_tokens.json: holds a JSON list"), ({"added_tokens": {"": 340}}, "token ''"),
    ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "<pad>"}}}}, "tokenizer_config.json: .*'x'"),
    ({"tokenizer_config": {"added_tokens_decoder": {"340": 7}}}, "tokenizer_config.json"),
    ({"tokenizer_config": {"pad_token": 7}}, "tokenizer_config.json: pad_token is 7, wanted a token"),
])
def test_added_tokens_that_cannot_be_are_refused(contents, message, bpe, tmp_path):
    gpt2_files(bpe, tmp_path)
    files(tmp_path, **contents)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_roles_add_no_characters(tmp_path):
    Tokenizer.chars("abc").save(tmp_path)
    files(tmp_path, tokenizer_config={"pad_token": "<pad>"})
    assert Tokenizer.load(tmp_path).vocab_size == 3


def test_missing_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has neither tokenizer.json nor vocab.json and merges.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match="has neither"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="none/at/all: no such file or directory; pass a tokenizer.json"):
        Tokenizer.load("none/at/all")
    with pytest.raises(ValueError, match="no such file or directory"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_hub_id_without_a_network_says_how_to_go_on(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(name, **_):
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    message = "gpt2: no such directory, and not from the hub .Name or service not known.; pass a directory"
    with pytest.raises(ValueError, match=message):
        Tokenizer.load("gpt2")


def change(path, **changes):
    """Changes dotted keys of a JSON file; None deletes."""
    values = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = values
        for parent in parents:
            place = place[int(parent)] if isinstance(place, list) else place[parent]
        place[last] = value
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize("changes, message", [
    ({"model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0}}}, "wanted byte-level BPE"),
    ({"model": {"type": "Nonsense"}}, "tokenizer.json: no valid tokenizer"),
    ({"model": None}, "no valid tokenizer"),
    ({"model__vocab__a": 4_000_000_000}, "no token has id"),
    ({"model__vocab__a": 66}, "no token has id"),
    ({"model__vocab__zebra": 339, "added_tokens__0__id": 340}, "no merge makes token 'zebra'"),
    ({"model__merges": [["a", "nowhere"]]}, "nowhere"),
    ({"model__merges": []}, "no merge makes token"),
    ({"model__dropout": 0.5}, "its model has dropout 0.5, wanted none"),
    ({"model__end_of_word_suffix": "</w>"}, "end_of_word_suffix"),
    ({"normalizer": {"type": "Lowercase"}}, "its normalizer Lowercase would change the text"),
    ({"pre_tokenizer": None}, "pre_tokenizer is not ByteLevel"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer is not ByteLevel"),
    ({"pre_tokenizer__add_prefix_space": True}, "without add_prefix_space"),
    ({"decoder": None}, "with decoder None"),
    ({"added_tokens__0__id": 7}, "added token '<|endoftext|>' cannot have id 7"),
    ({"version": "9.9"}, "no valid tokenizer"),
])
def test_what_would_load_wrongly_is_refused(changes, message, bpe, tmp_path):
    bpe.save(tmp_path)
    change(tmp_path / "tokenizer.json", **changes)
    with pytest.raises(ValueError, match=message) as raised:
        Tokenizer.load(tmp_path)
    assert "tokenizer.json" in str(raised.value)


def test_a_tokenizer_without_a_byte_is_refused(bpe, tmp_path):
    """It would leave the byte out of every text without a word."""
    gpt2_files(bpe, tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    vocab["zz"] = vocab.pop("ÿ")  # byte 255
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match="no token stands for byte 255 .1 of 256 missing"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content, message", [
    (b"", "no valid JSON"), (b'{"model"', "no valid JSON"), (b"[" * 100_000, "no valid JSON"),
    (b'{"model": ' + b"9" * 5000 + b"}", "no valid JSON"), (b"\xff", "is no UTF-8 text"),
    (b"[]", "holds a JSON list"), (b"{}", "it has no model"),
])
def test_what_is_no_tokenizer_json_is_named(content, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        Tokenizer.load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("file, content, message", [
    ("vocab.json", "[]", "holds a JSON list"), ("vocab.json", '{"a": "b"}', "token 'a' has id 'b'"),
    ("vocab.json", '{"a": -1}', "has id -1"), ("vocab.json", '{"a": true}', "has id True"),
    ("vocab.json", '{"a": 0}', "vocab.json, .*merges.txt: no valid tokenizer"),
    ("merges.txt", "#version: 0.2\na b\nabc\n", "line 3 is 'abc', wanted two tokens"),
    ("merges.txt", "#version: 0.2\na b c\n", "line 2 is 'a b c'"), ("merges.txt", "", "no merge makes"),
])
def test_what_are_no_vocab_and_merges_is_named(file, content, message, bpe, tmp_path):
    gpt2_files(bpe, tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        Tokenizer.load(tmp_path)
    assert file in str(raised.value)


COUNTS = [150, pytest.param(4000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["bpe", "bytes", "chars", "vocab.json", "merges.txt"])
def test_a_damaged_tokenizer_is_refused_or_gives_back_every_text(kind, count, bpe, tmp_path):
    """What stays undetected is another vocabulary, whole in itself; the manifest's checksum finds it."""
    if kind in ("vocab.json", "merges.txt"):
        gpt2_files(Tokenizer.train_bpe("the cat sat on the mat\n" * 9, 280), tmp_path)
        path = tmp_path / kind
    else:
        (Tokenizer.train_bpe("the cat\n" * 9, 270) if kind == "bpe" else made(kind)).save(tmp_path)
        path = tmp_path / "tokenizer.json"
    text, loaded = "the cat é😀\n sat<|endoftext|>", 0
    for content in mutations(path.read_bytes(), count):
        path.write_bytes(content)
        try:
            tokenizer = Tokenizer.load(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error)
            continue
        loaded += 1
        try:
            ids = tokenizer.encode(text)
        except ValueError as error:
            assert tokenizer.kind == "chars" and "is not among" in str(error)
            continue
        assert tokenizer.decode(ids) == text == tokenizer.backend.decode(ids, skip_special_tokens=False)
        assert 0 <= min(ids) and max(ids) < tokenizer.vocab_size
    assert loaded < count


def test_saving_is_all_or_nothing(bpe, tmp_path, monkeypatch):
    bpe.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        Tokenizer.bytes().save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
    shutil.rmtree(tmp_path)
