"""Text as people's editors save it: UTF-8, perhaps behind a byte order mark, which is no text."""

from pathlib import Path

MARK = "\ufeff"
UTF16 = b"\xff\xfe", b"\xfe\xff"


def decode(data):
    """The text of bytes in UTF-8; UnicodeDecodeError where they are none, with a reason for those of UTF-16."""
    try:
        return data.decode("utf-8").removeprefix(MARK)
    except UnicodeDecodeError as error:
        error.reason = reason(error, data[:2])
        raise


def read(path):
    """The text of a file, its lines ending in newlines alone; OSError or UnicodeDecodeError."""
    return decode(Path(path).read_bytes()).replace("\r\n", "\n").replace("\r", "\n")


def reason(error, begins):
    """Why a file whose first bytes are `begins` is no UTF-8 text."""
    if begins in UTF16:
        return "it begins with the byte order mark of UTF-16; convert it: iconv -f UTF-16 -t UTF-8"
    return f"{error.reason} at byte {error.start}"
