import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data import Annotations
from diffalign.errors import DataError


def write(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def long(tmp_path):
    """Return a file as `diffalign score` writes it for two scorers."""
    return write(
        tmp_path / "scores.parquet",
        example_id=[30, 10, 20] * 2, prompt=["x"] * 6, scorer=["pickscore"] * 3 + ["hpsv2"] * 3,
        score_chosen=[3.0, 1.0, 2.0, 0.3, 0.1, 0.2], score_rejected=[0.0, 0.5, 9.0, 0.0, 0.05, 0.9],
        probability=[0.5] * 6, agreement=[1.0] * 6,
    )  # fmt: skip


def test_a_scorer_is_chosen_and_rows_are_found_by_id(long):
    read = Annotations.read(long, "hpsv2")
    assert read.ids.tolist() == [10, 20, 30]
    assert read.scores.tolist() == [[0.1, 0.05], [0.2, 0.9], [0.3, 0.0]]
    assert read.weights is None
    assert read.rows(np.array([30, 10, 30])).tolist() == [2, 0, 2]


def test_several_scorers_need_a_choice(long):
    with pytest.raises(DataError, match=r"holds the scores of hpsv2, pickscore: say with `scorer`"):
        Annotations.read(long)
    with pytest.raises(DataError, match=r'no scores of "pickscor", but of hpsv2, pickscore.*Did you mean "pickscore"'):
        Annotations.read(long, "pickscor")


def test_one_scorer_needs_none(tmp_path):
    columns = {"example_id": [2, 1], "score_chosen": [1.0, 2.0], "score_rejected": [0.0, 3.0]}
    plain = Annotations.read(write(tmp_path / "a.parquet", **columns))
    named = Annotations.read(write(tmp_path / "b.parquet", **columns, scorer=["x", "x"]))
    assert plain.scores.tolist() == named.scores.tolist() == [[2.0, 3.0], [1.0, 0.0]]


def test_weights_alone_and_with_scores(tmp_path):
    alone = Annotations.read(write(tmp_path / "a.parquet", example_id=[2, 1], weight=[0.5, 3]))
    assert (alone.scores, alone.weights.tolist()) == (None, [3.0, 0.5])
    scores = {"score_chosen": [1.0, 2.0], "score_rejected": [0.0, 3.0]}
    both = Annotations.read(write(tmp_path / "b.parquet", example_id=[2, 1], weight=[0, 3], **scores))
    assert (both.scores.tolist(), both.weights.tolist()) == ([[2.0, 3.0], [1.0, 0.0]], [3, 0])


def test_missing_pairs_are_counted_and_the_command_named(long):
    read = Annotations.read(long, "pickscore")
    command = "diffalign score DATA --out FILE --with pickscore"
    with pytest.raises(DataError, match=rf"lacks 2 of 3 pairs \(the first is pair 1, example_id 11\).*{command}"):
        read.rows(np.array([10, 11, 99]))
    empty = Annotations("none", np.array([], dtype=np.int64), np.empty((0, 2)))
    with pytest.raises(DataError, match="none lacks 1 of 1 pairs"):
        empty.rows(np.array([10]))


def test_a_pair_that_stands_twice_in_the_data(tmp_path):
    columns = {"example_id": [1, 2, 1], "score_rejected": [0.0, 0.0, 0.0]}
    read = Annotations.read(write(tmp_path / "a.parquet", score_chosen=[0.2, 0.5, 0.2000001], **columns))
    assert read.ids.tolist() == [1, 2]
    with pytest.raises(DataError, match="rows 0 and 2: example_id 1 stands for different values"):
        Annotations.read(write(tmp_path / "b.parquet", score_chosen=[0.2, 0.5, 0.3], **columns))


GOOD = {"example_id": [1, 2], "score_chosen": [1.0, 2.0], "score_rejected": [0.0, 1.0]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (GOOD | {"score_chosen": [1.0, None]}, 'row 1: "score_chosen" is None, expected a finite number'),
        (GOOD | {"score_rejected": [float("inf"), 1.0]}, 'row 0: "score_rejected" is inf'),
        (GOOD | {"score_chosen": ["a", "b"]}, '"score_chosen" holds string, expected numbers'),
        (GOOD | {"weight": [1.0, -2.0]}, r"row 1: the weight is -2\.0, expected a number of at least 0"),
        ({"score_chosen": [1.0], "score_rejected": [1.0]}, "needs the columns .* it has score_chosen, score_rejected"),
        ({"example_id": [1], "score_chosen": [1.0]}, "needs the columns .*Make it with: diffalign score"),
        ({"example_id": [1], "weight": [1.0], "score_chosen": [1.0]}, "needs the columns"),
        ({"example_id": [1]}, "needs the columns"),
    ],
)
def test_faulty_files_name_row_and_fix(tmp_path, columns, message):
    with pytest.raises(DataError, match=rf"a\.parquet.*{message}"):
        Annotations.read(write(tmp_path / "a.parquet", **columns))


def test_no_file_and_no_parquet_file(tmp_path):
    with pytest.raises(DataError, match=r"no file .*a\.parquet\. Make it with: diffalign score"):
        Annotations.read(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_text("example_id,weight")
    with pytest.raises(DataError, match="no readable parquet file"):
        Annotations.read(tmp_path / "a.parquet")
