import json

import datasets
import pytest

from diffalign.data import open_pairs
from diffalign.data.pairs import RowError
from diffalign.errors import DataError
from tests.data.caching import build, fixed
from tests.data.world import picture, write_parquet


def singles(count=6, labels=(1, 0, 0)):
    return [
        {"caption": f"prompt {i // 2}", "image": picture(i), "label": labels[i % len(labels)], "tag": i}
        for i in range(count)
    ]


def check(source):
    assert (len(source), source.images_per_example, source.has_preference) == (6, 1, False)
    assert [row.scores for row in source] == [(1.0,), (0.0,), (0.0,)] * 2
    assert [row.prompts for row in source] == [(f"prompt {i // 2}",) for i in range(6)]
    assert [row.images[0].content for row in source] == [picture(i) for i in range(6)]
    assert source[5].extra == {"tag": 5}


@pytest.mark.parametrize("labels", [(1, 0, 0), (True, False, False), (1.0, 0.0, 0.0)])
def test_parquet(tmp_path, labels):
    check(open_pairs(write_parquet(tmp_path / "a.parquet", singles(labels=labels))))


def test_json_lines_and_hub(tmp_path):
    lines = []
    for i, row in enumerate(singles()):
        (tmp_path / f"{i}.png").write_bytes(row["image"])
        lines.append(json.dumps({"prompt": row.pop("caption"), **row, "image": f"{i}.png"}))
    (tmp_path / "images.txt").write_text("\n".join(lines))
    check(open_pairs(tmp_path / "images.txt", format="singles"))
    (tmp_path / "images.txt").rename(tmp_path / "images.jsonl")
    check(open_pairs(tmp_path / "images.jsonl"))
    dataset = datasets.Dataset.from_parquet(str(write_parquet(tmp_path / "a.parquet", singles())))
    check(open_pairs(dataset.cast_column("image", datasets.Image())))
    stream = open_pairs(tmp_path / "a.parquet", streaming=True, max_samples=6)
    check(stream)


def test_a_cache_of_single_images(tmp_path):
    cache = build(write_parquet(tmp_path / "a.parquet", singles()), tmp_path / "cache")
    assert (cache.images_per_example, cache.has_preference, cache.preference) == (1, False, None)
    assert cache.scores.tolist() == [[1], [0], [0]] * 2
    batch = cache.batch([3, 1], fixed([False, True], [False, True]))
    assert batch.images_per_example == 1
    assert batch.scores.tolist() == [[1], [0]]
    assert batch.prompts == ["prompt 1", ""]
    assert batch.latent_mean.shape[0] == 2


def test_unlabelled_images_are_dropped(tmp_path):
    data = singles()
    data[2]["label"] = None
    source = open_pairs(write_parquet(tmp_path / "a.parquet", data))
    assert (len(source), source.counts.unlabelled, str(source.counts)) == (
        5, 1, "6 rows, 5 images, 0 ties dropped, 1 unlabelled rows dropped",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [({"label": 0.5}, "label", r"the label is 0\.5, expected 1 \(desirable\) or 0"),
     ({"label": 2}, "label", "the label is 2"), ({"caption": ""}, "empty caption", "the caption is ''")],
)  # fmt: skip
def test_unusable_rows_are_named_or_skipped(tmp_path, change, reason, message):
    data = singles(labels=(1.0, 0.0)) if isinstance(change.get("label"), float) else singles()
    data[3] |= change
    file = write_parquet(tmp_path / "a.parquet", data)
    with pytest.raises(RowError, match=rf"a\.parquet, row 3: {message}"):
        open_pairs(file)
    source = open_pairs(file, on_error="skip")
    assert (len(source), source.counts.skipped) == (5, {reason: 1})


def test_null_image_and_nothing_usable(tmp_path):
    data = singles(2)
    data[1]["image"] = None
    with pytest.raises(RowError, match="row 1: an image is None"):
        list(open_pairs(write_parquet(tmp_path / "a.parquet", data)))
    with pytest.raises(DataError, match="holds no usable image: 2 rows"):
        open_pairs(write_parquet(tmp_path / "b.parquet", [row | {"label": 7} for row in data]), on_error="skip")
    broken = write_parquet(tmp_path / "c.parquet", [row | {"image": b"x"} for row in data])
    with pytest.raises(DataError, match="holds no usable image: 2 rows"):
        build(open_pairs(broken, on_error="skip"), tmp_path / "cache")
