"""Pairs: scores beside the human label, accuracy by rule of ties, calibration, and broken images."""

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import reward_models
from diffalign.data import open_pairs
from diffalign.errors import DataError, UserError
from diffalign.evaluation import accuracy as published
from diffalign.evaluation.calibration import expected_calibration_error, reliability
from diffalign.jobs.scoring import score
from diffalign.jobs.scoring.pairs import TieRule, summary
from tests.jobs.material import PROMPTS, png, write_pairs

QUIET = Console(quiet=True)


@pytest.fixture
def pairs(tmp_path):
    rows = [(png(30 * i, i), png(250 - 30 * i, 50 + i), float(i % 2), PROMPTS[i % 2]) for i in range(6)]
    same = png(128)
    return write_pairs(tmp_path / "pairs.parquet", [*rows, (same, same, 1.0, PROMPTS[0])])


@pytest.fixture
def judge(scorer_folders):
    return f"hpsv2={scorer_folders['hpsv2']}"


def test_pairs_get_probabilities_and_agreement(pairs, judge, scorer_folders, tmp_path):
    table = score.score_pairs(str(pairs), tmp_path / "s.parquet", [judge], console=QUIET)
    source = open_pairs(pairs)
    scorer = reward_models.load("hpsv2", scorer_folders["hpsv2"])
    chosen, rejected = ([ref.content for ref in side] for side in zip(*(row.images for row in source), strict=True))
    expected = scorer.compare(chosen, rejected, [row.prompt for row in source])
    assert table["probability"].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert table["example_id"].tolist() == [row.example_id for row in source]
    assert table["agreement"].tolist() == [float(p > 0.5) if p != 0.5 else 0.5 for p in expected]
    assert table["agreement"].tolist()[-1] == 0.5
    assert len(set(table["agreement"])) == 3
    pd.testing.assert_frame_equal(score.score_source(open_pairs(pairs), [scorer], 3), table, rtol=1e-4)
    written = pd.read_csv(tmp_path / "s.accuracy.csv").iloc[0]
    assert written["accuracy"] == pytest.approx(table["agreement"].mean())
    assert written["calibration_error"] == pytest.approx(expected_calibration_error(table["probability"]))
    assert pd.read_csv(tmp_path / "s.calibration.csv")["pairs"].sum() == 7


def test_tie_rules_are_those_of_the_papers():
    won, lost = np.array([3.0, 2.0, 1.0, 1.0, 5.0]), np.array([1.0, 2.0, 4.0, 1.0, 4.9])
    p = 1 / (1 + np.exp(lost - won))
    table = pd.DataFrame({"scorer": "s", "probability": p, "agreement": (won > lost) + 0.5 * (won == lost)})
    found = {rule: summary(table, TieRule(rule)).loc[0, "accuracy"] for rule in ("half", "wrong", "right", "exclude")}
    pairs = list(zip(won, lost, strict=True))
    assert found["half"] == pytest.approx(0.6)
    assert found["wrong"] == pytest.approx(np.mean([published.ranked_accuracy(pair, [1, 2]) for pair in pairs]))
    assert found["right"] == pytest.approx(np.mean([published.inversion_score(pair, [2, 1]) for pair in pairs]))
    assert found["exclude"] == pytest.approx(2 / 3)
    near = summary(table, TieRule("pickscore", 0.1)).loc[0, "accuracy"]  # 5.0 against 4.9 is a tie now
    assert near == pytest.approx((1 + 0.5 + 0 + 0.5 + 0.5) / 5)
    assert summary(table, TieRule("pickscore")).loc[0, "accuracy"] == pytest.approx(0.6)


@pytest.mark.parametrize(("name", "threshold"), [("halve", 0.0), ("half", 0.1), ("pickscore", 1.5)])
def test_unusable_tie_rules_are_named(name, threshold):
    with pytest.raises(UserError, match="tie"):
        TieRule(name, threshold)


def test_calibration_is_the_gap_between_confidence_and_accuracy():
    p = [0.9, 0.9, 0.9, 0.1, 0.52, 0.5]  # three right and one wrong at confidence 0.9
    table = reliability(p)
    assert table["pairs"].tolist() == [2, 4]
    assert table["accuracy"].tolist() == [0.75, 0.75]
    assert expected_calibration_error(p) == pytest.approx((2 * abs(0.75 - 0.51) + 4 * abs(0.75 - 0.9)) / 6)
    rng = np.random.default_rng(0)
    honest = rng.uniform(0.5, 1, 20_000)
    chosen = np.where(rng.uniform(size=20_000) < honest, honest, 1 - honest)
    assert expected_calibration_error(chosen) < 0.02
    with pytest.raises(DataError, match="probability"):
        reliability([1.2])


def test_a_broken_image_takes_its_pair_out(pairs, judge, tmp_path):
    rows = [(png(0), b"no picture", 1.0, PROMPTS[0]), (png(10), png(99), 1.0, PROMPTS[1])]
    file = write_pairs(tmp_path / "broken.parquet", rows)
    table = score.score_pairs(str(file), tmp_path / "s.parquet", [judge], console=QUIET)
    assert table["prompt"].tolist() == [PROMPTS[1]]
    assert len((tmp_path / "s.broken.jsonl").read_text().splitlines()) == 1
    with pytest.raises(DataError, match=r"broken\.parquet, row 0: it is not a picture.*--skip-broken"):
        score.score_pairs(str(file), tmp_path / "t.parquet", [judge], skip_broken=False, console=QUIET)
    source = open_pairs(file, on_error="skip")
    assert len(score.score_source(source, [reward_models.load(*judge.split("="))])) == 1
    assert source.counts.skipped == {"broken image": 1}
