"""Text as people have it: decoded as it says itself, split at newlines only, and never a reason for a traceback.

UTF-8 is expected. A byte order mark says otherwise (UTF-16, UTF-32, GB18030) and never becomes part of the text. A code
page such as cp1252 does not say what it is, and guessing would turn letters into others: such a file is refused.
"""

import codecs
import io
import json
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffalign.errors import DataError

# Longer marks first: that of UTF-32 begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (b"\x84\x31\x95\x33", "gb18030"),
)
MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"
NEWLINE = re.compile("\r\n|\n|\r")
SAVE_AS = "save it as UTF-8, e.g. iconv -f cp1252 -t utf-8 FILE"
_LONE = re.compile("[\ud800-\udfff]")
MOST_CHARACTERS = 100_000  # of a caption; encoders read a few hundred
_SHOWN = 80  # characters of a value in a message


def decode(content: bytes, name: str) -> str:
    """Return the text that bytes hold, without its byte order mark.

    Args:
        content: the bytes of a whole file.
        name: what to call it in messages.

    Raises:
        DataError: not UTF-8, and no byte order mark says what else it is.
    """
    mark, encoding = _declared(content)
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}, line {line}, {_undecodable(error)}.") from error
    if "\0" in text:
        raise DataError(
            f"{name} holds NUL bytes: it is no text, or UTF-16 without a byte order mark. If it is text, {SAVE_AS}."
        )
    return text


def read_text(file: Path) -> str:
    """Return the text in a file; raise DataError as `decode`, OSError where it cannot be read."""
    return decode(file.read_bytes(), str(file))


def split_lines(text: str) -> list[str]:
    r"""Return the lines of a text, split at \n, \r\n and \r.

    str.splitlines also splits at form feeds, at U+0085 and at U+2028, which stand in prompts that were copied from web
    pages. A byte order mark in front of a line is that of a file which was appended to another.
    """
    lines = NEWLINE.split(text)
    return [line.removeprefix(MARK) for line in (lines if lines[-1] else lines[:-1])]


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file; see `read_text`."""
    return split_lines(read_text(file))


def mapped(file: Path) -> mmap.mmap | bytes:
    """Return a file of JSON lines as UTF-8: mapped into memory, or converted where a mark declares another encoding.

    Raises:
        DataError: UTF-16 without a byte order mark, or a declared encoding that is not kept to.
    """
    with open(file, "rb") as opened:
        head = opened.read(4)
        if not head:
            return b""
        if _declared(head)[1] != "utf-8" or b"\0" in head:
            return decode(head + opened.read(), str(file)).encode("utf-8", "replace")
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def line_at(content: mmap.mmap | bytes, start: int) -> bytes:
    """Return the line of `mapped` content that begins at a byte, with its newline if it has one."""
    end = content.find(b"\n", start)
    return content[start : len(content) if end < 0 else end + 1]


def numbered_lines(content: mmap.mmap | bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield number (from 1), position in bytes, and content of the lines of `mapped` content, but for blank ones."""
    start = number = 0
    while start < len(content):
        line, number = line_at(content, start), number + 1
        if line.strip():
            yield number, start, line
        start += len(line)


def parse_json(text: bytes | str) -> Any:
    """Return what JSON says, a byte order mark in front of it passed over; raise ValueError that says why it does not.

    Numbers that no JSON knows (NaN) are read, as Python writes them.
    """
    try:
        return json.loads(text.removeprefix(MARK) if isinstance(text, str) else text)
    except UnicodeDecodeError as error:
        raise ValueError(_undecodable(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def well_formed(text: str) -> str:
    r"""Return a text that can be encoded: halves of characters become U+FFFD, as Unicode says of ill-formed text.

    They come from JSON that was cut within an emoji ("\ud83d"), and from bytes of a command line that are not UTF-8.
    """
    if _LONE.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def nameable(file: str | os.PathLike) -> bool:
    """Tell whether the name of a file is text; tables, JSON and web pages can hold no other."""
    return _LONE.search(os.fspath(file)) is None


def possible_name(file: str | os.PathLike) -> bool:
    """Tell whether a file can be called so."""
    try:
        return b"\0" not in os.fsencode(file)
    except UnicodeEncodeError:
        return False


def shown(name: str | os.PathLike) -> str:
    r"""Return a file name for people: its bytes that are not UTF-8 are written \xff."""
    name = os.fspath(name)
    try:
        return name if nameable(name) else os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # no file can have this name
        return name.encode("utf-8", "backslashreplace").decode()


def caption_fault(value: Any, what: str = "caption") -> tuple[str, str] | None:
    """Return why the value of a cell is no caption, a short reason and a detail, or None: one verdict for all sources.

    Empty are None, NaN and blank text. Numbers and lists are no text: whoever reads them says which is meant. Text as
    long as a book is none that a picture shows.
    """
    if value is None or (isinstance(value, float) and value != value) or (isinstance(value, str) and not value.strip()):
        return f"empty {what}", f"the {what} is {value!r}"
    if isinstance(value, str):
        if len(value) <= MOST_CHARACTERS:
            return None
        return f"{what} length", f"the {what} has {len(value)} characters, more than {MOST_CHARACTERS}"
    text = repr(value)
    text = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
    return f"{what} type", f"the {what} is {text} ({type(value).__name__}), expected text"


def text_stream(text: str) -> io.StringIO:
    """Return a text for csv, which splits it at newlines itself."""
    return io.StringIO(text, newline="")


def _declared(content: bytes) -> tuple[bytes, str]:
    """Return the byte order mark and the encoding that it declares; b"" and UTF-8 where there is none."""
    return next(((mark, name) for mark, name in MARKS if content.startswith(mark)), (b"", "utf-8"))


def _undecodable(error: UnicodeDecodeError) -> str:
    encoding = error.encoding.upper()
    byte = error.object[error.start]
    return f"is not {encoding} text (byte 0x{byte:02x}). If it is in a code page such as cp1252, {SAVE_AS}"
