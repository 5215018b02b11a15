"""Text as people have it: byte order marks, encodings, newlines, halves of characters."""

import codecs
import json

import pytest

from diffalign.errors import DataError
from diffalign.text_files import (
    caption_fault,
    decode,
    line_at,
    mapped,
    nameable,
    numbered_lines,
    parse_json,
    possible_name,
    read_lines,
    shown,
    split_lines,
    well_formed,
)

TEXT = "a café\r\n一只猫 \U0001f408\n"
MARKED = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
    "gb18030": "\ufeff".encode("gb18030"),
}


@pytest.mark.parametrize("encoding", MARKED)
def test_a_byte_order_mark_says_the_encoding_and_is_no_text(encoding, tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(MARKED[encoding] + TEXT.encode(encoding))
    assert read_lines(file) == ["a café", "一只猫 \U0001f408"]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp1251", "shift_jis", "gbk", "utf-16-le", "utf-32-be"])
def test_an_encoding_that_does_not_declare_itself_is_refused_with_what_to_do(encoding, tmp_path):
    text = {"cp1251": "кот\n", "shift_jis": "赤い円\n", "gbk": "红色的猫\n"}.get(encoding, "a cat\ncafé\n")
    file = tmp_path / "p.txt"
    file.write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=r"p\.txt.*(not UTF-8 text|NUL bytes).*iconv"):
        read_lines(file)


def test_the_line_of_what_is_not_utf8_is_named():
    with pytest.raises(DataError, match=r"x\.txt, line 2, is not UTF-8 text \(byte 0xe9\)"):
        decode(b"a\nb\xe9\nc", "x.txt")


@pytest.mark.parametrize("mark", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_only_newlines_split_lines(mark):
    line = f"a red{mark}circle"
    assert split_lines(f"{line}\r\n{line}\r{line}\n\nb") == [line, line, line, "", "b"]
    assert len(line.splitlines()) == 2  # the trap


def test_a_file_that_was_appended_to_another_brings_no_mark_along():
    assert split_lines("\ufeffa\n\ufeffb\n") == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("a cat \ud83d", "a cat \ufffd"),
        ("\udc08 a cat", "\ufffd a cat"),
        ("\ud83d\udc08", "\U0001f408"),  # both halves
        ("caf\udce9", "caf\ufffd"),  # a byte of a command line
        ("plain \U0001f408", "plain \U0001f408"),
    ],
)
def test_halves_of_characters_are_replaced(text, whole):
    assert well_formed(text) == whole
    well_formed(text).encode()


def test_names_that_are_no_text_can_be_shown():
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    assert [nameable(name), nameable("café.png")] == [False, True]
    assert [shown(name), shown("café.png")] == ["caf\\xe9.png", "café.png"]
    assert shown("\ud83d.png") == "\\ud83d.png"  # from JSON: no file has this name


def test_names_that_no_file_can_have():
    assert [possible_name(name) for name in ("a.png", "caf\udce9.png", "\ud83d.png", "a\0.png")] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("value", [None, float("nan"), "", " \n", "\u3000"])
def test_empty_captions(value):
    assert caption_fault(value)[0] == "empty caption"


@pytest.mark.parametrize("value", [["a", "b"], [], {"a": 1}, 3, 0.5, True, b"caf\xe9"])
def test_captions_that_are_no_text(value):
    reason, detail = caption_fault(value)
    assert reason == "caption type"
    assert detail.endswith(f"({type(value).__name__}), expected text")


@pytest.mark.parametrize("value", ["null", "NA", "007", "nan", "a\u2028b"])
def test_captions(value):
    assert caption_fault(value) is None


@pytest.mark.parametrize("encoding", MARKED)
def test_json_lines_of_any_declared_encoding(encoding, tmp_path):
    records = [{"prompt": "一只\u2028猫"}, {"prompt": "b"}]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\r\n\n" for record in records)
    file = tmp_path / "p.jsonl"
    file.write_bytes(MARKED[encoding] + text.encode(encoding))
    content = mapped(file)
    found = list(numbered_lines(content))
    assert [(number, parse_json(line)) for number, _, line in found] == [(1, records[0]), (3, records[1])]
    assert all(line_at(content, start) == line for _, start, line in found)


def test_what_is_no_json_is_a_value_error_that_says_why(tmp_path):
    for text, why in ((b'{"a": "caf\xe9"}', "cp1252"), (b"[" * 100_000, "nested"), (b'{"a": ', "Expecting")):
        with pytest.raises(ValueError, match=why):
            parse_json(text)
    (tmp_path / "u.jsonl").write_bytes('{"a": 1}\n'.encode("utf-16-le"))
    with pytest.raises(DataError, match="NUL bytes"):
        mapped(tmp_path / "u.jsonl")
    (tmp_path / "e.jsonl").write_bytes(b"")
    assert list(numbered_lines(mapped(tmp_path / "e.jsonl"))) == []
