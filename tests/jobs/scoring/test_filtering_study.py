"""The filtering study: the flipped labels are those that training would flip, and a selection counts them right."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from benchmarks import filtering_study as study
from diffalign.data import open_pairs
from diffalign.data.annotated import flips

LIMIT = 80


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Return a folder with the first pairs, 30 % of them flipped."""
    return study.flip_pairs(tmp_path_factory.mktemp("study") / "noisy", limit=LIMIT)


def test_flips_are_those_of_training(noisy):
    clean, turned = (list(open_pairs(str(source), max_samples=LIMIT)) for source in (study.PAIRS, noisy))
    expected = flips(np.array([row.example_id for row in clean]), 0.3, 0)
    swapped = [a.chosen.digest == b.rejected.digest != b.chosen.digest for a, b in zip(clean, turned, strict=True)]
    assert swapped == expected.tolist()
    assert 0.15 < np.mean(swapped) < 0.45
    table = pq.read_table(noisy / "train.parquet").to_pandas()
    assert table["flipped"].tolist() == swapped
    wins = np.where(table["label_0"] > table["label_1"], table["image_0_uid"], table["image_1_uid"])
    assert table["best_image_uid"].tolist() == wins.tolist()


def test_selections_and_their_share_of_flips(noisy, tmp_path):
    everything, overall = study.flipped_share(noisy)
    shares = {}
    for name in ("fifa-agreed", "random"):
        chosen = study.choose(name, noisy, tmp_path, keep=0.25)
        count, shares[name] = study.flipped_share(chosen)
        assert count == everything // 4
        kept = pd.read_parquet(tmp_path / name / "train.parquet")
        assert shares[name] == kept["flipped"].mean()
    assert everything == LIMIT
    assert shares["fifa-agreed"] < 0.5 * overall < shares["random"]


def test_another_selection_is_another_run(noisy, tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(study, "row_of", lambda name, folder, changes: runs.append(folder) or SCORES)
    row = study.measure("everything", "", noisy, tmp_path)
    assert row["pairs"] == LIMIT
    other = tmp_path / noisy.name
    other.mkdir()
    pq.write_table(pq.read_table(noisy / "train.parquet").slice(1), other / "train.parquet")
    fewer = study.measure("fewer", "--method random", other, tmp_path)
    assert runs[0] != runs[1]
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    study.write([row, fewer], None)
    assert f"| {100 * row['flipped_share']:.1f}% |" in (tmp_path / "filtering.md").read_text(encoding="utf8")
    assert (tmp_path / "filtering.png").stat().st_size > 1000


ORACLE = {"base": 0.64, "aligned": 0.65, "gain_low": 0.0, "gain_high": 0.02, "win_rate": 0.6, "low": 0.5, "high": 0.7}
SCORES = {"scores": {"oracle": ORACLE}}
