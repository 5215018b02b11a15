"""The comparison of methods: its plan, what it says of made-up runs, and one real one of two steps."""

import argparse
import csv
import json
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import method_progress, method_results, method_runs, methods
from benchmarks.fingerprints import differences
from benchmarks.method_plan import MODELS, TRIALS, Request, Run, best_settings, chosen, spaces
from diffalign import config as configuration
from diffalign.errors import ConfigError
from diffalign.evaluation.comparison import Comparison

EVERY = [(model, method) for model in MODELS for method in spaces(model)]


def checked(run):
    """Return the configuration of a run, or raise what is wrong with it."""
    return method_runs.recipe(run.recipe, run.folder, run.changes, run.shared)


@pytest.mark.parametrize(("model", "method"), EVERY, ids=["-".join(names) for names in EVERY])
def test_every_method_has_the_same_budget(model, method, tmp_path):
    request = Request(model=model, output=tmp_path)
    trials = request.trials_of(method)
    configs = [checked(run) for run in trials]
    assert len({run.folder for run in trials}) == len({run.changes for run in trials}) == TRIALS
    (short,) = {config.train.max_train_steps for config in configs}
    last = checked(request.seeds_of(method, trials[-1].settings)[0])
    assert short == pytest.approx(last.train.max_train_steps / 3, abs=2 * last.rollout.updates)
    if not last.is_online:
        assert (short, last.train.max_train_steps) == {"sdxl": (67, 200), "sd3": (83, 250)}[model]
    assert {config.train.seed for config in configs}.isdisjoint(range(request.seeds))
    for run, config in zip(trials, configs, strict=True):
        found = config.model_dump()
        for key, value in run.settings.items():
            section, _, name = key.partition(".")
            assert found[section][name] == value


def test_what_cannot_be_asked_for(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r'no method "inppo"\. Did you mean "inpo"'):
        chosen("sdxl", ["inppo"], tuned=True)
    with pytest.raises(ConfigError, match=r"dpo-full.*has no search space"):
        chosen("sdxl", ["dpo-full"], tuned=True)
    assert chosen("sdxl", ["dpo-full"], tuned=False) == ["dpo-full"]
    with pytest.raises(ConfigError, match="--trials must be 1 to 6, got 7"):
        Request(model="sdxl", output=tmp_path, trials=7)
    (tmp_path / "spaces.yaml").write_text("sdxl:\n  dpo, ipo:\n    objective.beta: [1, 2]\n")
    monkeypatch.setattr("benchmarks.method_plan.SPACES", tmp_path / "spaces.yaml")
    with pytest.raises(ConfigError, match="dpo, ipo has 2 combinations, every method has 6"):
        spaces("sdxl")


def row_with(win_rate, gain=0.0, seconds=10.0):
    oracle = {"base": 0.6, "aligned": 0.6 + gain, "win_rate": win_rate, "low": win_rate - 0.1, "high": win_rate + 0.1}
    return {"scores": {"oracle": oracle}, "seconds": seconds}


def test_the_best_trial(tmp_path):
    trials = Request(model="sdxl", output=tmp_path).trials_of("dpo")
    rows = [row_with(0.5), row_with(0.6, 0.01), row_with(0.6, 0.02), {"failed": "Step 3: not finite", "seconds": 1.0}]
    performed = list(zip(trials, rows, strict=False))
    assert best_settings(performed) == trials[2].settings
    assert best_settings(performed[3:]) is None
    kept = [method_results.trial_of(*trial) for trial in performed[2:]]
    assert kept[0]["settings"] == trials[2].settings
    assert (kept[0]["win_rate"], kept[0]["steps"], kept[0]["gain"]) == (0.6, 67, pytest.approx(0.02))
    assert kept[1]["failed"] == "Step 3: not finite"
    assert "win_rate" not in kept[1]


def test_how_long_it_takes(tmp_path):
    remaining = method_progress.Remaining(processes=2)
    runs = {name: Request(model="sdxl", output=tmp_path).trials_of(name) for name in ("dpo", "inpo")}
    for name, trials in runs.items():
        needed = {(name, "trial"): len(trials), (name, "seed"): 3}
        remaining.add(name, method_progress.Found([], [], Counter(needed), []))
    assert remaining.estimate() is None
    assert str(remaining) == "runs left: 18, how long they take is known after the first"
    remaining.finish(runs["dpo"][0], row_with(0.5, seconds=20.0))
    # 5 trials at 20 s and 3 seeds at three times that; the other method as if it were the same; two at a time
    assert remaining.estimate() == pytest.approx((5 * 20 + 3 * 60 + 6 * 20 + 3 * 60) / 2)
    remaining.finish(runs["inpo"][0], row_with(0.5, seconds=100.0))
    assert remaining.estimate() == pytest.approx((5 * 20 + 3 * 60 + 5 * 100 + 3 * 300) / 2)
    assert str(remaining) == "runs left: 16, about 14:00"


