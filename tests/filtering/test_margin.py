"""Margins, and the score files they come from."""

import numpy as np
import pandas as pd
import pytest

from diffalign.errors import DataError
from diffalign.filtering import margins, read_scores

IDS = [2**62 + 1, 2**62 + 3]  # not representable as float


@pytest.fixture
def scores():
    return pd.DataFrame(
        {
            "example_id": IDS * 2,
            "scorer": ["pickscore"] * 2 + ["hpsv2"] * 2,
            "score_chosen": [21.0, 19.0, 0.3, 0.2],
            "score_rejected": [20.0, 22.0, 0.2, 0.25],
        }
    )


def save(table, path):
    writers = {".parquet": table.to_parquet, ".csv": table.to_csv}
    if path.suffix in writers:
        writers[path.suffix](path, index=False)
    else:
        table.to_json(path, orient="records", lines=True)
    return path


def test_margin_modes():
    chosen, rejected = np.array([21.0, 19.0, np.nan]), np.array([20.0, 22.0, 1.0])
    assert np.array_equal(margins(chosen, rejected), [1, 3, np.nan], equal_nan=True)
    assert np.array_equal(margins(chosen, rejected, "signed"), [1, -3, np.nan], equal_nan=True)
    assert np.array_equal(margins(chosen, rejected, "signed", cap=2.0), [1, -2, np.nan], equal_nan=True)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_one_scorer_is_read_from_any_format(scores, tmp_path, suffix):
    found = read_scores(save(scores, tmp_path / f"scores{suffix}"), "pickscore")
    assert found.index.tolist() == IDS
    assert found["score_chosen"].tolist() == [21.0, 19.0]


def test_several_scorers_must_be_told_apart(scores, tmp_path):
    path = save(scores, tmp_path / "scores.parquet")
    with pytest.raises(DataError, match=r"Say which, e.g. --scorer pickscore"):
        read_scores(path)
    with pytest.raises(DataError, match=r'no scores of "hpsv2.1".*Did you mean "hpsv2"'):
        read_scores(path, "hpsv2.1")
    path = save(scores[scores.scorer == "hpsv2"].drop(columns="scorer"), tmp_path / "one.parquet")
    assert read_scores(path)["score_chosen"].tolist() == [0.3, 0.2]
    with pytest.raises(DataError, match="Leave out --scorer"):
        read_scores(path, "hpsv2")


def test_faults_of_a_score_file_are_named(scores, tmp_path):
    with pytest.raises(DataError, match="There is no file"):
        read_scores(tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"ending in .parquet"):
        read_scores(save(scores, tmp_path / "scores.csv").rename(tmp_path / "scores.xls"))
    with pytest.raises(DataError, match=r"lacks the column.*score_chosen"):
        read_scores(save(scores.drop(columns="score_chosen"), tmp_path / "a.parquet"))
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="Cannot read"):
        read_scores(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="more than one score"):
        read_scores(save(scores.drop(columns="scorer"), tmp_path / "c.parquet"))
    broken = save(scores.assign(score_chosen=[np.nan, 1, 1, 1]), tmp_path / "d.parquet")
    with pytest.raises(DataError, match="1 scores that are not finite"):
        read_scores(broken, "pickscore")
    with pytest.raises(DataError, match="no rows"):
        read_scores(save(scores[:0], tmp_path / "e.parquet"))
