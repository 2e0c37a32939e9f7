"""Tokenizer: text to token ids and back, over the `tokenizers` library, in files that transformers loads."""

import json
import os
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
PIECE = 1 << 20  # characters encoded at a time


class Tokenizer:
    """A vocabulary. `load`, `train_bpe`, `bytes` and `chars` make one; `encode` and `decode` use it."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        self.vocab_size = backend.get_vocab_size()
        self.end_of_text = backend.token_to_id(END_OF_TEXT)  # None where the vocabulary has none
        characters = isinstance(backend.model, models.WordLevel) and not backend.model.unk_token
        self._characters = set(backend.get_vocab()) if characters else None

    @classmethod
    def load(cls, path):
        """The tokenizer of a directory (tokenizer.json, or GPT-2's vocab.json and merges.txt) or tokenizer.json."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        vocab, merges = path / "vocab.json", path / "merges.txt"
        try:
            if file.is_file():
                return cls(tokenizers.Tokenizer.from_file(str(file)))
            if vocab.is_file() and merges.is_file():
                return cls(_byte_level(models.BPE.from_file(str(vocab), str(merges))))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path}: no valid tokenizer ({error})") from None
        raise ValueError(f"{path}: has neither tokenizer.json nor vocab.json and merges.txt")

    @classmethod
    def train_bpe(cls, texts, vocab_size):
        """A byte-level BPE of `vocab_size` tokens trained on an iterable of texts; every text can be encoded."""
        if vocab_size < 257:
            raise ValueError(f"train_bpe: vocab_size is {vocab_size}, wanted at least 257 (256 bytes and end of text)")
        tokenizer = _byte_level(models.BPE())
        tokenizer.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=[END_OF_TEXT],
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                show_progress=False,
            ),
        )
        return cls(tokenizer)

    @classmethod
    def bytes(cls):
        """One token a byte of UTF-8, its value the id; 256 is the end of text."""
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=_byte_alphabet(), merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
        return cls(tokenizer)

    @classmethod
    def chars(cls, text):
        """One token for each distinct character of `text`, in order of code point."""
        if not text:
            raise ValueError("chars: the text is empty, wanted at least one character")
        vocab = {character: index for index, character in enumerate(sorted(set(text)))}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=""))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        return cls(tokenizer)

    def encode(self, text):
        """Token ids of a text. Raises ValueError for a character that a vocabulary of characters lacks."""
        return self.encode_array(text).tolist()

    def encode_array(self, text, *, progress=None):
        """Token ids of a text of any length, int64 (n,); progress(characters) is called as pieces are done."""
        if self._characters is not None and (unknown := sorted(set(text) - self._characters)):
            raise ValueError(
                f"character {unknown[0]!r} is not among the {self.vocab_size} of this vocabulary; "
                "tokenise with bytes or bpe, or make the vocabulary from this text too"
            )
        arrays, pieces = [np.empty(0, dtype=np.int64)], list(_pieces(text))
        for start in range(0, len(pieces), 8):
            batch = pieces[start : start + 8]
            for encoding in self.backend.encode_batch_fast(batch, add_special_tokens=False):
                arrays.append(np.array(encoding.ids, dtype=np.int64))
            if progress:
                progress(sum(map(len, batch)))
        return np.concatenate(arrays)

    def decode(self, ids):
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode([int(index) for index in ids], skip_special_tokens=False)

    def stream(self):
        """A function of one token id that returns the text that is complete by it, perhaps empty."""
        stream = decoders.DecodeStream(skip_special_tokens=False)
        return lambda index: stream.step(self.backend, int(index)) or ""

    def save(self, directory):
        """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.end_of_text is not None:
            config |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
        contents = {
            "tokenizer.json": self.backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }
        for name, content in contents.items():
            partial = directory / f".{name}.partial"
            partial.write_text(content, encoding="utf-8")
            os.replace(partial, directory / name)


def _byte_level(model):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tokenizer


def _byte_alphabet():
    """{character: byte} of GPT-2's byte alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _pieces(text):
    """Cuts a text where no token can lie across the cut: behind a lone newline between two that are no white space.

    GPT-2's pattern splits words from a newline before them, and joins white space only with white space.
    """
    start = 0
    while len(text) - start > PIECE:
        cut = start + PIECE
        while 0 < (cut := text.find("\n", cut) + 1) < len(text):
            if not text[cut].isspace() and not text[cut - 2].isspace():
                break
        if not 0 < cut < len(text):
            break
        yield text[start:cut]
        start = cut
    yield text[start:]
