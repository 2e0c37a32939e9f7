"""Tokenizer: text to token ids and back, over the `tokenizers` library, in files that transformers loads.

Three kinds of vocabulary, each of which gives back exactly the text that it was given:

    byte-level BPE   GPT-2's own (tokenizer.json, or vocab.json and merges.txt), or one trained on a text
    bytes            the same with no merges: 256 ids that are the bytes of UTF-8
    characters       one id for every character of a text; others raise

BPE and bytes have an end of text, `<|endoftext|>`, behind all other ids: it separates documents and ends a
generated text. A text that contains these characters contains the token, as in transformers. Characters
have none, as in nanoGPT: 65 characters are 65 ids.
"""

import codecs
import functools
import json
import os
import re
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from fastlm.data.disk import naming
from fastlm.data.text import decode

END_OF_TEXT = "<|endoftext|>"
FILES = ["tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json",
         "special_tokens_map.json"]
LARGEST = 2**24  # tokens a vocabulary
PIECE = 1 << 18  # characters encoded at a time
LONGEST_WORD = 128  # characters, of what a vocabulary is trained on
RUN = re.compile(rf"\S{{{LONGEST_WORD}}}(?=\S)|\s{{{LONGEST_WORD}}}(?=\s)")


class Tokenizer:
    """A vocabulary. `load`, `train_bpe`, `bytes` and `chars` make one; `encode` and `decode` use it.

    `vocab_size` counts all ids, `end_of_text` is the id of the eos_token, `<|endoftext|>` unless `roles` say
    otherwise, or None, `kind` is "bpe", "bytes" or "chars", `backend` the tokenizers.Tokenizer. `roles` are what
    transformers calls special tokens, {"pad_token": "<pad>", …}, and `max_length` its model_max_length, or None;
    both, and `template`, a chat's, are written as they were read. Raises ValueError for a backend that would not
    give back every text that it encodes.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, roles=None, max_length=None, template=None):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        vocab = backend.get_vocab()
        _check_ids(vocab.values())  # first: the library writes a vocabulary by counting up to its largest id
        end = (roles or {}).get("eos_token")
        self.vocab_size, self.end_of_text = len(vocab), vocab.get(end if end in vocab else END_OF_TEXT)
        usual = dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT) if END_OF_TEXT in vocab else {}
        self.roles, self.max_length, self.template = {**usual, **(roles or {})}, max_length, template
        self.kind, self._divisible = _kind(json.loads(backend.to_str()), vocab)

    @classmethod
    def load(cls, path):
        """The tokenizer of a directory, a tokenizer.json, or a hub id.

        The directory has tokenizer.json, or GPT-2's vocab.json and merges.txt, and perhaps what transformers writes
        beside them of added tokens and roles. Raises ValueError naming the
        file and the cause for one that is missing, damaged or of another kind.
        """
        path = Path(path)
        if path.is_file():
            return cls._read(path)
        if (path / "tokenizer.json").is_file():
            return cls._read(path / "tokenizer.json", _Beside(path))
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            return cls._read_gpt2(path / "vocab.json", path / "merges.txt", _Beside(path))
        if path.exists():
            raise ValueError(f"{path}: has neither tokenizer.json nor vocab.json and merges.txt")
        if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)) and not path.suffix == ".json":
            return cls.load(_from_hub(str(path)))
        raise ValueError(
            f"{path}: no such file or directory; pass a tokenizer.json, or a directory with one or with "
            "vocab.json and merges.txt"
        )

    @classmethod
    def _read(cls, path, beside=None):
        text = _text(path)
        values = _json(path, text)
        try:
            if "model" not in values:
                raise ValueError("it has no model; pass the directory of GPT-2's vocab.json and merges.txt")
            backend = _guarded(tokenizers.Tokenizer.from_str, text)
            _check_ids(backend.get_vocab().values())
            own = beside.give(backend) if beside else {}
            tokenizer = cls(backend, **own)
            for token in values.get("added_tokens") or ():
                if tokenizer.backend.token_to_id(token["content"]) != token["id"]:
                    raise ValueError(f"added token {token['content']!r} cannot have id {token['id']}")
            return tokenizer
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: no valid tokenizer ({error})") from None

    @classmethod
    def _read_gpt2(cls, vocab, merges, beside):
        tokens = _json(vocab, _text(vocab))
        for token, index in tokens.items():
            if type(index) is not int or not 0 <= index < LARGEST:
                raise ValueError(f"{vocab}: token {token!r} has id {index!r}, wanted 0 to {LARGEST - 1}")
        pairs = []
        for number, line in enumerate(_text(merges).split("\n"), start=1):
            line = line.removesuffix("\r")
            if not line or (number == 1 and line.startswith("#version")):
                continue
            pair = tuple(line.split(" "))
            if len(pair) != 2:
                raise ValueError(f"{merges}: line {number} is {line[:80]!r}, wanted two tokens")
            pairs.append(pair)
        try:
            model = _guarded(lambda: models.BPE(vocab=tokens, merges=pairs))
            _check_ids(tokens.values())
            backend = _byte_level(model, [END_OF_TEXT] if END_OF_TEXT in tokens else [])
            return cls(backend, **beside.give(backend))
        except ValueError as error:
            raise ValueError(f"{vocab}, {merges}: no valid tokenizer ({error})") from None

    @classmethod
    def train_bpe(cls, texts, vocab_size):
        """A byte-level BPE of `vocab_size` tokens trained on an iterable of texts; it encodes every text.

        A text is a str, or an iterable of its parts. The vocabulary has fewer tokens where the texts have
        too few repetitions. The same texts give the same vocabulary.
        """
        if not 257 <= vocab_size <= LARGEST:
            raise ValueError(
                f"train_bpe: vocab_size is {vocab_size}, wanted 257 (the bytes and end of text) to {LARGEST}"
            )
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        texts = [texts] if isinstance(texts, str) else texts
        texts = ([text] if isinstance(text, str) else text for text in texts)
        pieces = (piece for text in texts for piece in _pieces(text, PIECE))
        plain = (words for piece in pieces for text in piece.split(END_OF_TEXT) for words in _words(text))
        backend.train_from_iterator(plain, trainer)
        return cls(_byte_level(backend.model, [END_OF_TEXT]))

    @classmethod
    def bytes(cls):
        """One token a byte of UTF-8, its value the id; 256 is the end of text, to tell documents apart."""
        return cls(_byte_level(models.BPE(vocab=BYTES, merges=[]), [END_OF_TEXT], use_regex=False))

    @classmethod
    def chars(cls, text):
        """One token for each distinct character of `text`, in order of code point."""
        if not text:
            raise ValueError("chars: the text is empty, wanted at least one character")
        text.encode()  # raises for a lone surrogate
        vocab = {character: index for index, character in enumerate(sorted(set(text)))}
        # A word-level model without an unknown token refuses other characters; every character is a word.
        backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=""))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(ANY_CHARACTER), "isolated")
        backend.decoder = decoders.Fuse()
        return cls(backend)

    def encode(self, text):
        """Token ids of a text, a list.

        Raises ValueError for a character that a vocabulary of characters lacks, and for a lone surrogate.
        """
        return self.encode_array(text).tolist()

    def encode_array(self, text, *, progress=None):
        """Token ids of a text of any length, int64 (n,); progress(characters) is called for each piece."""
        if not isinstance(text, str):
            raise TypeError(f"encode: text is {type(text).__name__}, wanted str")
        arrays = list(self.encode_stream([text], progress=progress))
        return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)

    def encode_stream(self, parts, *, progress=None):
        """Yields the token ids of one text that comes in parts, int64 (n,) at a time.

        However the text is divided, the ids are those of the whole text.
        """
        encode = getattr(self, f"_encode_{self.kind}")
        for piece in _pieces(parts, PIECE) if self._divisible else ["".join(parts)]:
            yield encode(piece)
            if progress:
                progress(len(piece))

    def _encode_bytes(self, text):
        documents = [np.frombuffer(document.encode(), dtype=np.uint8) for document in text.split(END_OF_TEXT)]
        separated = [np.array([self.end_of_text], dtype=np.int64)] * (2 * len(documents) - 1)
        separated[::2] = documents
        return np.concatenate(separated, dtype=np.int64)

    def _encode_chars(self, text):
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = self._id_of_point[np.minimum(points, len(self._id_of_point) - 1)]
        if len(ids) and ids.min() < 0:
            at = int(np.argmin(ids))
            raise ValueError(
                f"character {text[at]!r} at {at} is not among the {self.vocab_size} of this vocabulary; "
                "tokenise with bytes or bpe, or make the vocabulary from this text too"
            )
        return ids

    def _encode_bpe(self, text):
        text.encode()  # raises for a lone surrogate
        pieces = list(_pieces([text], PIECE // 16)) if self._divisible else [text]  # for all cores
        encodings = self.backend.encode_batch_fast(pieces, add_special_tokens=False)
        return np.concatenate([np.array(encoding.ids, dtype=np.int64) for encoding in encodings])

    def decode(self, ids):
        """The text of token ids, `<|endoftext|>` included; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self._bytes_of, ids)).decode("utf-8", "replace")

    def stream(self):
        """A function of a token id that returns the text complete by then, perhaps empty; at None, the rest.

        The texts together are what `decode` gives for all the ids.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def step(index):
            return decoder.decode(b"", final=True) if index is None else decoder.decode(self._bytes_of(index))

        return step

    def save(self, directory, *, max_length=None):
        """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads.

        max_length: the model's, in tokens; otherwise the one that was read.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= self.roles
        if (length := max_length or self.max_length) is not None:
            config["model_max_length"] = length
        if self.template is not None:
            config["chat_template"] = self.template
        contents = {
            "tokenizer.json": self.backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }
        for name, content in contents.items():
            partial = directory / f".{name}.partial"
            try:
                with naming(directory / name):
                    with open(partial, "w", encoding="utf-8", newline="") as file:
                        file.write(content)
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(partial, directory / name)
            finally:
                partial.unlink(missing_ok=True)

    def _bytes_of(self, index):
        index = int(index)
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"token id {index} lies outside the vocabulary of {self.vocab_size}")
        return self._bytes[index]

    @functools.cached_property
    def _bytes(self):
        """The bytes of every token; an added one is its own text."""
        table, added = [b""] * self.vocab_size, self.backend.get_added_tokens_decoder()
        for token, index in self.backend.get_vocab().items():
            spelled = self.kind != "chars" and index not in added and all(character in BYTES for character in token)
            table[index] = bytes(BYTES[character] for character in token) if spelled else token.encode()
        return table

    @functools.cached_property
    def _id_of_point(self):
        """The id of every code point, -1 where it has none; the last stands for all beyond."""
        vocab = {ord(token): index for token, index in self.backend.get_vocab().items()}
        table = np.full(max(vocab) + 2, -1, dtype=np.int64)
        table[list(vocab)] = list(vocab.values())
        return table


