"""Numbers of papers: as the reference has them, and in the report beside those of a run."""

import pandas as pd
import pytest

from diffalign.evaluation import Evaluation, published, write_report
from tests.evaluation.test_report import Page

GENEVAL = ("overall", "single_object", "two_object", "counting", "colors", "position", "color_attr")
OWN = ["model", "scorer", "part", "statistic", "value"]


def test_every_number_says_who_vouches_for_it_and_is_there_once():
    table = published.table()
    assert set(table["trust"]) == set(published.TRUST)
    assert set(table["statistic"]) == {"mean", "median", published.BENCHMARK}
    assert not table.duplicated(["source", "backbone", "model", "scorer", "part", "statistic", "prompt_set"]).any()
    assert table["value"].between(-1, 25).all()
    benchmarks = table[table["statistic"] == published.BENCHMARK]
    assert benchmarks["value"].between(0, 1).all()
    assert benchmarks["part"].notna().all()
    assert table[table["scorer"].str.startswith("hps")]["value"].max() < 1


@pytest.mark.parametrize(
    ("scorer", "whole", "tolerance"),
    [("geneval", "overall", 0.007), ("hpsv2", "all", 1e-4), ("hpsv2.1", "all", 1e-4)],
)
def test_the_whole_of_a_benchmark_is_the_mean_of_its_parts(scorer, whole, tolerance):
    table = published.table()
    table = table[(table["scorer"] == scorer) & (table["statistic"] == published.BENCHMARK)]
    wide = table.pivot_table(index=["backbone", "model"], columns="part", values="value", dropna=False)
    wide = wide.dropna(subset=[whole])
    parts = wide.drop(columns=whole).dropna()
    assert len(parts) >= 4
    assert (parts.mean(axis=1) - wide.loc[parts.index, whole]).abs().max() < tolerance


def geneval(model, *values):
    return [(model, "geneval", part, published.BENCHMARK, value) for part, value in zip(GENEVAL, values, strict=False)]


def test_a_benchmark_is_set_beside_whatever_the_prompts_were_and_warns():
    run = {"n_prompts": 24, "steps": 20}
    found = published.beside("embedded", ["oracle", "geneval"], run, ["geneval"])
    assert set(found["scorer"]) == {"geneval"}
    own = pd.DataFrame(geneval("base", 0.51) + geneval("dpo", 0.717), columns=OWN)
    [table] = published.side_by_side(found, own, {"geneval": "judged by the oracle"})
    assert table.title == "geneval, x 100"
    assert table.columns == ("overall",)
    assert table.warning == "judged by the oracle"
    lines = {line.model: line for line in table.lines}
    assert list(lines)[:2] == ["base", "dpo"]
    assert lines["dpo"].cells == ("71.7",)
    assert lines["RankDPO (SD3-M)"].cells == ("74",)
    assert lines["RankDPO (SD3-M)"].source == "RankDPO (2410.18013)"
    assert lines["RankDPO (SD3-M)"].note == "n_prompts 553, here 24; steps unknown"


def test_tasks_that_a_paper_does_not_give_stay_empty():
    own = pd.DataFrame(geneval("base", 0.5, *[0.4] * 6), columns=OWN)
    [table] = published.side_by_side(published.beside("geneval", [], {}, ["geneval"]), own)
    assert table.columns == GENEVAL
    cells = {line.model: line.cells for line in table.lines}
    assert cells["base (SD2.1)"] == ("50", "", "", "", "", "", "")
    assert cells["base (SD1.5)"][1] == "97"


def test_means_and_medians_do_not_mix():
    found = published.beside("hpdv2", ["pickscore", "aesthetic"], {"n_prompts": 3200})
    own = [
        ("base", name, "", statistic, 5.0) for name in ("pickscore", "aesthetic") for statistic in ("mean", "median")
    ]
    [table] = published.side_by_side(found, pd.DataFrame(own, columns=OWN))
    assert table.title == "Median over prompts"  # SmPO's; HPSv2's README is a benchmark
    assert all("unverified" in line.note for line in table.lines if line.source)


def test_the_report_shows_source_caveat_and_trust(tmp_path):
    rows = [(i, "a cat", 0, model, "pickscore", 20.0 + i) for i in range(3) for model in ("base", "dpo")]
    scores = pd.DataFrame(rows, columns=["prompt_id", "prompt", "seed", "model", "scorer", "score"])
    evaluation = Evaluation(scores=scores, baseline="base")
    own = pd.DataFrame([("dpo", "pickscore", "", "mean", 21.0)], columns=OWN)
    found = published.beside("pickapic", ["pickscore"], {"steps": 30})
    tables = published.side_by_side(found, own, {})
    file = write_report(tmp_path / "r.html", evaluation.comparisons["dpo"], evaluation=evaluation, published=tables)
    text = " ".join(Page(file.read_text()).text.split())
    section = text[text.index("Beside published numbers") : text.rindex("Distributions")]
    assert "dpo 21 this run" in section
    assert "D3PO (SD1.5) 20.76 SPO (2406.04314)unverified steps 20, here 30" in section
    assert "MaPO (SDXL) 22.9 MaPO (2406.06424)paper steps unknown; its model card" in section
    assert "third party, read in somebody else's note" in section
    bare = write_report(tmp_path / "bare.html", evaluation.comparisons["dpo"])
    assert "Beside published numbers" not in bare.read_text()
