"""`diffalign evaluate`: one command, several models; its numbers worked out again with pandas alone."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import binomtest
from typer.testing import CliRunner

from diffalign.cli import app
from diffalign.evaluation import Manifest, hps_benchmark
from tests.jobs.material import write_run

PROMPTS = [
    "a red circle on a blue background",
    "two green stars on a black background",
    "a pink square on a white background",
    "three cyan crosses on a gray background",
    "an orange diamond on a purple background",
]


@pytest.fixture(scope="session")
def second_run(tiny_sdxl, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "mapo", tiny_sdxl, seed=2)


@pytest.fixture(scope="session")
def request_words(lora_run, second_run, scorer_folders, tmp_path_factory):
    """Return a function of the output folder that words a request."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    def words(out):
        scorers = f"oracle,pickscore={scorer_folders['pickscore']}"
        options = ("--prompts", prompts, "--seeds", "0-1", "--with", scorers, "--out", out)
        small = ("--steps", "2", "--device", "cpu", "--resamples", "300")
        return ["evaluate", lora_run.folder, second_run.folder, "--show-base", *options, *small]

    return words


@pytest.fixture(scope="session")
def evaluated(request_words, tmp_path_factory):
    """Return the folder of a finished evaluation; treat it as read-only."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    result = CliRunner().invoke(app, [str(word) for word in request_words(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out


def recomputed(scores, model, scorer):
    """Return the numbers of one model and scorer from scores.parquet, with none of diffalign's code."""
    wide = scores[scores["scorer"] == scorer].pivot_table(index="prompt_id", columns="model", values="score")
    a, b = wide[model].to_numpy(), wide["base"].to_numpy()
    win = np.where(a > b, 1.0, np.where(a == b, 0.5, 0.0))
    drawn = np.random.default_rng(0).integers(0, len(a), size=(300, len(a)))
    resampled = win[drawn].mean(axis=1)
    wins, losses = int((a > b).sum()), int((a < b).sum())
    return {
        "mean": a.mean(),
        "median": np.median(a),
        "baseline_mean": b.mean(),
        "baseline_median": np.median(b),
        "mean_difference": (a - b).mean(),
        "win_rate": win.mean(),
        "ci_low": np.quantile(resampled, 0.025),
        "ci_high": np.quantile(resampled, 0.975),
        "wins": wins,
        "ties": len(a) - wins - losses,
        "losses": losses,
        "p_value": binomtest(wins, wins + losses).pvalue if wins + losses else 1.0,
        "n_prompts": len(a),
        "n_images": 2 * len(a),
    }


def test_base_against_two_aligned_models(evaluated):
    out = evaluated
    scores, table = pd.read_parquet(out / "scores.parquet"), pd.read_csv(out / "summary.csv")
    assert table["model"].tolist() == ["dpo", "dpo", "mapo", "mapo"]
    for row in table.to_dict("records"):
        expected = recomputed(scores, row["model"], row["scorer"])
        assert {key: row[key] for key in expected} == pytest.approx(expected)
    # Holm over all four tests, by hand: the k-th smallest times the number left, never decreasing.
    ranked = table.sort_values("p_value", kind="stable")
    by_hand = np.maximum.accumulate(np.minimum(1, ranked["p_value"].to_numpy() * np.arange(4, 0, -1)))
    assert ranked["p_value_holm"].tolist() == pytest.approx(by_hand.tolist())

    record = json.loads((out / "summary.json").read_text())
    assert record["baseline"] == "base"
    assert record["models"]["mapo"]["scorers"]["oracle"]["win_rate"] == pytest.approx(table.loc[2, "win_rate"])
    assert set(record["models"]["dpo"]["attributes"]["oracle"]) >= {"color", "shape", "background"}
    categories = pd.read_csv(out / "categories.csv")
    part = categories[(categories["category"] == "count") & (categories["model"] == "dpo")].set_index("scorer")
    chosen = scores[scores["prompt_id"].isin([1, 3])]
    assert part.loc["oracle", "n_prompts"] == 2
    assert part.loc["oracle", "mean"] == pytest.approx(recomputed(chosen, "dpo", "oracle")["mean"])
    assert part.loc["pickscore", "win_rate"] == pytest.approx(recomputed(chosen, "dpo", "pickscore")["win_rate"])
    assert "| mapo | pickscore |" in (out / "summary.md").read_text()
    page = (out / "report.html").read_text()
    assert 'href="report-mapo.html"' in page
    assert "By category" in page
    assert "for looking at 2 models and 2 scorers" in page
    assert (out / "report-mapo.html").is_file()


