"""What is written is what was chosen: rows as they were, and the same pairs when read again."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data import open_pairs
from diffalign.errors import DataError
from diffalign.filtering.components import Components
from diffalign.filtering.writing import is_one_row_a_pair, write_pairs
from tests.jobs.material import png


def rows(first, count):
    """Return rows of Pick-a-Pic with columns that diffalign never looks at; every fourth is a tie."""
    return pa.Table.from_pylist(
        [
            {
                "caption": f"prompt {i % 5}",
                "jpg_0": png(60, i),
                "jpg_1": png(120, i + 1000),
                "label_0": 0.5 if i % 4 == 3 else float(i % 2),
                "label_1": 0.5 if i % 4 == 3 else float(1 - i % 2),
                "notes": {"tags": ["a", str(i)], "when": i},
            }
            for i in range(first, first + count)
        ]
    ).replace_schema_metadata({"huggingface": json.dumps({"info": "kept"})})


@pytest.fixture
def shards(tmp_path):
    """Write two files of several row groups and return their folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(2):
        name = f"train-0000{number}-of-00002.parquet"
        pq.write_table(rows(20 * number, 20), folder / name, row_group_size=7)
    return folder


def ids(source):
    return [row.example_id for row in source]


def test_rows_of_parquet_files_are_copied_losslessly(shards, tmp_path):
    source = open_pairs(shards)
    components = Components.of(source, "here")
    chosen = np.array([25, 3, 0, 14, 15, 29])
    out = tmp_path / "train.parquet"
    write_pairs(source, components.table, chosen, out)
    written = pq.read_table(out)
    whole = pa.concat_tables([pq.read_table(file) for file in sorted(shards.iterdir())])
    kept = [i for i in range(40) if i % 4 != 3]
    assert written.equals(whole.take([kept[i] for i in sorted(chosen)]))
    assert written.schema.equals(whole.schema, check_metadata=True)
    assert ids(open_pairs(out)) == components.table["example_id"].iloc[np.sort(chosen)].tolist()


def test_other_sources_become_pickapic_rows(tmp_path):
    lines = []
    for i in range(6):
        for side, level in (("w", 120), ("l", 60)):
            (tmp_path / f"{side}{i}.png").write_bytes(png(level, i))
        line = {"prompt": f"prompt {i}", "chosen": f"w{i}.png", "rejected": f"l{i}.png"}
        lines.append(line | ({"preference": 0.8} if i == 4 else {}))
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    source = open_pairs(file)
    components = Components.of(source, "here")
    write_pairs(source, components.table, np.array([4, 1]), tmp_path / "train.parquet")
    read = list(open_pairs(tmp_path / "train.parquet"))
    assert [row.example_id for row in read] == components.table["example_id"].iloc[[1, 4]].tolist()
    assert [row.preference for row in read] == [None, 0.8]


def test_pairs_that_share_a_row_are_not_copied_as_rows(shards):
    table = Components.of(open_pairs(shards), "here").table
    assert is_one_row_a_pair(table)
    assert not is_one_row_a_pair(table.assign(row=0))
    assert not is_one_row_a_pair(table.assign(file="a hub data set"))


def test_files_of_different_columns_are_refused(shards, tmp_path):
    other = shards / "train-00001-of-00002.parquet"
    pq.write_table(pq.read_table(other).drop(["notes"]), other)
    source = open_pairs(shards)
    table = Components.of(source, "here").table
    with pytest.raises(DataError, match="other columns than"):
        write_pairs(source, table, np.arange(len(table)), tmp_path / "out.parquet")


def test_components_survive_the_file(shards, tmp_path):
    components = Components.of(open_pairs(shards), {"content": ["x"]})
    components.set_distances(np.random.default_rng(0).random((5, 2)), {"encoder": "e"})
    components.write(tmp_path / "components.parquet")
    read = Components.read(tmp_path / "components.parquet")
    assert read.origin == components.origin
    assert read.table.equals(components.table)
    assert read.table.groupby("prompt_key")["distance_2"].nunique().eq(1).all()
    pq.write_table(rows(0, 2), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="was not written by diffalign filter"):
        Components.read(tmp_path / "other.parquet")


def test_images_id_does_not_depend_on_the_winner(tmp_path):
    table = rows(0, 1)
    flipped = table.set_column(3, "label_0", table["label_1"]).set_column(4, "label_1", table["label_0"])
    pq.write_table(pa.concat_tables([table, flipped]), tmp_path / "train.parquet")
    found = Components.of(open_pairs(tmp_path / "train.parquet"), "here").table
    assert found["images_id"].nunique() == 1
    assert found["example_id"].nunique() == 2
