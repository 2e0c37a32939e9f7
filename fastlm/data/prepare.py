"""Text files and folders to a directory of token shards with their tokenizer and a manifest.

    OUT/train_000000.bin ... val_000000.bin ...   tokens, in llm.c's format
    OUT/tokenizer.json, tokenizer_config.json     what made them
    OUT/manifest.json                             counts, the sha256 of every file, and what it was made of

Text is read in parts, twice: once to count characters, once to tokenise; only a text that cannot be divided
(a vocabulary that is not GPT-2's kind) is held whole.
"""

import codecs
import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path

from fastlm.data.disk import advice, cause, naming
from fastlm.data.fingerprint import KINDS, VOCAB_SIZE, fingerprint
from fastlm.data.shards import SHARD_TOKENS, ShardWriter, read_shard
from fastlm.data.text import MARK, reason
from fastlm.data.tokenizer import Tokenizer

MANIFEST = "manifest.json"
FORMAT = "fastlm data"
OURS = re.compile(r"tokenizer(_config)?\.json|(train|val)_\d{6,}\.bin")
PART = 1 << 20  # bytes read at a time


class Corpus:
    """The text files of `paths`, files or folders of them, in order of path.

    In folders every file that is UTF-8 text without a zero byte counts, at any depth; others are skipped,
    and so are empty and hidden ones and what lies under `leave_out`. `files` maps each to its number of
    characters, `characters` is their sum, `skipped` a number of files, `sha256` that of the text. Raises
    ValueError for a path that does not exist, a file named in `paths` that is no text, and where no text is
    found.
    """

    def __init__(self, paths, *, leave_out=None):
        self.files, self.skipped, seen, whole = {}, 0, set(), hashlib.sha256()
        for path in map(Path, paths):
            if not path.exists():
                raise ValueError(f"{path}: no such file or folder; pass text files or folders of them")
            if path.is_dir():
                files = _below(path, leave_out)
            elif path.is_file():
                files = [path]
            else:
                raise ValueError(f"{path}: is neither file nor folder; pass text files or folders of them")
            for file in files:
                if (real := file.resolve()) in seen:
                    continue
                seen.add(real)
                count, digest = 0, hashlib.sha256()
                try:
                    for part in _parts(file):
                        count += len(part)
                        digest.update(part.encode())
                except UnicodeDecodeError as error:
                    if file == path:
                        with open(file, "rb") as source:
                            why = reason(error, source.read(2))
                        raise ValueError(f"{file}: is no UTF-8 text ({why}); pass text files") from None
                    count = 0
                if count:
                    self.files[file] = count
                    whole.update(digest.digest())
                else:
                    self.skipped += 1
        self.characters, self.sha256 = sum(self.files.values()), whole.hexdigest()
        if not self.files:
            named = ", ".join(map(str, paths)) or "no path was given"
            skipped = f"{self.skipped} files are empty or not UTF-8"
            raise ValueError(f"{named}: no text found ({skipped}); pass text files or folders of them")

    def documents(self, first=0, last=None):
        """Yields, for every file of characters `first` up to `last` of all, an iterator of their parts."""
        last = self.characters if last is None else last
        for file, count in self.files.items():
            if first < count and last > 0:
                yield _slice(file, count, max(first, 0), min(last, count))
            first, last = first - count, last - count