def test_all_models_draw_from_the_same_noise_which_differs_between_prompts(evaluated):
    drawn = {name: Manifest.read(evaluated / "images" / name) for name in ("base", "dpo", "mapo")}
    seeds = [manifest.table["seed"].tolist() for manifest in drawn.values()]
    assert seeds[0] == seeds[1] == seeds[2]
    assert len(set(seeds[0])) == len(PROMPTS) * 2
    first = {name: manifest.paths[0].read_bytes() for name, manifest in drawn.items()}
    assert len(set(first.values())) == 3


def test_the_report_has_the_curves_and_settings_of_a_run(diffalign, request_words, evaluated, lora_run, tmp_path):
    run = tmp_path / "dpo"
    shutil.copytree(lora_run.folder, run)
    lines = [json.dumps({"step": step, "loss": 1 / step, "implicit_accuracy": 0.6}) for step in range(1, 9)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    shutil.copytree(evaluated / "images", tmp_path / "out" / "images")
    words = request_words(tmp_path / "out")
    assert diffalign(words[0], run, *words[2:])[0] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Training</h2>" in page
    assert "Implicit accuracy by optimiser step" in page
    assert "pretrained_model_name_or_path" in page
    other = (tmp_path / "out" / "report-mapo.html").read_text()
    assert "<h2>Training</h2>" not in other  # nothing was logged
    assert "pretrained_model_name_or_path" in other


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def test_an_interrupted_evaluation_goes_on(diffalign, request_words, evaluated, tmp_path):
    shutil.copytree(evaluated, tmp_path / "out")
    paths = Manifest.read(tmp_path / "out" / "images" / "dpo").paths
    before, written = pixels(paths[3]), paths[4].stat().st_mtime_ns
    paths[3].unlink()
    assert diffalign(*request_words(tmp_path / "out"))[0] == 0
    assert np.abs(pixels(paths[3]) - before).max() <= 4  # another batch size: float rounding
    assert paths[4].stat().st_mtime_ns == written


def test_folders_of_pictures_are_models_too(diffalign, request_words, evaluated, tmp_path):
    folders = [evaluated / "images" / name for name in ("base", "dpo", "mapo")]
    words = [word for word in request_words(tmp_path / "again")[3:] if word != "--show-base"]
    assert diffalign("evaluate", *folders, *words, "--baseline", "dpo")[0] == 0
    again = pd.read_parquet(tmp_path / "again" / "scores.parquet")
    pd.testing.assert_frame_equal(again, pd.read_parquet(evaluated / "scores.parquet"))
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["baseline"] == "dpo"

    code, said = diffalign("evaluate", *folders, *words, "--noise", "shared")
    assert code == 2
    assert "lacks" in said
    assert "with seed 0" in said or "with seed 1" in said


def test_mistakes_are_found_before_anything_is_drawn(diffalign, request_words, lora_run, tmp_path):
    for more, message in (
        (("--baseline", "dpoo"), 'Did you mean "dpo"'),
        (("--with", "oracel"), 'Did you mean "oracle"'),
        (("--noise", "none"), "--noise must be one of own, shared"),
    ):
        code, said = diffalign(*request_words(tmp_path / "out"), *more)
        assert code == 2
        assert message in said
    words = [word for word in request_words(tmp_path / "out")[3:] if word != "--show-base"]
    code, said = diffalign("evaluate", lora_run.folder, *words)
    assert code == 2
    assert "add its base with --show-base" in said
    assert not (tmp_path / "out").exists()


def test_the_benchmark_of_hpsv2(diffalign, request_words, scorer_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(hps_benchmark, "PROMPTS", 10)
    monkeypatch.setattr(hps_benchmark, "STYLES", ("photo",))
    monkeypatch.setattr("diffalign.evaluation.prompt_sets.STYLES", ("photo",))
    (tmp_path / "photo.json").write_text(json.dumps([f"a cat {number}" for number in range(10)]))
    words = request_words(tmp_path / "out")
    words[words.index("--prompts") + 1] = tmp_path / "photo.json"
    words[words.index("--with") + 1] = f"hpsv2={scorer_folders['hpsv2']}"
    words[words.index("--seeds") + 1] = "0"
    code, said = diffalign(*words)
    assert code == 0
    assert "What papers report. hpsv2, x 100" in said
    assert re.search(r"SD1.4 +27.27 +26.95 +HPSv2 README", said)
    table = pd.read_csv(tmp_path / "out" / "hps_benchmark.csv")
    scores = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    own = scores[scores["model"] == "dpo"]["score"]
    row = table[(table["model"] == "dpo") & (table["style"] == "photo")].iloc[0]
    assert row["score"] == pytest.approx(100 * own.mean())
    assert row["spread"] == pytest.approx(100 * own.std(ddof=0))
