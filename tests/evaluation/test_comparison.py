"""Two score tables become win rates, intervals and files."""

import json
import math

import pandas as pd
import pytest

from diffalign.errors import DataError, UserError
from diffalign.evaluation import Bootstrap, Comparison, pick_prompts
from diffalign.evaluation.statistics import paired_bootstrap


def table(model, scores, *, prompts=None, seeds=None, scorer="s"):
    count = len(scores)
    ids = prompts or list(range(count))
    return pd.DataFrame(
        {
            "prompt_id": ids,
            "prompt": [f"prompt {index}" for index in ids],
            "seed": seeds or [0] * count,
            "model": model,
            "scorer": scorer,
            "score": scores,
        }
    )


def test_counts_means_and_intervals(comparison):
    result = comparison.results["brightness"]
    assert (result.wins, result.ties, result.losses) == (3, 1, 1)
    assert result.win_rate == pytest.approx(0.7)
    assert result.tie_share == pytest.approx(0.2)
    assert result.mean_difference == pytest.approx(result.aligned - result.base)
    assert result.mean_difference == pytest.approx((50 + 20 + 0 - 20 + 10) / 5 / 255, abs=1e-3)
    assert result.p_value == pytest.approx(0.625)  # 3 of 4: 2 * (4 + 1) / 16
    assert result.p_value_holm >= result.p_value
    rows = comparison.per_prompt("brightness")
    expected = paired_bootstrap(rows["aligned"], rows["base"], n=500)
    assert (result.ci_low, result.ci_high) == expected
    assert result.ci_low < 0.7 < result.ci_high


def test_seeds_of_a_prompt_count_once():
    # Prompt 0 has four pictures and prompts 1 and 2 one each: over pictures the aligned model would win 4 of 6.
    ids, seeds = [0, 0, 0, 0, 1, 2], [0, 1, 2, 3, 0, 0]
    base = table("base", [0.0, 0.0, 0.0, 0.0, 1.0, 1.0], prompts=ids, seeds=seeds)
    aligned = table("dpo", [1.0, 1.0, 1.0, 1.0, 0.0, 0.0], prompts=ids, seeds=seeds)
    result = Comparison.from_tables(base, aligned).results["s"]
    assert (result.n_prompts, result.n_images) == (3, 6)
    assert result.win_rate == pytest.approx(1 / 3)
    assert result.base == pytest.approx(2 / 3)


def test_rows_are_paired_by_key_not_by_position():
    base, aligned = table("base", [1.0, 5.0, 3.0]), table("dpo", [1.5, 5.5, 3.5])
    shuffled = aligned.iloc[[2, 0, 1]].reset_index(drop=True)
    assert Comparison.from_tables(base, shuffled).results["s"].wins == 3


def test_attributes_are_compared_where_they_are_mentioned(comparison):
    results = comparison.attribute_results["brightness"]
    assert {name: result.n_prompts for name, result in results.items()} == {"red": 2, "green": 2}
    assert results["red"].mean_difference == pytest.approx(25 / 255, abs=0.01)


@pytest.mark.parametrize(
    ("base", "aligned", "message"),
    [
        (table("base", [1.0, 2.0]), table("dpo", [1.0]), r'1 scores have no partner: "dpo" lacks s of prompt 1'),
        (table("base", [1.0]), table("dpo", [1.0], scorer="other"), "no partner"),
        (table("base", [1.0]), table("base", [1.0]), 'Both score tables are of model "base"'),
        (table("base", [1.0, 2.0], prompts=[0, 0]), table("dpo", [1.0]), '"base" has several scores'),
        (table("base", [1.0]).assign(prompt="x"), table("dpo", [1.0]), "Prompt 0 is 'x' for one model"),
    ],
)
def test_tables_that_do_not_pair(base, aligned, message):
    with pytest.raises(DataError, match=message):
        Comparison.from_tables(base, aligned)


def test_headline_summary_and_table_say_the_same(comparison, tmp_path):
    comparison.write(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for scorer, result in comparison.results.items():
        assert summary["scorers"][scorer]["verdict"] == result.verdict == "undecided"
        assert summary["scorers"][scorer]["sentence"] == comparison.describe(scorer)
        assert result.evidence.claim(scorer, "base", "dpo") == "No difference shown"


def test_few_prompts_are_called_few(comparison):
    assert "only 5 prompts the interval itself is rough" in comparison.describe("brightness")
    one = Comparison.from_tables(table("base", [1.0]), table("dpo", [2.0]))
    assert one.describe("s").endswith("One prompt alone says nothing about others.")
    assert math.isnan(one.results["s"].ci_low)
    assert one.results["s"].verdict == "undecided"


def test_written_files_and_reading_them_back(comparison, tmp_path):
    comparison.write(tmp_path, {"pairs_per_second": 12.5})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["pairs_per_second"] == 12.5
    assert summary["scorers"]["brightness"]["win_rate"] == pytest.approx(0.7)
    assert summary["n_prompts"] == 5
    assert summary["settings"]["guidance_scale"] == 5.0
    assert len(pd.read_csv(tmp_path / "scores.csv")) == len(pd.read_parquet(tmp_path / "scores.parquet")) == 20
    again = Comparison.read(tmp_path)
    assert again.results == comparison.results
    assert again.attribute_results == comparison.attribute_results


def test_a_single_prompt_is_valid_json(tmp_path):
    Comparison.from_tables(table("base", [1.0]), table("dpo", [2.0])).write(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["scorers"]["s"]["ci_low"] is None


def test_extra_keys_cannot_hide_results(comparison, tmp_path):
    with pytest.raises(UserError, match='its own "scorers"'):
        comparison.write(tmp_path, {"scorers": {}})


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no readable comparison"):
        Comparison.read(tmp_path)


def test_an_unknown_scorer_is_named(comparison):
    with pytest.raises(UserError, match=r'"brightnes".*Did you mean "brightness"'):
        comparison.per_prompt("brightnes")


@pytest.mark.parametrize(
    ("how", "expected"), [("spread", [0, 4, 3]), ("wins", [0, 1, 4]), ("losses", [3, 2, 4]), ("first", [0, 1, 2])]
)
def test_prompts_to_show(comparison, how, expected):
    # Differences by prompt: +50, +20, 0, -20, +10.
    assert pick_prompts(comparison, "brightness", 3, how) == expected
    assert len(pick_prompts(comparison, "brightness", 99, how)) == 5


def test_level_widens_the_interval():
    base, aligned = table("base", [0.0] * 30), table("dpo", [1.0, -0.5] * 15)
    narrow = Comparison.from_tables(base, aligned, bootstrap=Bootstrap(level=0.5)).results["s"]
    wide = Comparison.from_tables(base, aligned, bootstrap=Bootstrap(level=0.99)).results["s"]
    assert wide.difference_low < narrow.difference_low < narrow.difference_high < wide.difference_high
    assert wide.ci_low < narrow.ci_low < narrow.ci_high < wide.ci_high
    assert wide.wilson_low < narrow.wilson_low < narrow.wilson_high < wide.wilson_high
