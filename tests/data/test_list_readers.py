import json
import pickle

import datasets
import pytest

from diffalign.data import LatentCache, open_pairs, win_rate_labels
from diffalign.data.pairs import RowError
from diffalign.errors import DataError
from tests.data.caching import build
from tests.data.world import list_rows, log_of, picture, write_parquet


def write_lines(folder, lines):
    (folder / "lists.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "lists.jsonl"


def as_files(folder, data):
    """Write the pictures of rows into a folder and return the rows with their paths."""
    (folder / "images").mkdir(exist_ok=True)
    made = []
    for i, row in enumerate(data):
        names = [f"images/{i}_{j}.png" for j in range(len(row["images"]))]
        for name, content in zip(names, row["images"], strict=True):
            (folder / name).write_bytes(content)
        made.append(row | {"images": names})
    return made


def check(lists, data):
    assert (len(lists), lists.images_per_example, lists.counts.unit) == (len(data), 3, "lists")
    for example, row in zip(lists, data, strict=True):
        phi = win_rate_labels(row["scores"])
        order = sorted(range(3), key=lambda i: -phi[i])
        assert example.scores == tuple(phi[order])
        assert [image.content for image in example.images] == [row["images"][i] for i in order]
        assert example.prompts == (row["caption"],) * 3
        assert example.extra == {"source": "made"}
        assert example.preference is None
    assert any(win_rate_labels(row["scores"]).argmax() for row in data)  # some best image does not stand first


class TestEveryContainer:
    def test_parquet_with_bytes(self, tmp_path):
        data = list_rows(7)
        check(open_pairs(write_parquet(tmp_path / "a.parquet", data)), data)

    def test_parquet_with_paths(self, tmp_path):
        data = list_rows(4)
        check(open_pairs(write_parquet(tmp_path / "a.parquet", as_files(tmp_path, data))), data)

    def test_json_lines(self, tmp_path):
        data = list_rows(4)
        file = write_lines(tmp_path, as_files(tmp_path, data))
        check(open_pairs(file), data)
        check(pickle.loads(pickle.dumps(open_pairs(file, format="lists"))), data)

    def test_hub(self, tmp_path):
        data = list_rows(5)
        dataset = datasets.Dataset.from_parquet(str(write_parquet(tmp_path / "a.parquet", data)))
        check(open_pairs(dataset), data)
        check(open_pairs(dataset.cast_column("images", datasets.List(datasets.Image()))), data)

    def test_stream(self, tmp_path):
        data = list_rows(5)
        stream = open_pairs(write_parquet(tmp_path / "a.parquet", data), streaming=True)
        assert stream.images_per_example is None
        check_after = list(stream)
        assert [x.example_id for x in check_after] == [x.example_id for x in open_pairs(tmp_path / "a.parquet")]
        assert stream.images_per_example == 3

    def test_several_files_and_max_samples(self, tmp_path):
        for i in range(2):
            write_parquet(tmp_path / f"{i}.parquet", list_rows(3, start=3 * i))
        check(open_pairs(tmp_path), list_rows(6))
        check(open_pairs(tmp_path, max_samples=4), list_rows(4))


class TestLabels:
    def test_flat_scores_are_those_of_one_scorer(self, tmp_path):
        row = list_rows(1)[0] | {"scores": [3.0, -1.0, 7.0]}
        (example,) = open_pairs(write_parquet(tmp_path / "a.parquet", [row]))
        assert example.scores == (1.0, 0.5, 0.0)
        assert [image.data for image in example.images] == [row["images"][i] for i in (2, 0, 1)]

    def test_as_is(self, tmp_path):
        row = list_rows(1)[0] | {"scores": [0.25, 0.75, 0.25]}
        (example,) = open_pairs(write_parquet(tmp_path / "a.parquet", [row]), list_labels="as_is")
        assert example.scores == (0.75, 0.25, 0.25)
        assert [image.data for image in example.images] == [row["images"][i] for i in (1, 0, 2)]  # ties as they stand

    @pytest.mark.parametrize("scores", [[0.2, 1.5, 0.3], [-0.1, 0.5, 0.3], [[0.2], [0.5], [0.3]]])
    def test_as_is_takes_win_rates_only(self, tmp_path, scores):
        file = write_parquet(tmp_path / "a.parquet", [list_rows(1)[0] | {"scores": scores}])
        with pytest.raises(
            RowError, match=r'row 0: the scores are .*number in \[0, 1\].*set list_labels to "win_rate"'
        ):
            open_pairs(file, list_labels="as_is")
        open_pairs(file)

    def test_list_labels_count_for_the_cache(self, tmp_path):
        file = write_parquet(tmp_path / "a.parquet", [row | {"scores": [0.2, 0.9, 0.3]} for row in list_rows(2)])
        assert open_pairs(file).identity != open_pairs(file, list_labels="as_is").identity

    def test_unknown(self, tmp_path):
        file = write_parquet(tmp_path / "a.parquet", list_rows(1))
        with pytest.raises(DataError, match=r'must be one of win_rate, as_is, got "win_rates".*Did you mean'):
            open_pairs(file, list_labels="win_rates")

    def test_lists_that_say_nothing_and_unlabelled_ones_are_dropped(self, tmp_path):
        data = list_rows(4)
        data[1] |= {"scores": [[1.0, 2.0]] * 3}
        data[2] |= {"scores": None}
        lists = open_pairs(write_parquet(tmp_path / "a.parquet", data))
        assert (len(lists), lists.counts.ties, lists.counts.unlabelled) == (2, 1, 1)
        assert str(lists.counts) == "4 rows, 2 lists, 1 ties dropped, 1 unlabelled rows dropped"
        with pytest.raises(DataError, match="no usable list: 1 rows, all of them are ties"):
            open_pairs(write_parquet(tmp_path / "b.parquet", data[1:2]))


BAD = [
    ({"scores": [1.0, 2.0]}, "list length", "the list has 2 images, but the first of this data set has 3"),
    ({"scores": [1.0]}, "list length", r"a list of 1 image\(s\) cannot be ranked"),
    ({"scores": [1.0, None, 2.0]}, "scores", "the scores are .*expected a number for each image"),
    ({"scores": [1.0, float("nan"), 2.0]}, "scores", "the scores are"),
    ({"scores": []}, "scores", r"the scores are \[\]"),
    ({"caption": " "}, "empty caption", "the caption is ' '"),
]


@pytest.mark.parametrize(("change", "reason", "message"), BAD)
@pytest.mark.parametrize("container", ["parquet", "jsonl"])
def test_unusable_rows_are_named_or_skipped(tmp_path, container, change, reason, message):
    data = [row | {"scores": [3.0, 2.0, 1.0]} for row in list_rows(3)]
    data[1] |= change
    if container == "parquet":
        file, place = write_parquet(tmp_path / "a.parquet", data), r"a\.parquet, row 1"
    else:
        file, place = write_lines(tmp_path, as_files(tmp_path, data)), r"lists\.jsonl, line 2"
        if reason == "list length" and len(change["scores"]) == 2:
            message = "there are 2 scores, but the images are 3"
    with pytest.raises(RowError, match=f"{place}: {message}"):
        open_pairs(file)
    lists = open_pairs(file, on_error="skip", error_log=tmp_path / "bad.jsonl")
    assert [row.index for row in lists] == [0, 1]
    assert lists.counts.skipped == {reason: 1}
    assert log_of(tmp_path / "bad.jsonl")[0]["reason"] == reason


@pytest.mark.parametrize("streaming", [False, True])
def test_lists_of_another_length(tmp_path, streaming):
    data = [*list_rows(2), *list_rows(1, k=4), *list_rows(2, start=2)]
    file = write_parquet(tmp_path / "a.parquet", data)
    with pytest.raises(RowError, match="row 2: the list has 4 images, but the first of this data set has 3"):
        list(open_pairs(file, streaming=streaming))
    lists = open_pairs(file, streaming=streaming, on_error="skip")
    assert [len(row.images) for row in lists] == [3] * 4
    assert lists.counts.skipped == {"list length": 1}


def test_length_is_that_of_the_first_file(tmp_path):
    write_parquet(tmp_path / "a.parquet", list_rows(2))
    write_parquet(tmp_path / "b.parquet", list_rows(2, k=2))
    with pytest.raises(RowError, match=r"b\.parquet, row 0: the list has 2 images"):
        open_pairs(tmp_path)


def test_fewer_images_than_scores_is_found_when_they_are_read(tmp_path):
    data = list_rows(3)
    data[1]["images"] = data[1]["images"][:2]
    data[2]["images"] = [data[2]["images"][0], None, data[2]["images"][1]]
    lists = open_pairs(write_parquet(tmp_path / "a.parquet", data))
    with pytest.raises(RowError, match="row 1: there are 3 scores, but the images are 2"):
        lists[1]
    with pytest.raises(RowError, match="row 2: an image is None"):
        lists[2]


def test_formats_and_missing_columns(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", list_rows(2))
    with pytest.raises(DataError, match=r'lacks the column\(s\) "jpg_0", "jpg_1", "label_0"'):
        open_pairs(file, format="pickapic")
    with pytest.raises(DataError, match=r'lacks .* "image", "label"\..*Single images need'):
        open_pairs(file, format="singles")
    with pytest.raises(DataError, match="image_caption_columns is for pairs, but these are lists"):
        open_pairs(file, image_caption_columns=("a", "b"))
    rows = [{k: v for k, v in row.items() if k != "scores"} for row in list_rows(1)]
    with pytest.raises(DataError, match=r'lacks the column\(s\) "scores".*Lists need'):
        open_pairs(write_parquet(tmp_path / "b.parquet", rows))
    with pytest.raises(RowError, match=r'line 1: expected "images" and "scores"; it has caption, images'):
        open_pairs(write_lines(tmp_path, as_files(tmp_path, rows)[:1]), format="lists")


def test_changed_files_behind_paths_are_noticed(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", as_files(tmp_path, list_rows(2)))
    before = open_pairs(file).identity
    assert open_pairs(file).identity == before
    (tmp_path / "images" / "1_2.png").write_bytes(picture(999))
    assert open_pairs(file).identity != before
    cache = build(file, tmp_path / "cache")
    (tmp_path / "images" / "1_2.png").write_bytes(picture(998))
    assert build(file, tmp_path / "cache").folder != cache.folder
    assert isinstance(cache, LatentCache)