class _Beside:
    """What files beside a tokenizer's own say, as transformers reads them: added tokens, roles, a length.

    added_tokens.json {token: id}, tokenizer_config.json (added_tokens_decoder, roles, model_max_length) and
    special_tokens_map.json (roles).
    """

    def __init__(self, directory):
        self.added, self.roles, self.max_length, self.template = [], {}, None, None  # added: (file, id, AddedToken)
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            path = directory / name
            if path.is_file():
                values = _json(path, _text(path))
                self._take_roles(path, values)
                self._take_decoder(path, values.get("added_tokens_decoder") or {})
                length, template = values.get("model_max_length"), values.get("chat_template")
                if type(length) is int and 0 < length < LONGEST:
                    self.max_length = length
                self.template = template if isinstance(template, str) else self.template
        path = directory / "added_tokens.json"
        if path.is_file():
            special = set(self._special())
            for token, index in _json(path, _text(path)).items():
                self._take(path, token, index, {"special": token in special, "normalized": token not in special})

    def _take_roles(self, path, values):
        for role in ROLES:
            token = values.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and not isinstance(token, str):
                raise ValueError(f"{path}: {role} is {token!r}, wanted a token")
            if token:
                self.roles[role] = token
        for name in ("additional_special_tokens", "extra_special_tokens"):
            tokens = values.get(name) or []
            tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
            tokens = [token.get("content") if isinstance(token, dict) else token for token in tokens]
            if not all(isinstance(token, str) and token for token in tokens):
                raise ValueError(f"{path}: {name} are {tokens!r}, wanted tokens")
            if tokens:
                self.roles["additional_special_tokens"] = tokens

    def _take_decoder(self, path, decoder):
        try:
            for index, token in decoder.items():
                flags = {name: bool(token[name]) for name in FLAGS if name in token}
                self._take(path, token["content"], int(index), flags)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: no valid added_tokens_decoder ({error})") from None

    def _take(self, path, token, index, flags):
        if not isinstance(token, str) or not token or type(index) is not int or not 0 <= index < LARGEST:
            raise ValueError(f"{path}: token {token!r} has id {index!r}, wanted 0 to {LARGEST - 1}")
        if token not in (other.content for _, _, other in self.added):
            self.added.append((path, index, AddedToken(token, **flags)))

    def _special(self):
        for role, token in self.roles.items():
            yield from token if role == "additional_special_tokens" else [token]

    def give(self, backend):
        """Adds to a backend the tokens that it lacks; the other arguments of `Tokenizer`, a dict."""
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        characters = isinstance(backend.model, models.WordLevel)  # which have none but their own
        for path, index, token in sorted(self.added, key=lambda entry: entry[1]):
            free, own = backend.get_vocab_size(), backend.token_to_id(token.content)
            if index != (free if own is None else own):
                there = f"the next free one is {free}" if own is None else f"the vocabulary has it as {own}"
                raise ValueError(f"{path}: token {token.content!r} has id {index}, but {there}")
            if token.content not in known and not characters:
                backend.add_tokens([token])
        for token in self._special():
            if token not in known and not characters:
                backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        return {"roles": self.roles, "max_length": self.max_length, "template": self.template}


