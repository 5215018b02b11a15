"""Folders, tar shards, parquet and JSON lines say the same about the same pictures."""

import io
import json
import tarfile

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from diffalign.errors import DataError
from diffalign.jobs.scoring import score
from diffalign.jobs.scoring.places import expand_braces, open_places
from tests.jobs.material import PROMPTS, png

PICTURES = [png(40 + 60 * i, i) for i in range(4)]
TEXTS = [PROMPTS[i % 2] for i in range(4)]
QUIET = Console(quiet=True)


def write_tar(file, samples, mode="w"):
    """Write (name, bytes) members."""
    with tarfile.open(file, mode) as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


@pytest.fixture
def layouts(tmp_path):
    """Return the places of the same four pictures in every layout."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, content in enumerate(PICTURES):
        (folder / f"{i}.png").write_bytes(content)
    lines = [{"file_name": f"pictures/{i}.png", "text": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    pd.DataFrame({"jpg": PICTURES, "prompt": TEXTS}).to_parquet(tmp_path / "bytes.parquet", row_group_size=3)
    nested = [{"bytes": content, "path": "x.png"} for content in PICTURES]
    pd.DataFrame({"image": nested, "caption": TEXTS}).to_parquet(tmp_path / "nested.parquet")
    for shard in (0, 1):
        first, second = 2 * shard, 2 * shard + 1
        samples = [
            (f"a/{first}.png", PICTURES[first]),
            (f"a/{first}.txt", TEXTS[first].encode()),
            (f"a/{second}.seg.json", json.dumps({"caption": TEXTS[second]}).encode()),
            (f"a/{second}.png", PICTURES[second]),
        ]
        write_tar(tmp_path / f"shard-{shard:03d}.tar", samples)
    return tmp_path


def test_every_layout_gives_the_scores_of_the_files(layouts, scorer_folders):
    judge = [f"pickscore={scorer_folders['pickscore']}"]
    (layouts / "prompts.txt").write_text("\n".join(TEXTS))
    given = {"prompts_file": layouts / "prompts.txt", "console": QUIET}
    expected = score.score_images([str(layouts / "pictures")], layouts / "0.csv", judge, **given)
    assert expected["score"].nunique() == 4
    others = ["list.jsonl", "bytes.parquet", "nested.parquet", "shard-{000..001}.tar", "shard-*.tar"]
    for number, place in enumerate(others, 1):
        found = score.score_images([str(layouts / place)], layouts / f"{number}.csv", judge, console=QUIET)
        assert found["score"].tolist() == pytest.approx(expected["score"].tolist(), abs=1e-5), place
        assert found["image"].tolist() == expected["image"].tolist()
        assert found["prompt"].tolist() == TEXTS


def test_positions_are_the_same_whoever_asks(layouts):
    places = [str(layouts / name) for name in ("shard-000.tar", "bytes.parquet", "list.jsonl")]
    source = open_places(places)
    every = list(source.items(0, len(source)))
    assert [item.position for item in every] == list(range(10))
    assert source.table()["file"].tolist() == [item.name for item in every]
    assert source.table()["prompt"].tolist() == [item.prompt for item in every]
    assert [item for cut in ((0, 1), (1, 7), (7, 10)) for item in source.items(*cut)] == every


def test_a_prompt_of_the_command_line_replaces_captions(layouts):
    source = open_places([str(layouts / "bytes.parquet")], prompt="a flag")
    assert {item.prompt for item in source.items(0, 4)} == {"a flag"}
    source = open_places([str(layouts / "pictures")], with_prompts=False)
    assert source.table()["prompt"].tolist() == [""] * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s-{008..010}.tar", ["s-008.tar", "s-009.tar", "s-010.tar"]),
        ("{a,b}-{0..1}.tar", ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]),
        ("plain{x}.tar", ["plain{x}.tar"]),
    ],
)
def test_braces_are_those_of_a_shell(text, expected):
    assert expand_braces(text) == expected


def test_what_cannot_be_read_is_a_fault_of_its_picture_alone(tmp_path):
    rows = {"image": [PICTURES[0], None, PICTURES[2]], "caption": [TEXTS[0], TEXTS[1], ""]}
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    faults = [item.fault for item in open_places([str(tmp_path / "rows.parquet")]).items(0, 3)]
    assert faults == [None, "an image is None, expected its bytes or a path", "it has no caption"]
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "text": "x"}\nnot json\n{"image": 3, "text": "x"}\n')
    faults = [item.fault for item in open_places([str(tmp_path / "rows.jsonl")]).items(0, 3)]
    assert faults[0] is None
    assert all(faults[1:])


def test_a_shard_that_breaks_off_loses_its_last_picture(tmp_path, scorer_folders):
    samples = [(f"{i}.{kind}", c) for i in range(2) for kind, c in (("txt", b"a red circle"), ("png", PICTURES[i]))]
    whole = write_tar(tmp_path / "whole.tar", samples).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.rindex(b"IDAT") + 40])
    judge = [f"pickscore={scorer_folders['pickscore']}"]
    table = score.score_images([str(tmp_path / "cut.tar")], tmp_path / "s.parquet", judge, console=QUIET)
    assert table["file"].str.endswith("cut.tar:0.png").tolist() == [True]
    [line] = (tmp_path / "s.broken.jsonl").read_text().splitlines()
    assert "ends in the middle" in json.loads(line)["reason"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: write_tar(f / "x.tar", [("a.png", PICTURES[0])], "w:gz"), "as a tar shard.*gunzip"),
        (lambda f: write_tar(f / "x.tar", [("a.txt", b"x")]), "holds no picture"),
        (lambda f: f / "gone.tar", "no file"),
        (lambda f: f / "gone-*.tar", "No file matches"),
        (lambda f: f / "s-{3..1}.tar", r"\{1..3\}"),
        (lambda f: (pd.DataFrame({"jpg_0": [b"x"], "caption": ["x"]}).to_parquet(f / "p.parquet"), f / "p.parquet")[1],
         "--image-column.*--pairs"),
        (lambda f: (pd.DataFrame({"image": [b"x"], "words": ["x"]}).to_parquet(f / "p.parquet"), f / "p.parquet")[1],
         "--caption-column"),
        (lambda f: (f / "e.jsonl").write_text("") or f / "e.jsonl", "empty"),
    ],
)  # fmt: skip
def test_places_that_hold_nothing_are_named(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        open_places([str(make(tmp_path))])


CELLS = [["a", "b"], 3, 0.5, None, float("nan"), " ", True]
VERDICTS = ["(list), expected text", "(int), expected text", "(float), expected text", *["it has no caption"] * 3,
            "(bool), expected text"]  # fmt: skip


@pytest.mark.parametrize(("cell", "verdict"), list(zip(CELLS, VERDICTS, strict=True)), ids=map(repr, CELLS))
def test_cells_that_are_no_captions_are_judged_alike_in_all_layouts(cell, verdict, tmp_path):
    record = {"image": "0.png", "caption": cell}
    (tmp_path / "0.png").write_bytes(PICTURES[0])
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    pq.write_table(pa.table({"image": ["0.png"], "caption": [cell]}), tmp_path / "p.parquet")
    write_tar(tmp_path / "p.tar", [("0.png", PICTURES[0]), ("0.json", json.dumps(record).encode())])
    for name in ("p.jsonl", "p.parquet", "p.tar"):
        (item,) = open_places([str(tmp_path / name)]).items(0, 1)
        assert item.fault.endswith(verdict), name


def test_captions_beside_the_pictures(tmp_path, scorer_folders):
    for number, content in enumerate(PICTURES):
        (tmp_path / f"{number}.png").write_bytes(content)
    (tmp_path / "0.txt").write_bytes("a red circle\r\n".encode("utf-16"))
    (tmp_path / "1.caption").write_text(TEXTS[1])
    (tmp_path / "2.txt").write_bytes("a café".encode("cp1252"))
    found = score.score_images(
        [str(tmp_path)], tmp_path / "s.csv", [f"pickscore={scorer_folders['pickscore']}"], console=QUIET
    )
    assert found["prompt"].tolist() == ["a red circle", TEXTS[1]]
    broken = [json.loads(line) for line in (tmp_path / "s.broken.jsonl").read_text().splitlines()]
    assert [line["file"].rpartition("/")[2] for line in broken] == ["2.png", "3.png"]
    assert "not UTF-8" in broken[0]["reason"]
    assert broken[1]["reason"] == "it has no caption"


def test_folders_of_save_to_disk(tmp_path):
    rows = {"image": [{"bytes": content, "path": None} for content in PICTURES], "caption": TEXTS}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    source = open_places([str(tmp_path / "saved")])
    assert [(item.data, item.prompt) for item in source.items(1, 4)] == list(zip(PICTURES, TEXTS, strict=True))[1:]


def test_names_that_are_not_utf8_are_listed(tmp_path, scorer_folders):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "0.png").write_bytes(PICTURES[0])
    with open(bytes(tmp_path / "p") + b"/caf\xe9.png", "wb") as file:
        file.write(PICTURES[1])
    judge = [f"pickscore={scorer_folders['pickscore']}"]
    found = score.score_images([str(tmp_path / "p")], tmp_path / "s.parquet", judge, prompt="a \ud83d", console=QUIET)
    assert found["prompt"].tolist() == ["a \ufffd"]
    (broken,) = (json.loads(line) for line in (tmp_path / "s.broken.jsonl").read_text().splitlines())
    assert broken["file"].endswith("caf\\xe9.png")
    assert "rename it" in broken["reason"]


def test_lines_that_are_no_json_say_why(tmp_path):
    (tmp_path / "0.png").write_bytes(PICTURES[0])
    good = json.dumps({"image": "0.png", "caption": "a \ud83d"}).encode()
    (tmp_path / "p.jsonl").write_bytes(good + b'\n{"image": "0.png", "caption": "caf\xe9"}\n[1]\n')
    items = list(open_places([str(tmp_path / "p.jsonl")]).items(0, 3))
    assert (items[0].prompt, items[0].fault) == ("a \ufffd", None)
    assert "cp1252" in items[1].fault
    assert items[2].fault == "expected a JSON object, got list"


def test_text_that_is_not_utf8_in_a_parquet_is_a_fault_of_its_row(tmp_path):
    texts = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 3, 7], "<i4")), pa.py_buffer(b"catcaf\xe9"))
    pq.write_table(pa.table({"image": PICTURES[:2], "caption": texts}), tmp_path / "p.parquet")
    items = list(open_places([str(tmp_path / "p.parquet")]).items(0, 2))
    assert [item.prompt for item in items] == ["cat", ""]
    assert "(bytes), expected text" in items[1].fault
