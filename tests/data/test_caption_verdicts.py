"""What a caption is, is judged when a source is opened, by one rule: JSON lines, parquet, Arrow, tar and the hub."""

import io
import json
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data import open_pairs
from diffalign.data.hub import StreamingPairs
from diffalign.data.rejects import Rejects
from diffalign.errors import DataError
from tests.data.world import picture

PICTURES = [picture(0), picture(1)]
CELLS = {
    "list": (["a", "b"], "caption type"),
    "number": (3, "caption type"),
    "float": (0.5, "caption type"),
    "truth": (True, "caption type"),
    "nothing": (None, "empty caption"),
    "not a number": (float("nan"), "empty caption"),
    "blank": (" \n", "empty caption"),
}


def write(kind, folder, cell):
    """Write one pair with this caption and return what opens it."""
    columns = {"jpg_0": PICTURES[:1], "jpg_1": PICTURES[1:], "caption": [cell], "label_0": [1.0]}
    if kind == "parquet":
        pq.write_table(pa.table(columns), folder / "p.parquet")
        return str(folder / "p.parquet")
    if kind in ("hub", "stream"):
        return datasets.Dataset(pa.table(columns))
    for number, content in enumerate(PICTURES):
        (folder / f"{number}.png").write_bytes(content)
    record = {"caption": cell, "image_0": "0.png", "image_1": "1.png", "label_0": 1}
    if kind in ("jsonl", "json"):
        (folder / f"p.{kind}").write_text(json.dumps([record] if kind == "json" else record) + "\n")
        return str(folder / f"p.{kind}")
    said = json.dumps({"caption": cell, "label_0": 1}).encode()
    with tarfile.open(folder / "p.tar", "w") as tar:
        for name, content in (("0.jpg_0.png", PICTURES[0]), ("0.jpg_1.png", PICTURES[1]), ("0.json", said)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return str(folder / "p.tar")


def opened(kind, source, **how):
    """Open it and, if it is a stream, read it."""
    if kind != "stream":
        return open_pairs(source, **how)
    rejects = Rejects(how.get("on_error", "raise"))
    stream = StreamingPairs(source.to_iterable_dataset(), describe=lambda memo: {}, rejects=rejects)
    list(stream)
    return stream


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "tar", "hub", "stream"])
@pytest.mark.parametrize("name", CELLS)
def test_one_verdict_for_all_sources(kind, name, tmp_path):
    cell, reason = CELLS[name]
    source = write(kind, tmp_path, cell)
    detail = rf"the caption is .* \({type(cell).__name__}\), expected text" if "type" in reason else "the caption is "
    with pytest.raises(DataError, match=detail):
        opened(kind, source)
    with pytest.raises(DataError, match=rf"no usable pair.*1 skipped \({reason}\)"):
        opened(kind, source, on_error="skip")


@pytest.mark.parametrize("kind", ["jsonl", "json", "tar"])
def test_half_an_emoji_is_replaced(kind, tmp_path):
    pair = opened(kind, write(kind, tmp_path, "a cat \ud83d"))[0]
    assert pair.prompt == "a cat \ufffd"
    assert pair.example_id > 0


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_lines_of_any_declared_encoding_are_read_at_random(encoding, tmp_path):
    for number, content in enumerate(PICTURES):
        (tmp_path / f"{number}.png").write_bytes(content)
    lines = [{"prompt": f"caf\xe9\u2028 {i}", "chosen": "0.png", "rejected": "1.png"} for i in range(3)]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "p.JSONL").write_bytes(text.encode(encoding))
    source = open_pairs(str(tmp_path / "p.JSONL"))
    assert [source[i].prompt for i in (2, 0, 1)] == [lines[i]["prompt"] for i in (2, 0, 1)]


def test_captions_of_two_folders_may_be_utf16(tmp_path):
    for side, content in zip("wl", PICTURES, strict=True):
        (tmp_path / side).mkdir()
        (tmp_path / side / "0.png").write_bytes(content)
    (tmp_path / "w" / "0.txt").write_bytes("caf\xe9\r\n".encode("utf-16"))
    assert open_pairs(str(tmp_path))[0].prompt == "caf\xe9"
    (tmp_path / "captions.json").write_bytes(json.dumps({"0": ["a"]}).encode("utf-8-sig"))
    with pytest.raises(DataError, match=r"the caption is \['a'\] \(list\), expected text"):
        open_pairs(str(tmp_path))


def test_pairs_whose_names_are_not_utf8_are_read_and_remembered(tmp_path):
    for side, content in zip((b"w", b"l"), PICTURES, strict=True):
        (tmp_path / side.decode()).mkdir()
        with open(bytes(tmp_path) + b"/" + side + b"/caf\xe9.png", "wb") as file:
            file.write(content)
    with open(bytes(tmp_path) + b"/w/caf\xe9.txt", "w") as file:
        file.write("a cat")
    source = open_pairs(str(tmp_path))
    assert source[0].prompt == "a cat"
    json.dumps(source.identify(tmp_path / "memo.sqlite"))


def test_text_of_a_parquet_that_is_not_utf8_is_a_fault_of_its_row(tmp_path):
    texts = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\3\0\0\0\7\0\0\0"), pa.py_buffer(b"catcaf\xe9"))
    columns = {"jpg_0": PICTURES, "jpg_1": PICTURES[::-1], "caption": texts, "label_0": [1.0, 1.0]}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    source = open_pairs(str(tmp_path / "p.parquet"), on_error="skip")
    assert [row.prompt for row in source] == ["cat"]
    assert source.counts.skipped == {"caption type": 1}
    assert list(source.captions()) == ["cat"]


def test_categories_are_captions(tmp_path):
    captions = pa.array(["a", "b"]).dictionary_encode()
    columns = {"jpg_0": PICTURES, "jpg_1": PICTURES[::-1], "caption": captions, "label_0": [1.0, 1.0]}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    assert [row.prompt for row in open_pairs(str(tmp_path / "p.parquet"))] == ["a", "b"]
