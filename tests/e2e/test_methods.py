"""Every objective trains through the real job, on the data it is made for."""

import copy
import math
import shutil
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from diffalign import config as configuration
from diffalign import objectives
from diffalign.data import open_pairs
from diffalign.errors import ConfigError, DataError
from diffalign.jobs.training import examples
from diffalign.training import metrics
from tests.e2e.pairs import write_lists, write_pairs
from tests.e2e.test_training import assert_close, assert_same_bits, variant, weights

FIRST_LOSS = {name: math.log(2) for name in ("dpo", "robust_dpo", "inpo", "smpo", "dcpo", "sdpo", "npo", "fdpo")}
FIRST_LOSS |= {name: math.log(2) for name in ("spo", "d3po", "pnapo")}
FIRST_LOSS |= {"ipo": 0.25, "hinge": 1.0, "bco": 2 * math.log(2), "sppo": 0.5, "apo": 1.0, "kto": 0.5}


ASSETS = Path(__file__).parents[2] / "assets"
ROLLOUT = {
    "scorer": f"pickscore={ASSETS / 'tiny-pickscore'}",
    "num_inference_steps": 4,
    "divert_start_step": 1,
    "num_candidates": 2,
    "threshold": 0.0,
}


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Return folders with pairs (captions of both images), lists of three, and scores of the pairs."""
    folder = tmp_path_factory.mktemp("methods")
    pairs = write_pairs(folder / "pairs", 12, captions=True)
    source = open_pairs(pairs)
    rows = [
        {"example_id": row.example_id, "scorer": "pickscore", "score_chosen": 0.2 + 0.01 * i, "score_rejected": 0.2}
        for i, row in enumerate(source)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "scores.parquet")
    return {"pairs": pairs, "lists": write_lists(folder / "lists", 8, 3), "scores": folder / "scores.parquet"}


@pytest.fixture
def method(content, sources, tiny_sd3, tmp_path):
    """Return a function that makes the configuration of two steps with an objective."""

    def make(name, **sections):
        changed = copy.deepcopy(content)
        changed["objective"] = {"name": name, **sections.pop("objective", {})}
        layout = objectives.objective_class(name).layout
        changed["data"]["train_data_dir"] = str(sources["lists" if layout == "list" else "pairs"])
        if name == "dcpo":
            changed["data"]["image_caption_columns"] = ["caption_0", "caption_1"]
        if name == "smpo":
            changed["data"] |= {"annotations_file": str(sources["scores"]), "preference_from": "scores"}
        if name == "pnapo":  # of flow models, and of pictures whose noise is known
            changed["model"]["pretrained_model_name_or_path"] = str(tiny_sd3)
            changed["data"] |= {
                "train_data_dir": str(write_pairs(tmp_path / "drawn", 12, noises=True)),
                "random_flip": False,
                "scorer": f"pickscore={ASSETS / 'tiny-pickscore'}",
                "preference_from": "scores",
            }
        if layout in ("transition", "reward"):
            changed["data"] = {"prompts_file": str(ASSETS / "prompts" / "tiny-train.txt"), "resolution": 64}
            changed["rollout"] = ROLLOUT | {"samples_per_prompt": 2, "transitions_per_prompt": 3}
        changed["inversion"] = {"num_steps": 3}
        changed["train"] |= {"train_batch_size": 3, "max_train_steps": 2}
        for section, values in sections.items():
            changed[section] = {**changed.get(section, {}), **values}
        return changed

    return make


@pytest.mark.parametrize("name", objectives.names())
def test_it_trains(name, method, run):
    content = method(name)
    line = run(content)
    lines = metrics.read(Path(content["train"]["output_dir"]) / "metrics.jsonl")
    assert all(math.isfinite(value) for value in line.values())
    moved = [tensor for key, tensor in weights(content, 2).items() if "lora_B" in key]
    assert max(tensor.abs().max() for tensor in moved) > 1e-4
    if name in FIRST_LOSS:
        assert lines[0]["loss"] == pytest.approx(FIRST_LOSS[name], rel=1e-6)
        assert lines[1]["loss"] != pytest.approx(FIRST_LOSS[name], rel=1e-6)
    if "reference" in objectives.load(name).needs:
        distance = "drift" if "advantages" in objectives.load(name).needs else "margin"
        assert lines[0][distance] == 0.0
        assert lines[1][distance] != 0.0


@pytest.mark.parametrize("name", ["inpo", "dspo", "spo", "dpok", "refl"])
def test_it_trains_where_the_schedule_ends_in_pure_noise(name, method, run):
    given = objectives.objective_class(name).layout == "pair"  # sampling starts there, given pictures are noised so
    only = {"timestep_low": 999, "timestep_high": 1000} if given else {}
    content = method(name, model={"prediction_type": "v_prediction", "zero_terminal_snr": True}, denoising=only)
    assert all(math.isfinite(value) for value in run(content).values())
    moved = [tensor for key, tensor in weights(content, 2).items() if "lora_B" in key]
    assert max(tensor.abs().max() for tensor in moved) > 1e-4


@pytest.mark.parametrize("name", ["inpo", "smpo", "rankdpo"])
def test_accumulation_equals_the_large_batch(name, method, run, tmp_path):
    # Both take 4 examples a step; the inversion runs once for all of them.
    content = method(name, train={"train_batch_size": 4})
    large = variant(content, tmp_path, "large", inversion={"num_steps": 3, "batch_size": 64})
    split = variant(
        content, tmp_path, "split", train={"train_batch_size": 1, "gradient_accumulation_steps": 4},
        inversion={"num_steps": 3, "batch_size": 3},
    )  # fmt: skip
    run(large)
    run(split)
    assert_close(weights(large, 2), weights(split, 2))


def test_kto_with_mismatched_prompts_and_a_class_ratio(method, run):
    line = run(method("kto", objective={"baseline": "mismatched"}, data={"positive_ratio": 0.8}))
    assert line["baseline"] != 0.0


def test_a_method_says_which_data_it_needs(method, run):
    with pytest.raises(ConfigError, match=r"image_caption_columns"):
        run(method("dcpo", data={"image_caption_columns": None}))
    with pytest.raises(ConfigError, match=r"needs P\(winner preferred\)"):
        run(method("smpo", data={"annotations_file": None, "preference_from": "label"}))
    with pytest.raises(ConfigError, match="learns from pairs"):
        run(method("dpo", data={"train_data_dir": method("rankdpo")["data"]["train_data_dir"]}))


OPTIONS = {
    "moving average": {"reference": {"update": "ema", "decay": 0.5}},
    "refreshed": {"reference": {"update": "refresh", "every": 2}},
    "auto beta": {"loss": {"auto_beta": 0.2, "auto_beta_decay": 0.5}},
    "min-SNR": {"denoising": {"snr_weighting": "min_snr", "snr_gamma": 1.0}},
    "anchor": {"loss": {"anchor_weight": 10.0}},
    "sft": {"loss": {"sft_weight": 100.0}},
    "flipped labels": {"data": {"flip_labels": 1.0}},
    "independent noise": {"denoising": {"noising": "independent"}},
    "inverted": {"denoising": {"noising": "ddim_inversion"}, "inversion": {"num_steps": 3, "network": "reference"}},
    "as the authors inverted": {"denoising": {"noising": "ddim_inversion"}, "inversion": {"mode": "official_compat"}},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_changes_the_run_and_survives_a_resume(option, method, run, tmp_path):
    common = {"train": {"train_batch_size": 3, "max_train_steps": 4}}
    plain = variant(method("dpo", **common), tmp_path, "plain")
    whole = variant(method("dpo", **common, **OPTIONS[option]), tmp_path, "whole")
    halves = variant(method("dpo", **common, **OPTIONS[option]), tmp_path, "halves")
    run(plain)
    run(whole)
    difference = max((a - b).abs().max() for a, b in zip(weights(plain).values(), weights(whole).values(), strict=True))
    assert difference > 1e-5
    halves["train"]["max_train_steps"] = 2
    run(halves)
    halves["train"] |= {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    run(halves)
    assert_same_bits(weights(whole), weights(halves))


def test_full_fine_tuning_against_a_moving_reference(method, run):
    content = method("dpo", model={"tune": "full"}, reference={"update": "ema", "decay": 0.9})
    content["optimizer"]["learning_rate"] = 1e-4
    assert run(content)["margin"] != 0.0


def test_scores_by_a_reward_model_are_computed_once(method, run, tmp_path):
    assets = Path(__file__).parents[2] / "assets"
    content = method(
        "smpo",
        data={
            "annotations_file": None,
            "scorer": f"pickscore={assets / 'tiny-pickscore'}",
            "label_source": "reward",
            "cache_dir": str(tmp_path / "cache"),
        },
    )
    run(content)
    (file,) = (tmp_path / "cache").glob("scores-*.parquet")
    before = file.stat().st_mtime_ns
    run(content)
    assert file.stat().st_mtime_ns == before


def test_scores_belong_to_the_weights_of_a_judge(method, tmp_path):
    """A judge that was trained again into its folder scores anew; one that was moved is the same."""
    judge = tmp_path / "judge"
    shutil.copytree(Path(__file__).parents[2] / "assets" / "tiny-pickscore", judge)
    settings = {"annotations_file": None, "label_source": "reward", "cache_dir": str(tmp_path / "cache")}

    def file_of(place):
        config = configuration.check(method("smpo", data=settings | {"scorer": f"pickscore={place}"}))
        return examples.scores_file(config, examples.open_source(config), Console(quiet=True))

    first = file_of(judge)
    moved = judge.rename(tmp_path / "moved")
    assert file_of(moved) == first
    tensors = load_file(moved / "model.safetensors")
    tensors["visual_projection.weight"] = -tensors["visual_projection.weight"]
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    again = file_of(moved)
    assert again != first
    before, after = (pd.read_parquet(file).score_chosen for file in (first, again))
    assert after.tolist() == pytest.approx((-before).tolist(), abs=1e-2)


def test_a_curriculum_starts_with_the_largest_gaps(method, run, sources):
    content = method(
        "dpo", data={"annotations_file": str(sources["scores"]), "curriculum_stages": 2, "curriculum_steps": 1}
    )
    assert run(content)["margin"] != 0.0


def test_annotations_must_cover_the_pairs(method, run, sources, tmp_path):
    half = pq.read_table(sources["scores"]).slice(0, 3)
    pq.write_table(half, tmp_path / "half.parquet")
    with pytest.raises(DataError, match="diffalign score"):
        run(method("smpo", data={"annotations_file": str(tmp_path / "half.parquet")}))
