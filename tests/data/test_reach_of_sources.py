"""What data may name is the same for every source: files in its folder, and those below `root`."""

import json
import os

import datasets
import pandas as pd
import pytest

from diffalign.data import open_pairs
from diffalign.errors import DataError, UserError
from diffalign.pictures import OutsideError
from tests.data.test_published_pairs import tar
from tests.data.world import picture

PICTURES = [picture(seed) for seed in range(2)]


@pytest.fixture
def folder(tmp_path):
    """Return a folder of data with 0.png in it, beside one with 1.png."""
    for place, content in (("data/0.png", PICTURES[0]), ("outside/1.png", PICTURES[1])):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).write_bytes(content)
    return tmp_path / "data"


def json_list(folder, name):
    (folder / "p.json").write_text(json.dumps([{"prompt": "a", "chosen": name, "rejected": "0.png"}]))
    return folder / "p.json", {}


def csv_table(folder, name):
    (folder / "p.csv").write_text(f"prompt,chosen,rejected\na,{name},0.png\n")
    return folder / "p.csv", {}


def imagefolder(folder, name):
    (folder / "metadata.csv").write_text(f"prompt,chosen_file_name,rejected_file_name\na,{name},0.png\n")
    return folder, {}


def hpdv2(folder, name):
    row = {"prompt": "a", "image_path": [name, "0.png"], "human_preference": [1, 0]}
    (folder / "train.json").write_text(json.dumps([row]))
    return folder / "train.json", {}


def image_reward_db(folder, name):
    rows = [{"prompt": "a", "prompt_id": "1", "image_path": n, "rank": r} for n, r in ((name, 1), ("0.png", 2))]
    (folder / "r.json").write_text(json.dumps(rows))
    return folder / "r.json", {"format": "rankings"}


def rankings(folder, name):
    (folder / "k.jsonl").write_text(json.dumps({"caption": "a", "images": [name, "0.png"], "scores": [2, 1]}) + "\n")
    return folder / "k.jsonl", {"format": "rankings"}


def shard(folder, name):
    said = json.dumps({"prompt": "a", "chosen": name}).encode()
    return tar(folder / "s.tar", [("0.json", said), ("0.rejected.png", PICTURES[0])]), {}


def save_to_disk(folder, name):
    datasets.Dataset.from_dict({"prompt": ["a"], "chosen": [name], "rejected": ["0.png"]}).save_to_disk(str(folder))
    return folder, {}


SOURCES = [json_list, csv_table, imagefolder, hpdv2, image_reward_db, rankings, shard, save_to_disk]


@pytest.mark.parametrize("write", SOURCES, ids=lambda write: write.__name__)
def test_pictures_outside_need_a_root(write, folder):
    source, how = write(folder, "../outside/1.png")
    with pytest.raises(DataError, match=r"leads out of .*data.*--root"):
        list(open_pairs(str(source), **how))
    (pair,) = open_pairs(str(source), root=folder.parent, **how)
    assert [image.content for image in pair.images] == PICTURES[::-1]


def test_a_folder_called_as_the_file_is_may_be_no_link_out(folder):
    (folder / "train").symlink_to(folder.parent / "outside")
    source, _ = hpdv2(folder, "1.png")
    with pytest.raises(DataError, match=r"no file .*data/1\.png"):
        open_pairs(str(source))
    (folder / "0.png").rename(folder.parent / "outside" / "0.png")
    assert len(open_pairs(str(source), root=folder.parent)) == 1


def test_arrow_files_of_save_to_disk_lie_in_its_folder(folder):
    source, _ = save_to_disk(folder, "0.png")
    (arrow,) = source.glob("*.arrow")
    arrow.rename(folder.parent / "outside" / arrow.name)
    state = json.loads((source / "state.json").read_text())
    (source / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": f"../outside/{arrow.name}"}]}))
    with pytest.raises(OutsideError, match="leads out of"):
        open_pairs(str(source))
    assert len(open_pairs(str(source), root=folder.parent)) == 1
    for state in ("[]", "{}", '{"_data_files": [1]}'):
        (source / "state.json").write_text(state)
        with pytest.raises(DataError, match="Save it again"):
            open_pairs(str(source))


def test_hidden_members_of_tars_are_no_images_and_endless_texts_no_captions(folder):
    members = [("._0.w.png", b"?"), ("0.w.png", PICTURES[0]), ("0.l.png", PICTURES[1]), ("0.txt", b"a")]
    file = tar(folder / "s.tar", members)
    assert len(open_pairs(str(file))) == 1
    file = tar(folder / "s.tar", [*members, ("0.caption", b"x" * 400_001)])
    with pytest.raises(DataError, match="400001 bytes are no caption"):
        open_pairs(str(file))


def test_pipes_are_not_waited_for(folder):
    for name in ("p.jsonl", "s.tar", "p.json", "p.csv"):
        os.mkfifo(folder / name)
        with pytest.raises(UserError):
            open_pairs(str(folder / name))


def test_a_table_counts_captions_as_long_as_books(folder):
    table = pd.DataFrame({"caption": ["a", "x" * 100_001], "chosen": ["0.png"] * 2, "rejected": ["0.png"] * 2})
    table.to_parquet(folder / "p.parquet")
    opened = open_pairs(str(folder / "p.parquet"), on_error="skip")
    assert (len(opened), opened.counts.skipped) == (1, {"caption length": 1})
