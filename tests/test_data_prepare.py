"""Preparing data: what is read, where it is split, that nothing is half-written, and that damage is found."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import mutations

from fastlm.data import prepare as module
from fastlm.data.loader import Loader
from fastlm.data.prepare import Corpus, load_manifest, prepare
from fastlm.data.shards import ShardWriter, read_split
from fastlm.data.tokenizer import Tokenizer


def tokens_of(out, split):
    return np.concatenate(list(read_split(out, split).values())).tolist()


def text_of(out):
    tokenizer = Tokenizer.load(out)
    return tokenizer.decode(tokens_of(out, "train")), tokenizer.decode(tokens_of(out, "val"))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("first line\nsecond line\r\nund schöne Grüße 😀\n" * 20, encoding="utf-8", newline="")
    return path


def run(*arguments):
    """`fastlm` with these arguments, in a process of its own."""
    command = [sys.executable, "-c", "from fastlm.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=None, timeout=60)


# ---- what is written


@pytest.mark.parametrize("kind, train, val", [
    ("chars", 1003854, 111540), ("bytes", 1003854, 111540), ("gpt2", 301966, 36059),
])
def test_tinyshakespeare_is_split_as_nanogpt_splits_it(data, tmp_path, kind, train, val):
    out, told = tmp_path / "out", []
    tokenizer = data / "gpt2" if kind == "gpt2" else kind
    manifest = prepare([data / "tinyshakespeare.txt"], out, tokenizer=tokenizer,
                       progress=lambda done, total: told.append((done, total)))
    assert (manifest["train_tokens"], manifest["val_tokens"]) == (train, val)
    assert manifest["characters"] == 1115394
    assert manifest["vocab_size"] == {"chars": 65, "bytes": 257, "gpt2": 50257}[kind]
    text = (data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    assert text_of(out) == (text[:1003854], text[1003854:])
    assert told[-1] == (1115394, 1115394) and [done for done, _ in told] == sorted(done for done, _ in told)
    assert load_manifest(out, verify=True) == manifest


@pytest.mark.parametrize("kind", ["bpe", "bytes", "chars"])
def test_the_text_comes_back_to_the_byte(text_file, tmp_path, kind):
    out = tmp_path / "deep" / "out"
    vocab_size = 280 if kind == "bpe" else None
    manifest = prepare([text_file], out, tokenizer=kind, vocab_size=vocab_size, val_fraction=0.25)
    text = text_file.read_bytes().decode()
    cut = int(len(text) * 0.75)
    assert text_of(out) == (text[:cut], text[cut:])
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json", "tokenizer.json", "tokenizer_config.json", "train_000000.bin", "val_000000.bin",
    ]
    assert manifest["files"] == 1 and manifest["tokenizer"] == kind
    assert manifest["vocab_size"] == (280 if kind == "bpe" else Tokenizer.load(out).vocab_size)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"], "something was left beside it"
    Loader(read_split(out, "train"), 16, 2, manifest["vocab_size"]).batch(0)


def test_folders_are_read_in_order_of_path_and_documents_separated(tmp_path):
    folder = tmp_path / "texts"
    for name, content in {
        "b.txt": b"bbbb", "a/z.py": b"zzzz", "a/deep/er.md": b"eeee", "c.bin": b"\x80\x81",
        "d.txt": b"dd\0dd",
        "e.txt": b"", ".hidden": b"hhhh", ".git/config": b"gggg", "utf16.txt": "text".encode("utf-16"),
        "no_suffix": b"nnnnnnnn",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "link").symlink_to(folder)
    (folder / "again.txt").symlink_to(folder / "b.txt")
    manifest = prepare([folder, folder / "b.txt"], tmp_path / "out", tokenizer="bytes", val_fraction=0.25)
    end = "<|endoftext|>"
    assert text_of(tmp_path / "out") == (f"eeee{end}zzzz{end}bbbb{end}nnn", "nnnnn")
    assert (manifest["files"], manifest["skipped_files"], manifest["characters"]) == (4, 4, 20)


def test_characters_have_no_separator(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name * 10)
    prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "out", tokenizer="chars")
    assert text_of(tmp_path / "out") == ("a" * 10 + "b" * 8, "bb")


def test_a_split_between_documents_writes_no_separator(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name * 10)
    prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "out", tokenizer="bytes", val_fraction=0.5)
    assert text_of(tmp_path / "out") == ("a" * 10, "b" * 10)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40),
        min_size=1, max_size=4,
    ),
    st.integers(1, 9), st.integers(0, 9),
)
def test_parts_of_files_join_to_the_whole(tmp_path_factory, contents, part, tenths):
    """A part may end in the middle of a character, and a split anywhere."""
    folder = tmp_path_factory.mktemp("texts")
    for number, content in enumerate(contents):
        (folder / f"{number}.txt").write_bytes(content.encode())
    text = "".join(content.removeprefix("\ufeff") for content in contents)
    if not text:
        with pytest.raises(ValueError, match="no text found"):
            Corpus([folder])
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART", part)
        corpus = Corpus([folder])
        assert corpus.characters == len(text)
        cut = len(text) * tenths // 10
        ends = (0, cut), (cut, len(text))
        halves = [["".join(parts) for parts in corpus.documents(*both)] for both in ends]
    assert "".join(halves[0]) == text[:cut] and "".join(halves[1]) == text[cut:]
    assert "" not in halves[0] + halves[1]


@pytest.mark.parametrize("part", [1, 3, 1 << 20])
def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch, part):
    monkeypatch.setattr(module, "PART", part)
    for name, content in (("a.txt", "\ufeffab\ufeff" * 4), ("b.txt", "\ufeff"), ("c.txt", "cd" * 9)):
        (tmp_path / name).write_text(content, encoding="utf-8")
    manifest = prepare([tmp_path], tmp_path / "out", tokenizer="chars")
    assert "".join(text_of(tmp_path / "out")) == ("\ufeffab\ufeff" * 4)[1:] + "cd" * 9
    assert manifest["characters"] == 33 and manifest["skipped_files"] == 1
    (tmp_path / "d.txt").write_bytes("\ufeffab".encode() + b"\xff")
    with pytest.raises(ValueError, match="at byte 5"):
        Corpus([tmp_path / "d.txt"])
    (tmp_path / "e.txt").write_bytes("ab".encode("utf-16"))
    with pytest.raises(ValueError, match="is no UTF-8 text .it begins with the byte order mark of UTF-16"):
        Corpus([tmp_path / "e.txt"])


def test_large_output_goes_to_several_shards(text_file, tmp_path):
    manifest = prepare([text_file], tmp_path / "out", tokenizer="bytes", shard_tokens=100)
    assert manifest["train_shards"] == -(-manifest["train_tokens"] // 100) > 5
    text = text_file.read_bytes().decode()
    assert "".join(text_of(tmp_path / "out")) == text


def test_a_large_vocabulary_is_written_wide(text_file, tmp_path):
    tokenizer = Tokenizer.chars("".join(map(chr, [*range(0xD800), *range(0xE000, 0x11800), 0x1F600])))
    assert tokenizer.vocab_size == 69633
    prepare([text_file], tmp_path / "out", tokenizer=tokenizer)
    assert all(tokens.dtype == np.uint32 for tokens in read_split(tmp_path / "out", "train").values())
    assert "".join(text_of(tmp_path / "out")) == text_file.read_bytes().decode()


def test_no_validation_split_when_none_is_asked_for(text_file, tmp_path):
    manifest = prepare([text_file], tmp_path / "out", tokenizer="bytes", val_fraction=0)
    assert manifest["val_tokens"] == 0 and load_manifest(tmp_path / "out", verify=True) == manifest
    with pytest.raises(ValueError, match="has no val"):
        read_split(tmp_path / "out", "val")


def test_the_same_text_gives_the_same_bytes(text_file, tmp_path):
    manifests = [prepare([text_file], tmp_path / name, vocab_size=300) for name in "ab"]
    assert manifests[0] == manifests[1]


def test_the_validation_text_does_not_train_the_vocabulary(tmp_path):
    (tmp_path / "a.txt").write_text("abab " * 100 + "xyxy " * 100)
    prepare([tmp_path / "a.txt"], tmp_path / "out", vocab_size=300, val_fraction=0.5)
    vocab = Tokenizer.load(tmp_path / "out").backend.get_vocab()
    assert "abab" in vocab and "xy" not in vocab


# ---- what is refused


@pytest.mark.parametrize("options, message", [
    ({"val_fraction": 1.0}, "val_fraction is 1.0, wanted 0 or more and less than 1"),
    ({"val_fraction": -0.1}, "val_fraction is -0.1"),
    ({"val_fraction": float("nan")}, "val_fraction is nan"),
    ({"tokenizer": "bytes", "vocab_size": 300}, "only a tokenizer that is trained"),
    ({"vocab_size": 12}, "vocab_size is 12, wanted 257"),
    ({"shard_tokens": 0}, "shard_tokens is 0"),
    ({"tokenizer": "no/such/folder"}, "no/such/folder: no such file or directory"),
    ({"tokenizer": Tokenizer.chars("abc")}, "character .* is not among the 3"),
])
def test_wrong_settings_write_nothing(text_file, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepare([text_file], tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_input_without_text_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "binary").write_bytes(b"text\xfftext")
    (tmp_path / "zero").write_bytes(b"text\0text")
    (tmp_path / "one").write_bytes(b"x")
    for paths, message in (
        (["empty"], r"empty: no text found \(1 files are empty or not UTF-8\)"),
        (["none"], "none: no such file or folder"),
        (["binary"], "binary: is no UTF-8 text .invalid start byte at byte 4"),
        (["zero"], "zero: is no UTF-8 text .a zero byte at byte 4"),
        (["one"], "1 characters, too little text to split by val_fraction=0.1"),
        ([], "no path was given: no text found"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare([tmp_path / path for path in paths], tmp_path / "out", tokenizer="bytes")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_the_byte_that_is_no_text_is_found_across_parts(tmp_path, monkeypatch, at):
    monkeypatch.setattr(module, "PART", 4)
    (tmp_path / "a").write_bytes(b"x" * at + "é€😀".encode() * 3 + b"\xff")
    with pytest.raises(ValueError, match=f"at byte {at + 27}"):
        Corpus([tmp_path / "a"])


def test_a_file_that_changes_meanwhile_is_named(text_file, tmp_path):
    corpus = Corpus([text_file])
    for content in ("shorter", "longer" * 1000, b"\xff"):
        text_file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=r"text.txt: had \d+ characters, now \d+; it changed"):
            ["".join(parts) for parts in corpus.documents()]


def test_only_what_was_made_here_is_replaced(text_file, tmp_path):
    out = tmp_path / "out"
    prepare([text_file], out, tokenizer="bytes")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="out: exists; pass --overwrite"):
        prepare([text_file], out, tokenizer="chars")
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="out: holds mine.txt, which was not made by this command"):
        prepare([text_file], out, tokenizer="chars", overwrite=True)
    assert (out / "mine.txt").read_text() == "mine"
    (out / "mine.txt").unlink()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert prepare([text_file], out, tokenizer="chars", overwrite=True)["tokenizer"] == "chars"
    assert load_manifest(out, verify=True)["tokenizer"] == "chars"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]

    for name, content in (("other", "{}"), ("another", '{"format": "x"}'), ("third", "[" * 100_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match="exists and was not made by `fastlm data prepare`"):
            prepare([text_file], tmp_path / name, overwrite=True)
    with pytest.raises(ValueError, match="exists and was not made"):
        prepare([text_file], text_file, overwrite=True)


def test_an_empty_folder_and_a_link_are_filled(text_file, tmp_path):
    (tmp_path / "empty").mkdir()
    prepare([text_file], tmp_path / "empty", tokenizer="bytes")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    prepare([text_file], tmp_path / "link", tokenizer="bytes")
    assert (tmp_path / "link").is_symlink() and load_manifest(tmp_path / "elsewhere")


def test_what_was_prepared_before_is_no_text(text_file, tmp_path):
    """Preparing a folder into itself a second time reads the same text."""
    first = prepare([tmp_path], tmp_path / "out", tokenizer="bytes")
    assert prepare([tmp_path], tmp_path / "out", tokenizer="bytes", overwrite=True) == first


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interruption_leaves_what_was_there(text_file, tmp_path, monkeypatch, error, existing):
    out = tmp_path / "out"
    if existing:
        prepare([text_file], out, tokenizer="chars")
    write = ShardWriter.write

    def interrupted(self, ids):
        write(self, ids)
        if self._name == "val":
            raise error

    monkeypatch.setattr(ShardWriter, "write", interrupted)
    with pytest.raises(RuntimeError if isinstance(error, OSError) else type(error)):
        prepare([text_file], out, tokenizer="bytes", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out"] if existing else []) + ["text.txt"]
    assert not existing or load_manifest(out, verify=True)["tokenizer"] == "chars"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_leaves_nothing_half_made(tmp_path, name):
    number = signal.Signals[name]
    (tmp_path / "text.txt").write_text("".join(f"line {at} of many\n" for at in range(1_000_000)))
    command = [sys.executable, *"-m fastlm.cli data prepare text.txt --tokenizer bytes --out out".split()]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not any(path.name.startswith(".out-") for path in tmp_path.iterdir()):
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(number)
    assert run.wait(timeout=60) == (130 if name == "SIGINT" else 128 + number) and "Traceback" not in run.stderr.read()
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_failed_replacement_puts_the_old_back(text_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare([text_file], out, tokenizer="chars")
    replace = module.os.replace

    def failing(source, target):
        if target == out and "-old" not in str(source):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(module.os, "replace", failing)
    with pytest.raises(RuntimeError, match="Input/output error.*what was there is untouched"):
        prepare([text_file], out, tokenizer="bytes", overwrite=True)
    assert load_manifest(out, verify=True)["tokenizer"] == "chars"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]


# ---- damage


@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin", "tokenizer.json"])
@pytest.mark.parametrize("count", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_damage_to_prepared_data_is_always_found(text_file, tmp_path, name, count):
    prepare([text_file], tmp_path / "out", tokenizer="chars", val_fraction=0.5)
    path = tmp_path / "out" / name
    size = path.stat().st_size
    for content in mutations(path.read_bytes(), count):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load_manifest(tmp_path / "out", verify=True)
        if name == "tokenizer.json" or len(content) != size:
            with pytest.raises(ValueError, match=name):
                load_manifest(tmp_path / "out")


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_damaged_manifest_never_crashes(text_file, tmp_path, count):
    manifest = prepare([text_file], tmp_path / "out", tokenizer="chars")
    path = tmp_path / "out" / "manifest.json"
    for content in mutations(path.read_bytes(), count):
        path.write_bytes(content)
        try:
            found = load_manifest(tmp_path / "out")
        except ValueError as error:
            assert str(tmp_path) in str(error)
        else:
            assert found["train_tokens"] == manifest["train_tokens"]


def test_the_manifest_names_files_in_its_own_folder_only(text_file, tmp_path):
    prepare([text_file], tmp_path / "out", tokenizer="chars")
    path = tmp_path / "out" / "manifest.json"
    for name in ("../text.txt", "/etc/passwd", "a/b", "..", ""):
        values = json.loads(path.read_text())
        values["sha256"][name] = "0"
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / "manifest.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match="is no manifest"):
            load_manifest(other)
    with pytest.raises(ValueError, match="cannot be read"):
        load_manifest(tmp_path / "none")


# ---- the command


def test_the_command_prepares_and_shows_a_table(text_file, tmp_path):
    done = run("data", "prepare", text_file, "--out", tmp_path / "out", "--vocab-size", 280)
    assert done.returncode == 0, done.stderr
    for words in ("files", "characters", "280 (bpe)", "train", "val", "characters per token", "in 1 shard",
                  f"written to {tmp_path / 'out'}\n"):
        assert words in done.stdout
    assert load_manifest(tmp_path / "out", verify=True)["vocab_size"] == 280
    again = run("data", "prepare", text_file, "--out", tmp_path / "out")
    assert again.returncode == 2 and "pass --overwrite" in again.stderr and "Traceback" not in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1


def test_a_wrong_command_is_one_message_and_exit_code_2(tmp_path):
    done = run("data", "prepare", tmp_path / "none", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "none: no such file or folder" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_preparing_imports_no_torch(text_file, tmp_path):
    code = f"""