def test_methods_side_by_side():
    both, done = threading.Barrier(2, timeout=30), []

    def meet():
        return both.wait()  # returns only if two are at it at the same time

    methods.in_parallel([meet, meet], 2, done.append)
    assert sorted(done) == [0, 1]

    def fail():
        raise SystemExit("The run ended with exit code 1")

    started = time.monotonic()
    with pytest.raises(SystemExit, match="exit code 1"):
        methods.in_parallel([fail, *[partial(time.sleep, 0.2)] * 20], 1, done.append)
    assert time.monotonic() - started < 3  # all would take 4 s: those not begun are left


def performed(folder, gains, **changes):
    """Return a run with made-up scores: a prompt's pictures are `gains` better than the base's."""
    folder.mkdir(parents=True)
    prompts = np.arange(len(gains))
    base = 0.5 + 0.01 * np.sin(prompts)
    tables = []
    for model, scores in (("base", base), ("aligned", base + np.asarray(gains))):
        columns = {"prompt_id": prompts, "prompt": [f"prompt {i}" for i in prompts], "seed": 7, "model": model}
        parts = [
            pd.DataFrame({**columns, "scorer": name, "score": scores * scale})
            for name, scale in (("oracle", 1.0), ("pickscore", 20.0), ("hpsv2", -1.0))
        ]
        tables.append(pd.concat(parts, ignore_index=True))
    comparison = Comparison.from_tables(*tables)
    comparison.write(folder)
    results = comparison.results
    scores = {
        name: {"base": r.base, "aligned": r.aligned, "win_rate": r.win_rate, "low": r.ci_low, "high": r.ci_high}
        for name, r in results.items()
    }
    costs = {"examples": 6400, "pairs": 3200.0, "images_with_gradient": 1.0, "images_without_gradient": 9.0}
    row = {**costs, "decoded": 0.0, "train_seconds": 64.0, "seconds": 90.0, "scores": scores}
    run = Run("kto", "seed", "tiny/kto", folder, folder.parent, ("train.max_train_steps=200",), {"objective.beta": 250})
    return replace(run, **changes), row


def test_intervals_include_the_seed(tmp_path):
    prompts = np.random.default_rng(0).permutation(200)
    shares = (0.5, 0.6, 0.7)
    runs = [
        performed(tmp_path / f"seed-{seed}", np.where(prompts < 200 * share, 0.1, -0.1))
        for seed, share in enumerate(shares)
    ]
    result = method_results.result_of(runs, settings={}, online=False)
    assert result["of_each_seed"] == [0.5, 0.6, 0.7]
    assert result["win_rate"] == result["pickscore_win_rate"] == pytest.approx(0.6)
    assert result["hpsv2_win_rate"] == pytest.approx(0.4)
    assert result["gain"] == pytest.approx(0.02)
    assert result["beats_base"] == "unclear"
    low, high = result["interval"]
    of_prompts = runs[1][1]["scores"]["oracle"]  # one run at the mean rate, over prompts alone
    assert of_prompts["low"] > 0.5 > low
    assert high - low > 1.2 * (of_prompts["high"] - of_prompts["low"])
    assert (result["images_with_gradient_per_pair"], result["images_without_gradient_per_pair"]) == (2.0, 18.0)
    assert result["seconds_per_pair"] == pytest.approx(0.02)
    sure = [performed(tmp_path / f"sure-{seed}", np.where(prompts < 160, 0.1, -0.1)) for seed in range(3)]
    assert method_results.result_of(sure)["beats_base"] == "yes"
    worse = [performed(tmp_path / f"worse-{seed}", np.where(prompts < 40, 0.1, -0.1)) for seed in range(3)]
    assert method_results.result_of(worse)["beats_base"] == "no"


