"""Prompt sets in the form of their published files."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.errors import DataError
from diffalign.evaluation import published
from diffalign.evaluation.prompt_sets import read_prompt_set
from diffalign.jobs.drawing.prompt_sets import open_prompt_set
from diffalign.jobs.drawing.prompts import read_prompts


def test_pick_a_pic(tmp_path):
    file = tmp_path / "test_unique-00000-of-00001.parquet"
    rows = [{"caption": text, "label_0": 1.0, "jpg_0": b"x"} for text in ("a cat", "a dog", "a cat")]
    pq.write_table(pa.Table.from_pylist(rows), file)
    found = open_prompt_set(str(file))
    assert (found.name, found.prompts, found.categories) == ("pickapic", ["a cat", "a dog"], ())


def test_parti_prompts_with_quotes_and_words_that_look_like_numbers_or_nothing(tmp_path):
    file = tmp_path / "PartiPrompts.tsv"
    rows = [
        ("42", "Abstract", "Basic", "Simple numbers"),
        ("null", "Abstract", "Basic", ""),
        ('"Fly an airplane" on a wall', "Outdoor Scenes", "Complex", ""),
        ('the words "a', "Arts", "Complex", ""),
    ]
    file.write_text("\n".join("\t".join(row) for row in [("Prompt", "Category", "Challenge", "Note"), *rows]) + "\n")
    found = open_prompt_set(str(file))
    assert found.prompts == read_prompts(file) == [row[0] for row in rows]
    assert found.table["category"].tolist() == [row[1] for row in rows]
    assert found.table["challenge"].tolist()[-1] == "Complex"
    assert found.categories == ("category", "challenge")


def test_the_four_styles_of_hpdv2(tmp_path):
    for style in ("photo", "anime", "paintings", "concept-art"):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} 0", f"{style} 1"]))
    found = open_prompt_set(str(tmp_path))
    assert found.table["style"].tolist() == ["anime"] * 2 + ["concept-art"] * 2 + ["paintings"] * 2 + ["photo"] * 2
    assert open_prompt_set(str(tmp_path / "photo.json")).prompts == ["photo 0", "photo 1"]
    assert found.head(3).table["prompt_id"].tolist() == [0, 1, 2]


def test_geneval(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    record = {"tag": "counting", "include": [{"class": "bird", "count": 2}], "exclude": [{"class": "bird", "count": 3}]}
    lines = [record | {"prompt": "a photo of two birds"}, {"tag": "colors", "include": [], "prompt": "a red cup"}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = open_prompt_set(str(file))
    assert found.table["tag"].tolist() == ["counting", "colors"]
    assert found.records == lines


HEADER = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple"
CSV = f"""{HEADER},question_natural_language
COCOval2014_7,"A red, small cup.",,1,0,entity,whole,entity - whole (cup),Is there a cup?
COCOval2014_7,"A red, small cup.",,2,1,attribute,color,"attribute - color (cup, red)",Is the cup red?
partiprompts12,A fox.,,1,0,entity,whole,entity - whole (fox),Is there a fox?
partiprompts12,A fox.,,2,"1,0",other,count,other - count (fox; 1),Is there one fox?
"""


def test_dpg_questions_and_prompts(tmp_path):
    file = tmp_path / "dpg_bench.csv"
    file.write_text(CSV)
    found = open_prompt_set(str(file))
    assert found.prompts == ["A red, small cup.", "A fox."]
    assert found.table["source"].tolist() == ["COCOval", "partiprompts"]
    first = found.questions["COCOval2014_7"]
    assert [(q.id, q.parents, q.category, q.broad) for q in first] == [
        (1, (), "entity - whole", "entity"),
        (2, (1,), "attribute - color", "attribute"),
    ]
    assert found.questions["partiprompts12"][1].parents == (1,)
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "partiprompts12.txt").write_text("A fox.\n")
    assert open_prompt_set(f"dpg={folder}").items == ["partiprompts12"]


def test_the_embedded_set_has_its_categories():
    found = open_prompt_set("embedded", 12)
    assert len(found.prompts) == 12
    assert set(found.table["category"]) <= {"plain", "count", "size", "position", "size and position"}


def test_any_other_list(tmp_path):
    (tmp_path / "mine.txt").write_text("a castle\na red circle on a blue background\n")
    found = open_prompt_set(str(tmp_path / "mine.txt"))
    assert (found.prompts[0], found.categories) == ("a castle", ())
    (tmp_path / "mine.csv").write_text("prompt,note\na castle,x\n")
    assert open_prompt_set(str(tmp_path / "mine.csv")).prompts == ["a castle"]


def test_what_is_not_there_or_not_as_published(tmp_path):
    with pytest.raises(DataError, match=r"no prompt file or set nothing\.txt"):
        open_prompt_set("nothing.txt")
    with pytest.raises(DataError, match='Did you mean "geneval"'):
        open_prompt_set("genevl=somewhere")
    (tmp_path / "x.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match="not geneval as published"):
        read_prompt_set(tmp_path / "x.jsonl", "geneval")
    (tmp_path / "photo.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="JSON list of prompts"):
        open_prompt_set(str(tmp_path / "photo.json"))


def test_published_numbers_say_in_what_a_run_differs():
    run = {"n_prompts": 500, "steps": 20, "guidance_scale": 5.0}
    found = published.beside("pickapic", ["pickscore"], run)
    rows = found[found["source"].str.startswith("SPO")].set_index(["backbone", "model"])["differs"]
    assert rows["SDXL", "SPO"] == ""
    assert rows["SD1.5", "base"] == "guidance_scale 7.5, here 5"
    assert "steps, guidance_scale unknown" in found[found["source"].str.startswith("MaPO")]["differs"].iloc[0]
    assert published.beside("parti", ["pickscore"], run).empty
    assert published.table()["value"][published.table()["scorer"].str.startswith("hps")].max() < 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_published_sets_may_carry_a_byte_order_mark(encoding, tmp_path):
    (tmp_path / "P.TSV").write_bytes("Prompt\tCategory\tChallenge\tNote\r\nnull\tA\tB\t\r\n".encode(encoding))
    assert read_prompt_set(tmp_path / "P.TSV").prompts == ["null"]
    (tmp_path / "anime.json").write_bytes('["a\u2028b", "007"]'.encode(encoding))
    assert read_prompt_set(tmp_path / "anime.json").prompts == ["a\u2028b", "007"]