import sys
from fastlm.data.prepare import prepare
prepare([{str(text_file)!r}], {str(tmp_path / "out")!r}, tokenizer="chars")
print(sorted({{"torch", "transformers", "triton"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))  # as a disk with no room for more
from fastlm.cli import main
sys.argv = ["fastlm", *{arguments!r}]
main()
"""


def limited(most, *arguments):
    """`fastlm` with these arguments, where no file can have more than `most` bytes."""
    code = LIMITED.format(most=most, arguments=[*map(str, arguments)])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("most, file", [(3000, "train_000000.bin"), (1200, "train_000000.bin")])
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_is_told_with_the_file_and_what_to_do(text_file, tmp_path, most, file, existing):
    text_file.write_text(text_file.read_text(encoding="utf-8") * 10, encoding="utf-8")
    if existing:
        prepare([text_file], tmp_path / "out", tokenizer="chars")
    done = limited(most, "data", "prepare", text_file, "--out", tmp_path / "out", "--tokenizer", "bytes", "--overwrite")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "Errno" not in done.stderr, done.stderr
    kept = "what was there is untouched" if existing else "nothing of it was kept"
    for words in (f"{tmp_path / 'out'}: could not be written", f"File too large, {file}", kept,
                  "make room, or pass another --out"):
        assert words in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out"] if existing else []) + ["text.txt"]
    assert not existing or load_manifest(tmp_path / "out", verify=True)["tokenizer"] == "chars"


def test_a_place_that_cannot_be_written_is_told(text_file, tmp_path):
    done = run("data", "prepare", text_file, "--out", text_file / "out")
    assert done.returncode == 2 and "text.txt/out: could not be written (Not a directory" in done.stderr