def prepare(
    paths, out, *, tokenizer="bpe", vocab_size=None, val_fraction=0.1, overwrite=False, progress=None,
    shard_tokens=SHARD_TOKENS,
):
    """Writes OUT/train_*.bin, val_*.bin, the tokenizer's files and manifest.json; returns the manifest.

    tokenizer: "bpe" (byte-level, trained on the training text, `vocab_size` tokens, 8192 unless given),
    "bytes", "chars" (of the whole text), a directory, tokenizer.json or hub id, or a Tokenizer. The last
    `val_fraction` of all characters is val, and a document on the border is cut. Where the vocabulary has
    an end of text, it separates the documents of a split. OUT appears complete or not at all; one that
    exists is replaced only with `overwrite`, and only if it holds nothing but what was made here.
    progress(done, total) is told of characters. Raises ValueError, and RuntimeError where OUT cannot be
    written (a full disk); what was there is untouched then.
    """
    out = Path(out)
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, wanted 0 or more and less than 1")
    if vocab_size is not None and tokenizer != "bpe":
        raise ValueError(f"vocab_size is {vocab_size}, but only a tokenizer that is trained (bpe) takes one")
    _check_replaceable(out, overwrite)
    corpus = Corpus(paths, leave_out=out)
    cut = int(corpus.characters * (1 - val_fraction))
    if not cut or (val_fraction and cut == corpus.characters):
        raise ValueError(
            f"{', '.join(map(str, paths))}: {corpus.characters} characters, too little text to split by "
            f"val_fraction={val_fraction}; add text"
        )
    trained = tokenizer == "bpe"
    advance = _advance(progress, corpus.characters + (cut if trained else 0))
    vocabulary = _make_tokenizer(tokenizer, corpus, cut, vocab_size, advance)

    place = out.resolve()  # a link stays, what it names is replaced
    staging = place.parent / f".{place.name}-{secrets.token_hex(4)}"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        manifest = {
            "format": FORMAT, "version": 1,
            "tokenizer": vocabulary.kind if isinstance(tokenizer, Tokenizer) else str(tokenizer),
            "vocab_size": vocabulary.vocab_size, "end_of_text": vocabulary.end_of_text,
            "files": len(corpus.files), "skipped_files": corpus.skipped, "characters": corpus.characters,
            "train_characters": cut, "val_characters": corpus.characters - cut, "val_fraction": val_fraction,
            "fingerprint": fingerprint(corpus, tokenizer if tokenizer in KINDS else vocabulary, vocab_size,
                                       val_fraction),
        }
        for split, first, last in (("train", 0, cut), ("val", cut, corpus.characters)):
            with ShardWriter(staging, split, vocabulary.vocab_size, shard_tokens=shard_tokens) as writer:
                for number, document in enumerate(corpus.documents(first, last)):
                    if number and vocabulary.end_of_text is not None:
                        writer.write([vocabulary.end_of_text])
                    for ids in vocabulary.encode_stream(document, progress=advance):
                        writer.write(ids)
            manifest |= {f"{split}_tokens": writer.tokens, f"{split}_shards": len(writer.paths)}
        vocabulary.save(staging)
        manifest["sha256"] = {file.name: _sha256(file) for file in sorted(staging.iterdir())}
        _write_manifest(staging, manifest)
        _put(staging, place)
    except OSError as error:
        kept = "what was there is untouched" if place.exists() else "nothing of it was kept"
        raise RuntimeError(
            f"{out}: could not be written ({cause(error)}); {kept}; {advice(error, 'pass another --out')}"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def load_manifest(directory, *, verify=False):
    """The manifest of a prepared directory; ValueError where it, or one of its files, is missing or damaged.

    The tokenizer's files are compared with their sha256 and the shards with their size; `verify` compares
    every byte.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); prepare the data again") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no valid JSON ({error}); prepare the data again") from None
    ours = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    hashes = manifest.get("sha256") if ours else None
    if not isinstance(hashes, dict) or not all(map(OURS.fullmatch, hashes)):
        raise ValueError(f"{path}: is no manifest of `fastlm data prepare`; prepare the data again")
    for split in ("train", "val"):
        names = [name for name in hashes if name.startswith(f"{split}_")]
        tokens = sum(len(read_shard(path.parent / name)) for name in names)
        if tokens != (wanted := manifest.get(f"{split}_tokens")):
            raise ValueError(
                f"{path}: counts {wanted} {split} tokens, but the shards that it names have {tokens}; "
                "prepare the data again"
            )
    for name, wanted in hashes.items():
        if (verify or not name.endswith(".bin")) and (found := _sha256(path.parent / name)) != wanted:
            raise ValueError(
                f"{path.parent / name}: has sha256 {found[:12]}…, but {MANIFEST} has {str(wanted)[:12]}…; "
                "it was changed or damaged; prepare the data again"
            )
    return manifest


def _make_tokenizer(kind, corpus, cut, vocab_size, advance):
    if isinstance(kind, Tokenizer):
        return kind
    if kind == "chars":
        alphabet = set()
        for document in corpus.documents():
            alphabet.update(*document)
        return Tokenizer.chars("".join(alphabet))
    if kind == "bytes":
        return Tokenizer.bytes()
    if kind == "bpe":
        documents = (_told(document, advance) for document in corpus.documents(0, cut))
        return Tokenizer.train_bpe(documents, VOCAB_SIZE if vocab_size is None else vocab_size)
    return Tokenizer.load(kind)


def _told(parts, advance):
    """The parts of a document, each told of behind it."""
    for part in parts:
        yield part
        advance(len(part))


def _advance(progress, total):
    """A function of characters that calls progress(done so far, total)."""
    done = 0

    def advance(characters):
        nonlocal done
        done += characters
        if progress:
            progress(done, total)

    return advance


def _below(folder, leave_out):
    """The files of a folder at any depth, in order of path, without hidden ones."""
    leave_out = leave_out and leave_out.resolve()

    def refuse(error):
        raise ValueError(f"{error.filename}: cannot be read ({error.strerror})") from None

    files = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        root = Path(root)
        folders[:] = [name for name in folders if name[0] != "." and (root / name).resolve() != leave_out]
        files += [root / name for name in names if name[0] != "." and (root / name).is_file()]
    return sorted(files)


def _parts(file):
    """The text of a file in parts, without a byte order mark; UnicodeDecodeError where it is no UTF-8 text."""
    decoder, at, begun = codecs.getincrementaldecoder("utf-8")(), 0, False
    try:
        with open(file, "rb") as source:
            while True:
                data = source.read(PART)
                if (zero := data.find(0)) >= 0:
                    raise UnicodeDecodeError("utf-8", data, zero, zero + 1, "a zero byte")
                pending = len(decoder.getstate()[0])
                if text := decoder.decode(data, final=not data):
                    text, begun = text if begun else text.removeprefix(MARK), True
                    if text:
                        yield text
                if not data:
                    return
                at += len(data)
    except UnicodeDecodeError as error:
        start = at + error.start - (0 if error.reason == "a zero byte" else pending)
        raise UnicodeDecodeError("utf-8", b"", start, start + 1, error.reason) from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None


def _slice(file, count, first, last):
    """Characters `first` to `last` of a file of `count`, in parts."""
    at = 0
    with contextlib.suppress(UnicodeDecodeError):  # then the count is another too
        for part in _parts(file):
            if piece := part[max(first - at, 0) : max(last - at, 0)]:
                yield piece
            at += len(part)
    if at != count:
        raise ValueError(f"{file}: had {count} characters, now {at}; it changed meanwhile, prepare it again")


def _check_replaceable(out, overwrite):
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = json.loads((out / MANIFEST).read_bytes())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise ValueError(f"{out}: exists and was not made by `fastlm data prepare`; pass another --out")
    if foreign := sorted(name for name in os.listdir(out) if name != MANIFEST and not OURS.fullmatch(name)):
        raise ValueError(f"{out}: holds {foreign[0]}, which was not made by this command; pass another --out")
    if not overwrite:
        raise ValueError(f"{out}: exists; pass --overwrite to replace it, or another --out")


def _write_manifest(directory, manifest):
    with naming(directory / MANIFEST), open(directory / MANIFEST, "w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    _sync(directory)


def _put(staging, out):
    """Renames `staging` to `out`; what was there goes only when the new one stands."""
    if not out.exists():
        os.replace(staging, out)
    else:
        old = staging.with_name(f"{staging.name}-old")
        os.replace(out, old)
        try:
            os.replace(staging, out)
        except OSError:
            os.replace(old, out)
            raise
        shutil.rmtree(old)
    _sync(out.parent)


def _sync(directory):
    """Makes a directory's names survive a crash of the machine."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(file):
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as source:
            while block := source.read(PART):
                digest.update(block)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); prepare the data again") from None
    return digest.hexdigest()
