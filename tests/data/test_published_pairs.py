"""Data sets as they are published, each on a small file in its layout."""

import io
import json
import tarfile

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data import open_pairs
from diffalign.errors import DataError
from tests.data.world import picture

PICTURES = [picture(seed) for seed in range(4)]


def pictures(folder, names):
    """Write pictures 0, 1, 2, ... under these names."""
    for content, name in zip(PICTURES, names, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def seen(source):
    """Return the prompt, the numbers of the pictures, best first, and the preference of every example."""
    return [(row.prompts[0], [PICTURES.index(i.content) for i in row.images], row.preference) for row in source]


PAIRS = {"jpg_0": PICTURES[:2], "jpg_1": PICTURES[2:], "caption": ["a", "b"], "label_0": [1.0, 0.0]}
SEEN = [("a", [0, 2], None), ("b", [3, 1], None)]


@pytest.mark.parametrize("split", [None, "validation"])
def test_folders_of_save_to_disk(split, tmp_path):
    features = datasets.Features(
        {"jpg_0": datasets.Image(), "jpg_1": datasets.Image(), "caption": datasets.Value("string"),
         "label_0": datasets.Value("float64")}
    )  # fmt: skip
    rows = {**PAIRS, **{name: [{"bytes": x, "path": None} for x in PAIRS[name]] for name in ("jpg_0", "jpg_1")}}
    saved = datasets.Dataset.from_dict(rows, features=features)
    (saved if split is None else datasets.DatasetDict({split: saved})).save_to_disk(str(tmp_path / "saved"))
    opened = open_pairs(str(tmp_path / "saved"), split=split or "train")
    assert seen(opened) == SEEN
    assert opened.identify() == open_pairs(str(tmp_path / "saved"), split=split or "train").identify()
    if split:
        with pytest.raises(DataError, match='no split "train"; it has validation'):
            open_pairs(str(tmp_path / "saved"))
    else:
        assert seen(open_pairs(str(next((tmp_path / "saved").glob("*.arrow"))))) == SEEN


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("split", ["", "train"])
def test_imagefolders_with_metadata(kind, split, tmp_path):
    root = tmp_path / split
    pictures(root, ["a0.png", "b0.png", "a1.png", "b1.png"])
    rows = pd.DataFrame(
        {"jpg_0_file_name": ["a0.png", "b0.png"], "jpg_1_file_name": ["a1.png", "b1.png"], "caption": ["a", "b"],
         "label_0": [1, 0]}
    )  # fmt: skip
    write = {"csv": rows.to_csv, "parquet": rows.to_parquet}.get(kind)
    if write:
        write(root / f"metadata.{kind}", index=False)
    else:
        rows.to_json(root / "metadata.jsonl", orient="records", lines=True)
    assert seen(open_pairs(str(tmp_path))) == SEEN


def test_an_imagefolder_names_winners_and_keeps_captions_as_they_are(tmp_path):
    pictures(tmp_path, ["w.png", "l.png"])
    (tmp_path / "metadata.csv").write_text(
        "chosen_file_name,rejected_file_name,prompt,preference\nw.png,l.png,007,0.8\n"
    )
    assert seen(open_pairs(str(tmp_path))) == [("007", [0, 1], 0.8)]


def tar(file, members):
    with tarfile.open(file, "w") as opened:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            opened.addfile(entry, io.BytesIO(content))
    return file


def test_tars_of_diffusers_orpo(tmp_path):
    """Its names: https://github.com/huggingface/diffusers, examples/research_projects/diffusion_orpo."""
    for shard, (number, prompt, label) in enumerate([(0, b"a", b"1.0"), (1, b"b", b"0.0")]):
        sample = [("jpg_0.jpg", PICTURES[number]), ("jpg_1.jpg", PICTURES[number + 2]), ("original_prompt.txt", prompt)]
        sample.append(("label_0.txt", label))
        tar(tmp_path / f"0000{shard}.TAR", [(f"000{number}.{name}", content) for name, content in sample])
    assert seen(open_pairs(str(tmp_path))) == SEEN
    assert seen(open_pairs(str(tmp_path / "*.TAR"))) == SEEN
    assert seen(open_pairs(str(tmp_path / "00001.TAR"))) == SEEN[1:]


def test_tars_with_winners_and_json(tmp_path):
    said = json.dumps({"prompt": "a", "preference": 0.7}).encode()
    members = [("0.chosen.png", PICTURES[0]), ("0.rejected.png", PICTURES[2]), ("0.json", said)]
    members += [("1.w.png", PICTURES[3]), ("1.l.png", PICTURES[1]), ("1.txt", "b".encode("utf-8-sig"))]
    opened = open_pairs(str(tar(tmp_path / "p.tar", members)))
    assert seen(opened) == [("a", [0, 2], 0.7), ("b", [3, 1], None)]
    assert opened.identify()["files"][0]["name"] == "p.tar"


def test_tars_of_single_images(tmp_path):
    members = [("0.jpg", PICTURES[0]), ("0.cls", b"1"), ("0.txt", b"a")]
    members += [("1.jpg", PICTURES[1]), ("1.cls", b"0"), ("1.txt", b"b")]
    opened = open_pairs(str(tar(tmp_path / "s.tar", members)))
    assert [(row.prompt, row.scores) for row in opened] == [("a", (1.0,)), ("b", (0.0,))]


def test_faulty_samples_of_a_tar_are_rows(tmp_path):
    members = [("0.w.png", PICTURES[0]), ("0.l.png", PICTURES[1]), ("0.txt", "caf\xe9".encode("cp1252"))]
    members += [("1.w.png", PICTURES[0]), ("1.txt", b"b"), ("2.w.png", PICTURES[0]), ("2.l.png", PICTURES[1])]
    members += [("2.txt", b"c"), ("3.w.png", PICTURES[0]), ("3.l.png", PICTURES[1]), ("3.json", b'{"caption": [1]}')]
    file = tar(tmp_path / "p.tar", members)
    with pytest.raises(DataError, match=r"p\.tar, sample 0: 0: 0\.txt.*not UTF-8"):
        open_pairs(str(file))
    opened = open_pairs(str(file), on_error="skip")
    assert [prompt for prompt, *_ in seen(opened)] == ["c"]
    assert opened.counts.skipped == {"unreadable sample": 1, "missing column": 1, "caption type": 1}


@pytest.mark.parametrize("key", ["image_path", "file_path"])
def test_hpdv2_train(key, tmp_path):
    pictures(tmp_path / "train", ["0.jpg", "1.jpg", "2.jpg", "3.jpg"])
    rows = [{"prompt": "a", key: ["0.jpg", "2.jpg"], "human_preference": [1, 0], "raw_annotations": []},
            {"prompt": "b", key: ["1.jpg", "3.jpg"], "human_preference": [0, 1], "raw_annotations": []}]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert seen(open_pairs(str(tmp_path / "train.json"))) == SEEN


def test_hpdv2_as_a_table_has_pictures_in_lists(tmp_path):
    cells = [[{"bytes": PICTURES[i], "path": None} for i in (first, first + 2)] for first in (0, 1, 0)]
    columns = {"prompt": ["a", "b", "c"], "image_path": [["0", "2"]] * 3, "image": cells}
    columns["human_preference"] = [[1, 0], [0, 1], []]
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    opened = open_pairs(str(tmp_path / "train.parquet"))
    assert seen(opened) == SEEN
    assert opened.counts.unlabelled == 1
    assert seen(open_pairs(datasets.Dataset.from_dict(columns))) == SEEN


RANKED = {"prompt": "a", "image_path": ["0.jpg", "1.jpg", "2.jpg"], "rank": [2, 1, 2]}
FROM_RANKS = [("a", [1, 0], None), ("a", [1, 2], None)]


def test_hpdv2_test_is_ranked(tmp_path):
    pictures(tmp_path / "test", ["0.jpg", "1.jpg", "2.jpg"])
    (tmp_path / "test.json").write_text(json.dumps([{**RANKED, "raw_annotations": [{"rank": [2, 1, 2]}]}]))
    assert seen(open_pairs(str(tmp_path / "test.json"))) == [("a", [1, 0, 2], None)]
    pairs = open_pairs(str(tmp_path / "test.json"), format="rankings")
    assert seen(pairs) == FROM_RANKS
    assert pairs.counts.ties == 1


def test_image_reward_db_is_an_image_a_row(tmp_path):
    names = [f"images/train/train_1/{i}.webp" for i in range(3)]
    pictures(tmp_path, names)
    rows = [{"image_path": name, "prompt_id": "000-1", "prompt": "a", "image_amount_in_total": 3, "rank": rank,
             "overall_rating": 5} for name, rank in zip(names, (2, 1, 2), strict=True)]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert seen(open_pairs(str(tmp_path / "train.json"), format="rankings")) == FROM_RANKS
    assert seen(open_pairs(str(tmp_path / "train.json"))) == [("a", [1, 0, 2], None)]


def test_image_reward_test_json(tmp_path):
    pictures(tmp_path / "images", ["0.webp", "1.webp", "2.webp"])
    row = {"id": "1", "prompt": "a", "generations": ["0.webp", "1.webp", "2.webp"], "ranking": [2, 1, 2]}
    (tmp_path / "test.json").write_text(json.dumps([row]))
    assert seen(open_pairs(str(tmp_path / "test.json"), format="rankings")) == FROM_RANKS


@pytest.mark.parametrize(
    ("better", "worse"), [("chosen", "rejected"), ("img_better", "img_worse")], ids=["Open Image Preferences", "IRDB"]
)
def test_tables_that_name_winners(better, worse, tmp_path):
    cells = [[{"bytes": picture, "path": None} for picture in part] for part in (PICTURES[:2], PICTURES[2:])]
    columns = {"prompt": ["a", "b"], better: cells[0], worse: cells[1], "category": ["x", "y"]}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    right = [("a", [0, 2], None), ("b", [1, 3], None)]
    assert seen(open_pairs(str(tmp_path / "p.parquet"))) == right
    assert seen(open_pairs(datasets.Dataset.from_dict(columns))) == right
    assert open_pairs(str(tmp_path / "p.parquet"))[0].extra == {"category": "x"}


def test_soft_preferences_in_tables(tmp_path):
    columns = {
        "prompt": ["a", "b", "c"],
        "chosen": PICTURES[:3],
        "rejected": PICTURES[1:],
        "preference": [0.9, 0.5, 0.2],
    }
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    opened = open_pairs(str(tmp_path / "p.parquet"), on_error="skip")
    assert seen(opened) == [("a", [0, 1], 0.9)]
    assert (opened.counts.ties, opened.counts.skipped) == (1, {"preference": 1})


def test_hpdv3(tmp_path):
    pictures(tmp_path / "images", ["0.jpg", "1.jpg"])
    row = {"prompt": "a", "path1": "images/0.jpg", "path2": "images/1.jpg", "confidence": 0.9}
    (tmp_path / "all.json").write_text(json.dumps([row]))
    assert seen(open_pairs(str(tmp_path / "all.json"))) == [("a", [0, 1], None)]


def test_lists_of_several_lengths_become_pairs(tmp_path):
    pictures(tmp_path, ["0.png", "1.png", "2.png"])
    rows = [{"caption": "a", "images": ["0.png", "1.png", "2.png"], "scores": [1, 3, 1]},
            {"caption": "b", "images": ["0.png", "1.png"], "scores": [2, 0]},
            {"caption": "c", "images": ["0.png"], "scores": [2, 0]}]  # fmt: skip
    (tmp_path / "k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = open_pairs(str(tmp_path / "k.jsonl"), format="rankings", on_error="skip")
    assert seen(opened) == [*FROM_RANKS, ("b", [0, 1], None)]
    assert opened.counts.skipped == {"list length": 1}


def test_what_holds_no_ranks_gives_no_rankings(tmp_path):
    pictures(tmp_path, ["0.png", "1.png"])
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": "a", "chosen": "0.png", "rejected": "1.png"}]))
    with pytest.raises(DataError, match="no ranked lists"):
        open_pairs(str(tmp_path / "p.json"), format="rankings")
    (tmp_path / "q.json").write_text("{}")
    with pytest.raises(DataError, match="list of objects"):
        open_pairs(str(tmp_path / "q.json"))