def test_what_is_written(tmp_path):
    request = Request(model="sdxl", output=tmp_path / "runs", seeds=2)
    gains = np.where(np.arange(50) < 40, 0.1, -0.1)
    kto = [performed(tmp_path / f"kto/seed-{seed}", gains) for seed in range(2)]
    spo = [performed(tmp_path / f"spo/seed-{seed}", -gains, method="spo") for seed in range(2)]
    trial = replace(kto[0][0], kind="trial", tuning=True), row_with(0.55)
    tables = method_results.Tables(
        results=[
            method_results.result_of(spo, settings={"rollout.threshold": 0.1}, online=True),
            method_results.result_of(kto, settings={"objective.beta": 250}, online=False),
        ],
        runs=[*kto, *spo],
        trials=[trial],
        missing=["`dpo`: 6 of 6 trials, 1 of 2 seeds"],
    )
    method_results.write(request, tables, tmp_path / "results")
    text = (tmp_path / "results" / "methods.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert [line.split(" | ")[0] for line in lines] == ["| `kto`", "| `spo` (online)"]
    assert "| beta=250 | 0.5" in lines[0]
    assert "| yes | 0.800 0.800 |" in lines[0]
    assert "| 2.0 + 18.0 | 20 | 1:04 |" in lines[0]
    assert "| no | 0.200 0.200 |" in lines[1]
    assert "* `dpo`: 6 of 6 trials, 1 of 2 seeds" in text
    record = json.loads((tmp_path / "results" / "methods.json").read_text())
    assert [row["method"] for row in record["rows"]] == ["kto", "spo"]
    (kept,) = json.loads((tmp_path / "results" / "methods-trials.json").read_text())
    assert kept["settings"] == {"objective.beta": 250}
    with (tmp_path / "results" / "methods.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3
    assert {(row["method"], row["seed"], row["scorer"]) for row in rows} >= {("kto", "1", "hpsv2")}
    assert (tmp_path / "results" / "methods.png").stat().st_size > 1000
    variant = method_results.result_of(kto, variant="kto-b9", sets=["objective.beta=9"], online=False, tuning=True)
    method_results.write_variants(request, [variant], tmp_path / "results")
    written = (tmp_path / "results" / "methods-variants.md").read_text()
    assert "| `kto-b9` | `kto` | objective.beta=9 | tuning | 0.5" in written
    untuned = replace(request, tuned=False)
    method_results.write(untuned, tables, tmp_path / "results")
    assert "Nothing is tuned" in (tmp_path / "results" / "methods-untuned.md").read_text()
    assert (tmp_path / "results" / "methods.md").read_text() == text


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Return a comparison of DPO on a few pairs and prompts; runs stay in this process, and say what they were."""
    monkeypatch.chdir(method_runs.ROOT)
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    source = pd.read_parquet("assets/tiny-pairs/train.parquet")
    source[source["label_0"] != 0.5].head(24).to_parquet(pairs / "train.parquet")
    recipe = tmp_path / "configs" / "tiny" / "dpo.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(
        f"base: {method_runs.ROOT / 'configs/tiny/dpo.yaml'}\n"
        f"data: {{train_data_dir: {pairs}}}\n"
        "train: {train_batch_size: 4}\n"
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(method_runs.PROMPTS.read_text().splitlines()[:6]) + "\n")
    spaces = tmp_path / "spaces.yaml"
    spaces.write_text("sdxl:\n  dpo: {objective.beta: [1, 2, 3, 4, 5, 6]}\n")
    monkeypatch.setattr("benchmarks.method_plan.SPACES", spaces)
    monkeypatch.setattr(method_runs, "RECIPES", tmp_path / "configs")
    monkeypatch.setattr(method_runs, "PROMPTS", prompts)
    monkeypatch.setattr(method_runs, "N_PROMPTS", 4)
    monkeypatch.setattr(method_runs, "SAMPLING", replace(method_runs.SAMPLING, num_inference_steps=4))
    launched = []

    def launch(words, threads):
        launched.append(Path(words[1]))
        method_runs.main(words)
        return 0

    monkeypatch.setattr(method_runs, "launch", launch)
    return tmp_path, launched


def asked(folder, *words):
    """Return what `python -m benchmarks methods WORDS` asks for, on a few steps."""
    parser = argparse.ArgumentParser()
    methods.add_arguments(parser)
    return parser.parse_args(
        ["--output", str(folder / "runs"), "--steps", "2", "--seeds", "1", "--trials", "1", *words]
    )


def test_a_small_comparison(small, capsys):
    folder, launched = small
    results = folder / "results"
    methods.main(asked(folder), results)
    runs = folder / "runs"
    assert launched == [runs / "dpo" / "trials" / "beta-1", runs / "dpo" / "seed-0"]
    told = capsys.readouterr().out
    assert "dpo: runs left: 2, how long they take is known after the first." in told
    assert "dpo, beta=1: win rate" in told
    record = json.loads((results / "methods.json").read_text())
    (row,) = record["rows"]
    assert (row["method"], row["settings"], row["prompts"]) == ("dpo", {"objective.beta": 1}, 4)
    assert (row["examples"], row["pairs"]) == (8, 8)
    assert (row["images_with_gradient_per_pair"], row["images_without_gradient_per_pair"]) == (2.0, 2.0)
    (trial,) = json.loads((results / "methods-trials.json").read_text())
    assert (trial["steps"], trial["settings"]) == (1, {"objective.beta": 1})
    assert not list(runs.glob("dpo/trials/*/checkpoint-*"))

    methods.main(asked(folder), results)  # everything is there
    assert len(launched) == 2
    assert "dpo: no runs left." in capsys.readouterr().out

    pairs = pd.read_parquet(folder / "pairs" / "train.parquet")
    pairs.head(20).to_parquet(folder / "pairs" / "train.parquet")  # another world: rows are left out, then made again
    methods.main(asked(folder, "--table-only"), results)
    assert len(launched) == 2
    assert "dpo/beta-1: other training data: left out." in capsys.readouterr().out
    assert json.loads((results / "methods.json").read_text())["rows"] == []
    assert "not measured: `dpo`" in (results / "methods.md").read_text()

    variant = ["--methods", "dpo", "--set", "objective.beta=7", "--label", "dpo-b7", "--tuning-prompts"]
    methods.main(asked(folder, *variant), results)
    assert launched[2:] == [runs / "variants" / "dpo-b7" / "seed-0"]
    (found,) = json.loads((results / "methods-variants.json").read_text())
    assert (found["variant"], found["prompts"], found["tuning"]) == ("dpo-b7", 2, True)
    assert "objective.beta=7" in found["sets"]
    assert configuration.load(launched[2] / "config.yaml").objective["beta"] == 7


def test_a_row_of_another_world_is_made_again(small, capsys, monkeypatch):
    folder, _ = small
    output, shared, settings = folder / "runs" / "run", folder / "runs", ["train.max_train_steps=1"]
    launched = []

    def now(*overrides):
        config = method_runs.recipe("dpo", folder / "elsewhere", overrides, folder / "shared")
        return method_runs.fingerprint(config, False, folder / "shared")  # where a run lies does not count

    def launch(words, threads):
        launched.append(words)
        output.mkdir(parents=True, exist_ok=True)
        (output / "row.json").write_text(json.dumps({"fingerprint": now(*settings)}))
        return 0

    monkeypatch.setattr(method_runs, "launch", launch)
    output.mkdir(parents=True)
    (output / "row.json").write_text(json.dumps({"method": "dpo", "scores": {}}))
    (output / "metrics.jsonl").write_text("left behind")
    row = method_runs.row_of("dpo", output, settings)
    assert not (output / "metrics.jsonl").exists()
    assert launched == [["dpo", str(output), *settings, "--shared", str(shared)]]
    assert f"{output} was made with no fingerprint: run again" in capsys.readouterr().out
    assert method_runs.row_of("dpo", output, settings) == row
    assert len(launched) == 1
    (output / "row.json").rename(output / "config.yaml")  # what a killed run leaves: no row
    assert method_runs.row_of("dpo", output, settings) == row
    assert len(launched) == 2
    assert not (output / "config.yaml").exists()
    assert differences(row["fingerprint"], now("train.max_train_steps=2")) == ["other settings"]
    base = folder / "base"
    base.mkdir()
    (base / "model_index.json").write_text("{}")
    moved = f"model.pretrained_model_name_or_path={base}"
    assert differences(row["fingerprint"], now(*settings, moved)) == ["another base model", "other settings"]
    with (folder / "prompts.txt").open("a") as file:
        file.write("a red circle on a blue background\n")
    assert differences(row["fingerprint"], now(*settings)) == ["other judges"]


def test_a_run_that_fails_is_told(small):
    folder, _ = small
    diverging = ["train.max_train_steps=3", "optimizer.learning_rate=1e30", "optimizer.lr_warmup_steps=0"]
    row = method_runs.attempt("dpo", folder / "runs" / "run", diverging)
    assert "not finite" in row["failed"]
    assert "scores" not in row
    with pytest.raises(SystemExit, match=r"failed: .*not finite"):
        method_runs.row_of("dpo", folder / "runs" / "run", diverging)
