import json

import datasets
import pytest

from diffalign.data import OnlinePairs, open_pairs
from diffalign.data.pairs import RowError
from diffalign.errors import DataError
from tests.data.caching import TRANSFORM, build, fixed
from tests.data.world import TinyEncoder, picture, rows, write_parquet

COLUMNS = ("caption_0", "caption_1")


def captioned(count=5):
    """Return rows in which image 0 is called "left" and image 1 "right"; of row 3 both are called the same."""
    made = rows(count)
    for i, row in enumerate(made):
        row |= {"caption_0": f"left {i}", "caption_1": f"left {i}" if i == 3 else f"right {i}"}
    return made


@pytest.fixture
def file(tmp_path):
    return write_parquet(tmp_path / "a.parquet", captioned())


def wanted(i):
    left, right = f"left {i}", f"left {i}" if i == 3 else f"right {i}"
    return (left, right) if i % 2 == 0 else (right, left)


def test_captions_follow_their_images(file):
    local = open_pairs(file, image_caption_columns=COLUMNS)
    hub = open_pairs(datasets.Dataset.from_parquet(str(file)), image_caption_columns=COLUMNS)
    stream = open_pairs(file, image_caption_columns=COLUMNS, streaming=True)
    for source in (local, hub, stream):
        assert [row.prompts for row in source] == [wanted(i) for i in range(5)]
        assert [row.chosen.data for row in source] == [picture(i) for i in range(5)]
    assert local[0].extra["caption"] == "prompt 0"
    assert local[3].rejected_prompt is None


def test_ids_and_identity_differ_from_those_of_one_caption(file):
    plain, both = open_pairs(file), open_pairs(file, image_caption_columns=COLUMNS)
    assert plain.identity != both.identity
    assert "image_captions" not in plain.identity["columns"]
    assert {row.example_id for row in plain}.isdisjoint(row.example_id for row in both)
    # Equal captions are one caption.
    one = open_pairs(file, caption_column="caption_0")
    assert [a.example_id == b.example_id for a, b in zip(one, both, strict=True)] == [False, False, False, True, False]


def test_json_lines(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    images = {"image_0": "0.png", "image_1": "1.png", "label_0": 0}
    named = {"chosen": "0.png", "rejected": "1.png", "prompt": "x"}
    lines = [images | {"caption_0": "left", "caption_1": "right"}, named | {"caption_0": "good", "caption_1": "bad"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = open_pairs(tmp_path / "a.jsonl", image_caption_columns=COLUMNS)
    assert [row.prompts for row in pairs] == [("right", "left"), ("good", "bad")]
    (tmp_path / "b.jsonl").write_text(json.dumps(images | {"prompt": "x", "caption_0": "left"}))
    with pytest.raises(RowError, match=r'line 1: expected .*"caption_1"; it has image_0'):
        open_pairs(tmp_path / "b.jsonl", image_caption_columns=COLUMNS)


def test_batches_hold_a_caption_for_every_image(file, tmp_path):
    encoder = TinyEncoder()
    source = open_pairs(file, image_caption_columns=COLUMNS)
    cache = build(source, tmp_path / "cache")
    augment = fixed([False] * 4, [False, False, True, False])
    batch = cache.batch([1, 3, 4, 1], augment)
    assert batch.prompts == ["right 1", "left 3", "", "right 1", "left 1", "left 3", "", "left 1"]
    text = {name: column.tolist() for name, column in encoder.encode_prompts(batch.prompts).items()}
    assert {name: column.tolist() for name, column in batch.text.items()} == text
    assert cache.meta["prompts"] == 1 + 9
    online = OnlinePairs(source, encoder, TRANSFORM).batch(
        [1, 3, 4, 1], fixed([False] * 4, [False, False, True, False])
    )
    assert online.prompts == batch.prompts
    assert {name: column.tolist() for name, column in online.text.items()} == text


def test_faults_name_row_and_fix(file, tmp_path):
    data = captioned()
    data[2]["caption_1"] = ""
    with pytest.raises(RowError, match=r"b\.parquet, row 2: the caption is ''"):
        open_pairs(write_parquet(tmp_path / "b.parquet", data), image_caption_columns=COLUMNS)
    with pytest.raises(DataError, match=r'lacks the column\(s\) "caption_2"\..*image_caption_columns'):
        open_pairs(file, image_caption_columns=("caption_0", "caption_2"))
    (tmp_path / "w").mkdir()
    (tmp_path / "l").mkdir()
    with pytest.raises(DataError, match="needs parquet or JSONL"):
        open_pairs(tmp_path, format="folders", image_caption_columns=COLUMNS)
