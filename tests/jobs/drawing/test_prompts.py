"""Lists of prompts in every kind of file."""

import json

import pytest

from diffalign.errors import DataError
from diffalign.evaluation.fonts import fitting_font, missing_glyphs
from diffalign.jobs.drawing.generate import read_request
from diffalign.jobs.drawing.prompts import is_prompt_file, read_prompts

TEXTS = ["null", "NA", "None", "007", "1.50", "a\u2028b\x0bc\x85d"]


@pytest.mark.parametrize("name", ["p.txt", "P.TXT", "p.csv", "P.CSV", "p.tsv", "p.json", "p.jsonl", "p.ndjson"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_prompts_are_what_is_written(name, encoding, newline, tmp_path):
    kind = name.lower().rpartition(".")[2]
    lines = {"txt": TEXTS, "json": [json.dumps(TEXTS)], "csv": ["Prompt", *TEXTS], "tsv": ["caption", *TEXTS]}.get(
        kind, [json.dumps({"prompt": text}, ensure_ascii=False) for text in TEXTS]
    )
    (tmp_path / name).write_bytes((newline.join(lines) + newline).encode(encoding))
    assert is_prompt_file(str(tmp_path / name))
    assert read_prompts(tmp_path / name) == TEXTS


def test_prompts_cut_within_an_emoji_survive(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat \\ud83d"}\n{"prompt": "\\ud83d\\udc08"}\n')
    (tmp_path / "p.json").write_text('["a cat \\ud83d", "\\ud83d\\udc08"]')
    for name in ("p.jsonl", "p.json"):
        assert read_prompts(tmp_path / name) == ["a cat \ufffd", "\U0001f408"]


@pytest.mark.parametrize("value", [["a"], 7, 1.5, True])
def test_what_is_no_text_is_no_prompt(value, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": value}))
    with pytest.raises(DataError, match=r"p\.jsonl.*row 1.*the prompt is .*expected text"):
        read_prompts(tmp_path / "p.jsonl")


def test_a_code_page_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "p.txt").write_bytes("a cat\ncafé\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"p\.txt, line 2, is not UTF-8 text \(byte 0xe9\).*iconv -f cp1252"):
        read_prompts(tmp_path / "p.txt")


def test_bytes_of_a_command_line_that_are_no_text_do_not_stop_it():
    assert read_request(None, ["caf\udce9"], "0")[0] == ["caf\ufffd"]


def test_grids_say_which_characters_their_font_lacks():
    assert missing_glyphs(None, ["a red circle, café", "\u041a\u0440\u0443\u0433 \u2192", "a\u200bb\n"]) == ""
    assert fitting_font(None, ["a red circle"]) is None
    beyond = "\U000e0041\ufdd0"  # a tag, which is not drawn, and no character: no font has it
    assert "DejaVu Sans lacks 1 characters of the prompts (\ufdd0)" in missing_glyphs(None, [beyond])
