"""Tables are read without guessing what their text means."""

import codecs
import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data.tables import KINDS, captions, is_table, read_columns
from diffalign.errors import DataError

TEXTS = ["null", "NA", "None", "nan", "007", "1.50", "1984", "True", "2024-01-01", "1e5", "-", 'a "red"  circle']


def write(file, texts):
    kind = file.suffix.lower()
    if kind == ".parquet":
        pq.write_table(pa.table({"prompt": texts}), file)
    elif kind in (".arrow", ".feather"):
        table = pa.table({"prompt": texts})
        opener = pa.ipc.new_stream if kind == ".arrow" else pa.ipc.new_file
        with opener(str(file), table.schema) as writer:
            writer.write_table(table)
    elif kind == ".json":
        file.write_text(json.dumps([{"prompt": text} for text in texts]))
    elif kind in (".jsonl", ".ndjson"):
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    elif kind == ".tsv":
        file.write_text("prompt\tnote\n" + "".join(f"{text}\t\n" for text in texts))
    else:
        pd.DataFrame({"prompt": texts}).to_csv(file, index=False)
    return file


@pytest.mark.parametrize("kind", [*KINDS, *(kind.upper() for kind in KINDS)])
def test_what_is_written_as_text_stays_text(kind, tmp_path):
    file = write(tmp_path / f"p{kind}", TEXTS)
    assert is_table(file)
    assert captions(read_columns(file), "prompt", file) == TEXTS


@pytest.mark.parametrize("kind", [".parquet", ".json", ".jsonl", ".arrow"])
@pytest.mark.parametrize(("value", "type"), [(3, "int"), (0.5, "float"), (["a", "b"], "list")])
def test_cells_that_hold_no_text_are_named(kind, value, type, tmp_path):
    file = write(tmp_path / f"p{kind}", [value, value])
    with pytest.raises(DataError, match=rf'row 0, column "prompt": the prompt is .*({type})\), expected text'):
        captions(read_columns(file), "prompt", file, "prompt")


@pytest.mark.parametrize("kind", [".parquet", ".json", ".jsonl", ".arrow"])
def test_cells_that_are_not_there_are_passed_over(kind, tmp_path):
    file = write(tmp_path / f"p{kind}", ["a", None, "", "b"])
    assert captions(read_columns(file), "prompt", file) == ["a", "b"]


def test_excel_writes_utf16_and_marks(tmp_path):
    (tmp_path / "u.tsv").write_bytes(codecs.BOM_UTF16_LE + "prompt\tn\r\n一只猫\t007\r\n".encode("utf-16-le"))
    (tmp_path / "b.csv").write_bytes(b'\xef\xbb\xbfprompt,n\r\n"a, b\r\nc",007\r\nx\x0by,1\r\n')
    assert read_columns(tmp_path / "u.tsv").to_dict("records") == [{"prompt": "一只猫", "n": "007"}]
    assert read_columns(tmp_path / "b.csv").prompt.tolist() == ["a, b\r\nc", "x\x0by"]


def test_commas_without_quotation_marks_are_refused(tmp_path):
    (tmp_path / "p.csv").write_text("prompt\na cat\na cat, a dog\n")
    with pytest.raises(DataError, match=r"p\.csv, line 3: there are 2 cells for 1 columns.*quotation marks"):
        read_columns(tmp_path / "p.csv")


def test_columns_of_numbers_are_numbers_in_csv_too(tmp_path):
    (tmp_path / "p.csv").write_text(f"id,score\n{2**63 - 1},1.5\n7,\n")
    table = read_columns(tmp_path / "p.csv", numbers=("id", "score"))
    assert table["id"].tolist() == [2**63 - 1, 7]
    assert table["score"].fillna(-1).tolist() == [1.5, -1]
    (tmp_path / "q.csv").write_text("score\nhigh\n")
    with pytest.raises(DataError, match=r'q\.csv: column "score" should hold numbers'):
        read_columns(tmp_path / "q.csv", numbers=("score",))


def test_whole_numbers_stay_whole_where_some_are_missing(tmp_path):
    pq.write_table(pa.table({"id": [2**62 + 1, None]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(f'{{"id": {2**62 + 1}}}\n{{}}\n')
    for name in ("a.parquet", "a.jsonl"):
        assert read_columns(tmp_path / name)["id"][0] == 2**62 + 1


def test_categories_are_text(tmp_path):
    pd.DataFrame({"prompt": pd.Categorical(["a", "b", "a"])}).to_parquet(tmp_path / "c.parquet")
    assert captions(read_columns(tmp_path / "c.parquet"), "prompt", tmp_path) == ["a", "b", "a"]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"PAR1", b"{", b""])
@pytest.mark.parametrize("kind", [".parquet", ".json", ".jsonl", ".arrow"])
def test_what_cannot_be_read_is_an_error_that_names_the_file(content, kind, tmp_path):
    if kind == ".jsonl" and not content:
        return
    (tmp_path / f"x{kind}").write_bytes(content)
    with pytest.raises(DataError, match=rf"x\{kind}"):
        read_columns(tmp_path / f"x{kind}")