ROLES = "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"
FLAGS = "single_word", "lstrip", "rstrip", "normalized", "special"
LONGEST = 10**9  # transformers writes 10^30 where there is no limit


def has_tokenizer(directory):
    """Whether a directory holds the files of a tokenizer."""
    names = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    return any(all((Path(directory) / name).is_file() for name in group) for group in names)


def _byte_alphabet():
    """{character: byte} of GPT-2's byte alphabet: printable Latin-1 is itself, the rest begins at U+0100."""
    ranges = "!~", "¡¬", "®ÿ"
    printable = [byte for first, last in ranges for byte in range(ord(first), ord(last) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_alphabet()
ANY_CHARACTER = r"[\s\S]"


def _byte_level(model, special=(), use_regex=True):
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return backend


def _check_ids(ids):
    """Raises ValueError unless ids are 0, 1, ... each once."""
    if not 0 < len(ids) <= LARGEST:
        raise ValueError(f"it has {len(ids)} tokens, wanted 1 to {LARGEST}")
    taken = set(ids)
    if taken != set(range(len(ids))):
        gap = next(index for index in range(len(ids)) if index not in taken)
        raise ValueError(f"no token has id {gap}, wanted all ids from 0 to {len(ids) - 1}, each once")


def _kind(values, vocab):
    """(kind, whether `_pieces` may divide a text) of a tokenizer.json with the tokens `vocab`.

    Raises ValueError where encoding and decoding would lose or change text.
    """
    model, before, added = values["model"], values["pre_tokenizer"] or {}, values["added_tokens"]
    decoder = (values["decoder"] or {}).get("type")
    if values["normalizer"] is not None:
        raise ValueError(f"its normalizer {values['normalizer']['type']} would change the text, wanted none")

    if model["type"] == "WordLevel":
        pattern = {"pattern": {"Regex": ANY_CHARACTER}, "behavior": "Isolated", "invert": False}
        single = before == {"type": "Split", **pattern} and all(len(token) == 1 for token in vocab)
        if not single or decoder != "Fuse" or model["unk_token"] or added:
            raise ValueError("it is word-level, wanted byte-level BPE, or one token a character")
        return "chars", True

    if model["type"] != "BPE" or decoder != "ByteLevel":
        raise ValueError(f"it is {model['type']} with decoder {decoder}, wanted byte-level BPE or characters")
    stages = before.get("pretokenizers", [before])
    if not stages or stages[-1].get("type") != "ByteLevel" or stages[-1]["add_prefix_space"]:
        raise ValueError("its pre_tokenizer is not ByteLevel without add_prefix_space, so texts would change")
    if any(stage["type"] != "Split" or stage["behavior"] == "Removed" for stage in stages[:-1]):
        raise ValueError("its pre_tokenizer has more than Split and ByteLevel, so texts may change")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model[name]:
            raise ValueError(f"its model has {name} {model[name]!r}, wanted none")
    lacking = sorted(byte for character, byte in BYTES.items() if character not in vocab)
    if lacking:
        raise ValueError(f"no token stands for byte {lacking[0]} ({len(lacking)} of 256 missing)")
    if not model.get("ignore_merges"):
        made = {"".join(pair) for pair in model["merges"]}
        if unmade := sorted(vocab.keys() - made - BYTES.keys() - {token["content"] for token in added}):
            raise ValueError(f"no merge makes token {unmade[0]!r} (nor {len(unmade) - 1} others)")
    flags = "single_word", "lstrip", "rstrip"
    plain = not any("\n" in token["content"] or any(token[flag] for flag in flags) for token in added)
    if not model["merges"] and plain and len(added) == 1 and {**BYTES, END_OF_TEXT: 256} == vocab:
        return "bytes", True
    return "bpe", plain and len(stages) == 1 and stages[-1]["use_regex"]


def _pieces(parts, size):
    """One text that comes in parts, in pieces of `size` characters or more that GPT-2 encodes on their own.

    A piece ends before a newline that follows no white space: no match of GPT-2's pattern goes from
    anything else into white space, and none looks back.
    """
    rest, searched = "", 0
    for part in parts:
        rest += part
        start = 0
        while len(rest) - start > size:
            cut = rest.find("\n", max(start + size, searched))
            while cut > 0 and rest[cut - 1].isspace():
                cut = rest.find("\n", cut + 1)
            if cut < 0:
                searched = len(rest)
                break
            yield rest[start:cut]
            start, searched = cut, 0
        rest, searched = rest[start:], max(searched - start, 0)
    if rest:
        yield rest


def _words(text):
    """A text to train on, cut where it goes on for LONGEST_WORD characters with or without white space.

    GPT-2's pattern makes one word of a run of letters or of white space, and every merge goes over the word: a page of
    Chinese, or a line of data, would take hours.
    """
    start = 0
    for run in RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def _guarded(function, *arguments):
    """The library's answer; what it raises, bare Exceptions and Rust's panics, as ValueError."""
    try:
        return function(*arguments)
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a panic is no Exception
        raise ValueError(str(error)[:300]) from None


def _text(path):
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no UTF-8 text ({error.reason})") from None


def _json(path, text):
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a JSON {type(values).__name__}, wanted an object")
    return values


def _from_hub(name):
    """The directory of a hub id's tokenizer files, fetched."""
    hint = "pass a directory with tokenizer.json, or with vocab.json and merges.txt"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{name}: no such directory, and huggingface_hub is not installed; {hint}") from None
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # the hub's client raises many kinds; each means that the files did not come
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name}: no such directory, and not from the hub ({cause}); {hint}") from None
