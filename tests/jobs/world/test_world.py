"""How the embedded world's pairs are made, and what the shipped assets hold."""

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import reward_models
from diffalign.backbones import loading
from diffalign.data import open_pairs
from diffalign.errors import ConfigError, DataError
from diffalign.jobs.world import generators, world, world_data
from diffalign.rollout import LatentReward
from diffalign.shapes.captions import parse, scenes
from diffalign.shapes.oracle import Oracle
from diffalign.shapes.recipe import Pretraining

ASSETS = Path(__file__).parents[3] / "assets"
RECIPE = Pretraining(
    images=32,
    vae_steps=2,
    vae_batch_size=4,
    decoder_steps=1,
    epsilon_steps=0,
    denoiser_steps=2,
    strong_steps=1,
    denoiser_batch_size=4,
)


def test_a_corrupted_scene_differs_in_one_thing_its_caption_mentions():
    rng = random.Random(0)
    for scene in islice(scenes(1, held_out=False), 200):
        wrong = world.corrupt(scene, rng)
        changed = [name for name in vars(scene) if getattr(scene, name) != getattr(wrong, name)]
        assert len(changed) == 1
        assert wrong.color != wrong.background


def test_rendered_pairs_are_labelled_as_the_oracle_sees_them():
    pairs = world.rendered_pairs(100, seed=3, held_out=True)
    first, second, prompts, labels = zip(*pairs, strict=True)
    oracle = Oracle()
    gap = oracle.score(first, prompts) - oracle.score(second, prompts)
    assert ((gap > 0) == (torch.tensor(labels) == 1)).float().mean() == 1.0
    assert 0.3 < sum(labels) / len(labels) < 0.7
    assert all(parse(prompt).held_out for prompt in prompts)


def pair(gap: float) -> tuple[world_data.Picture, world_data.Picture]:
    image, by = Image.new("RGB", (8, 8)), generators.GENERATORS[0]
    return world_data.Picture(image, 0.5 + gap, by), world_data.Picture(image, 0.5, by)


def test_labels_follow_the_logistic_annotator():
    rng = random.Random(0)
    for gap, share in ((0.08, 0.731), (0.2, 0.924), (-0.08, 0.269)):
        rows = [world_data._labelled(i, "a", pair(gap), world_data.World(), rng) for i in range(2000)]
        first = sum(row["best_image_uid"] == row["image_0_uid"] for row in rows) / len(rows)
        assert first == pytest.approx(share, abs=0.03)
        assert first == sum(row["label_0"] for row in rows) / len(rows)
    assert world_data._labelled(0, "a", pair(0.01), world_data.World(), rng)["label_0"] == 0.5


def test_pictures_come_from_several_models_and_say_from_which():
    by = generators.choose(4000, random.Random(0))
    for generator in generators.GENERATORS:
        assert by.count(generator) / 4000 == pytest.approx(generator.share, abs=0.03)
    assert sum(generator.share for generator in generators.GENERATORS) == pytest.approx(1)
    assert len({generator.model("tiny") for generator in generators.GENERATORS}) == 3
    with pytest.raises(DataError, match="--parts pipeline"):
        generators.draw({"early": Path("nowhere")}, ["a"], [0], [generators.GENERATORS[0]], world_data.SAMPLING)


def test_unknown_parts_are_refused(tmp_path):
    with pytest.raises(ConfigError, match='Unknown part "pears"'):
        world.build(tmp_path, ["pears"], world_data.World(), Pretraining(), None)


def test_the_shipped_pairs_are_read_and_never_show_a_held_out_combination():
    source = open_pairs(ASSETS / "tiny-pairs")
    assert len(source) >= 1400
    assert source.counts.ties > 0
    captions = pq.read_table(ASSETS / "tiny-pairs" / "train.parquet", columns=["caption"]).column(0).to_pylist()
    assert not any(parse(caption).held_out for caption in captions)


def test_the_shipped_prompts_are_held_out():
    prompts = (ASSETS / "prompts" / "tiny-held-out.txt").read_text().splitlines()
    assert len(set(prompts)) == len(prompts) >= 256
    assert all(parse(prompt).held_out for prompt in prompts)


@pytest.mark.parametrize("name", ["pickscore", "hpsv2"])
def test_the_shipped_reward_models_agree_with_the_oracle(name):
    scorer = reward_models.load(name, ASSETS / f"tiny-{name}")
    first, second, prompts, labels = zip(*world.rendered_pairs(200, seed=11, held_out=True), strict=True)
    agree = (scorer.compare(first, second, prompts) > 0.5) == (torch.tensor(labels) == 1)
    assert agree.float().mean() > 0.7  # measured: above 0.8


def test_the_whole_world_can_be_built_at_a_small_size(tmp_path, monkeypatch):
    monkeypatch.setattr(world_data, "SAMPLING", replace(world_data.SAMPLING, num_inference_steps=2))
    monkeypatch.setattr(world, "VALIDATION_PAIRS", 8)
    sizes = {"training_captions": 8, "held_out_prompts": 3, "candidates": 2, "reward_pairs": 24}
    small = world.World(**sizes, reward_steps=2, step_aware_steps=1, lrm_steps=1, generators=tmp_path / "others")
    world.build(tmp_path, list(world.PARTS["sdxl"]), small, RECIPE, Console(quiet=True))
    assert loading.load(tmp_path / "tiny-sdxl").family == "sdxl"
    table = pq.read_table(tmp_path / "tiny-pairs" / "train.parquet")
    assert table.num_rows == 8
    assert set(table.column_names) == set(pq.read_schema(ASSETS / "tiny-pairs" / "train.parquet").names)
    picture, prompt = Image.new("RGB", (64, 64), "red"), "a red circle on a blue background"
    for name in ("pickscore", "hpsv2", "step_aware"):
        scorer = reward_models.load(name, tmp_path / f"tiny-{name.replace('_', '-')}")
        assert scorer.score([picture], [prompt]).isfinite().all()
    judge = LatentReward.load(tmp_path / "tiny-lrm", loading.load(tmp_path / "tiny-sdxl"), torch.device("cpu"), 64)
    assert judge(torch.randn(1, 4, 16, 16), [prompt], torch.tensor([501])).isfinite().all()
    stored = load_file(tmp_path / "tiny-lrm" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}


def test_the_world_of_the_flow_model_takes_prompts_and_judges_from_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(world_data, "SAMPLING", replace(world_data.SAMPLING, num_inference_steps=2))
    for name in ("prompts", "tiny-pickscore", "tiny-hpsv2"):
        (tmp_path / name).symlink_to(ASSETS / name)
    small = replace(world_data.WORLDS["sd3"], pairs=3, lists=2, candidates=2, generators=tmp_path / "others")
    world.build(tmp_path, list(world.PARTS["sd3"]), small, RECIPE, Console(quiet=True))
    assert loading.load(tmp_path / "tiny-sd3").family == "sd3"
    pairs = pq.read_table(tmp_path / "tiny-sd3-pairs" / "train.parquet").to_pylist()
    assert [row["caption"] for row in pairs] == world_data.read_captions(ASSETS)[:3]
    assert {row["model_0"] for row in pairs} <= {"tiny-sd3", "tiny-sd3-early", "tiny-sd3-strong"}
    assert all(row["caption_0"] and row["caption_1"] for row in pairs)
    lists = pq.read_table(tmp_path / "tiny-sd3-lists" / "train.parquet").to_pylist()
    assert [(len(row["images"]), len(row["scores"])) for row in lists] == [(2, 2)] * 2
