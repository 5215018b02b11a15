"""From drawing to training on what was drawn, with the noise of every picture: generate, score, rank, train."""

import copy
import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline
from rich.console import Console

from diffalign import config as configuration
from diffalign.data import open_pairs
from diffalign.denoising import InitialNoise
from diffalign.errors import ConfigError, DataError, UserError
from diffalign.jobs.training import assemble, examples
from diffalign.training import metrics
from diffalign.training.checkpoint import CheckpointError
from tests.e2e.pairs import write_pairs
from tests.e2e.test_training import assert_close, assert_same_bits, variant, weights

ASSETS = Path(__file__).parents[2] / "assets"
PICKSCORE = f"pickscore={ASSETS / 'tiny-pickscore'}"
PROMPTS = ["a red circle", "a blue square", "two green stars", "a cat", "the photo", "a green cat"]


@pytest.fixture
def content(content, tiny_sd3, tmp_path_factory):
    """Return the configuration of a run of PNAPO on pictures that are said to be drawn."""
    content = copy.deepcopy(content)
    content["model"]["pretrained_model_name_or_path"] = str(tiny_sd3)
    folder = write_pairs(tmp_path_factory.mktemp("drawn") / "pairs", 12, noises=True)
    content["data"] |= {
        "train_data_dir": str(folder),
        "random_flip": False,
        "scorer": PICKSCORE,
        "preference_from": "scores",
        "label_source": "reward",
        "cache_dtype": "float32",
    }
    content["objective"] = {"name": "pnapo", "beta": 5000.0}
    return content


def lines(changed):
    return metrics.read(Path(changed["train"]["output_dir"]) / "metrics.jsonl")


@pytest.fixture
def drawn(diffalign, tiny_sd3, tmp_path):
    """Return pairs that the commands made of pictures of a flow model: best and worst of three seeds."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    folder, scores, pairs = tmp_path / "drawn", tmp_path / "scores.parquet", tmp_path / "pairs.parquet"
    draw = ("generate", tiny_sd3, "--prompts", tmp_path / "prompts.txt", "--seeds", "3-5", "--out", folder)
    for command in (
        (*draw, "--steps", "2", "--height", "64", "--width", "64"),
        ("score", folder, "--with", PICKSCORE, "--out", scores),
        ("rank", scores, "--as", "pairs", "--out", pairs),
    ):
        code, said = diffalign(*command)
        assert code == 0, said
    return pairs


class TestFromDrawingToTraining:
    def test_the_pairs_know_what_their_pictures_were_drawn_from(self, drawn, tiny_sd3, tmp_path):
        source = open_pairs(drawn)
        assert len(source) == len(PROMPTS)
        manifest = pd.read_parquet(tmp_path / "drawn" / "manifest.parquet")
        files = [(tmp_path / "drawn" / file).read_bytes() for file in manifest["file"]]
        said = dict(zip(files, manifest["noise"], strict=True))
        assert len(set(said.values())) == 3
        for row in source:
            assert row.noises == tuple(said[image.content] for image in row.images)
            assert row.noises[0] != row.noises[1]
        pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
        noise = InitialNoise.parse(source[0].noises[0])
        started = pipeline.prepare_latents(
            1, 16, 64, 64, torch.float32, "cpu", [torch.Generator().manual_seed(noise.seed)], None
        )
        assert torch.equal(noise.draw(), started[0])

    def test_they_train(self, drawn, content, diffalign, tmp_path):
        content["data"]["train_data_dir"] = str(drawn)
        content["train"] |= {"train_batch_size": 3, "max_train_steps": 2}
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(content))
        code, said = diffalign("train", file)
        assert code == 0, said
        first, second = lines(content)
        assert first["margin"] == 0.0
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert second["loss"] != pytest.approx(math.log(2), abs=1e-7)

    def test_what_is_filtered_keeps_it(self, drawn, diffalign, tmp_path):
        before = {row.prompt: row.noises for row in open_pairs(drawn)}
        code, said = diffalign("filter", drawn, "--method", "random", "--keep", "3", "--out", tmp_path / "kept")
        assert code == 0, said
        kept = {row.prompt: row.noises for row in open_pairs(tmp_path / "kept" / "train.parquet")}
        assert len(kept) == 3
        assert kept.items() <= before.items()


def test_each_picture_is_noised_with_its_own(content):
    config = configuration.check(content)
    backbone = assemble.load_backbone(config)
    source = examples.open_source(config)
    data = examples.open_examples(config, backbone, source, Accelerator(cpu=True), Console(quiet=True))
    step = assemble.preference_step(config, backbone, data, None)
    posed = step.prepare([2, 0], 7)
    swapped = data.swapped
    for place, index in enumerate((2, 0)):
        noises = source[index].noises[::-1] if swapped[index] else source[index].noises
        for image, text in enumerate(noises):
            noise = InitialNoise.parse(text).draw()
            row = 2 * image + place
            assert torch.equal(posed.problem.noise[row], noise)
            x0, s = posed.problem.x0[row], posed.problem.timesteps[row] / 1000
            torch.testing.assert_close(posed.problem.xt[row], (1 - s) * x0 + s * noise)
            torch.testing.assert_close(posed.problem.target[row], noise - x0)
    assert posed.problem.timesteps[0] == posed.problem.timesteps[2]
    assert posed.progress.item() == pytest.approx(7 / 4)


def test_cached_online_and_in_parts_agree_and_shared_noise_does_not(content, run, tmp_path):
    whole = variant(content, tmp_path, "whole")
    run(whole)
    assert lines(whole)[0]["margin"] == 0.0
    online = variant(whole, tmp_path, "online", data={"cache_latents": False})
    run(online)
    assert_close(weights(whole), weights(online))
    parts = variant(whole, tmp_path, "parts", train={"train_batch_size": 1, "gradient_accumulation_steps": 4})
    run(parts)
    assert_close(weights(whole), weights(parts))
    shared = variant(whole, tmp_path, "shared", denoising={"noising": "shared"})
    run(shared)
    other = weights(shared)
    assert max((tensor - other[name]).abs().max() for name, tensor in weights(whole).items()) > 1e-4


@pytest.mark.parametrize("draws", [None, 2])
def test_resumed_is_uninterrupted(content, run, tmp_path, draws):
    whole = variant(content, tmp_path, "whole", reference={"cache_draws": draws})
    run(whole)
    assert lines(whole)[0]["margin"] == 0.0
    resumed = variant(whole, tmp_path, "resumed")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    run(variant(resumed, tmp_path, "resumed", train={"resume_from_checkpoint": "latest"}))
    assert_same_bits(weights(whole), weights(resumed))


def test_the_length_of_a_run_belongs_to_it(content, run, tmp_path):
    run(variant(content, tmp_path, "run", train={"max_train_steps": 2}))
    longer = variant(content, tmp_path, "run", train={"max_train_steps": 4, "resume_from_checkpoint": "latest"})
    with pytest.raises(CheckpointError, match="max_train_steps"):
        run(longer)


@pytest.mark.parametrize("model", ["tiny_flux", "tiny_zimage"])
def test_other_flow_families(content, run, tmp_path, model, request):
    changed = variant(content, tmp_path, model, train={"max_train_steps": 2})
    changed["model"]["pretrained_model_name_or_path"] = str(request.getfixturevalue(model))
    run(changed)
    first, second = lines(changed)
    assert first["margin"] == 0.0
    assert second["margin"] != 0.0


@pytest.mark.parametrize("objective", ["dpo", "kto", "sft", "plackett_luce"])
def test_other_objectives_can_be_noised_so(content, run, tmp_path, objective):
    changed = variant(content, tmp_path, objective, denoising={"noising": "generating"}, train={"max_train_steps": 2})
    changed["objective"] = {"name": objective}
    for key in ("scorer", "preference_from", "label_source"):
        del changed["data"][key]
    assert math.isfinite(run(changed)["loss"])


class TestRefused:
    def test_data_that_does_not_say_it(self, content, run, pairs_folder):
        content["data"]["train_data_dir"] = str(pairs_folder)
        with pytest.raises(DataError, match=r"does not say what its pictures were drawn from.*diffalign generate MOD"):
            run(content)

    @pytest.mark.parametrize("cached", [True, False])
    def test_pictures_of_another_size_before_anything_is_encoded(self, content, run, tmp_path, cached):
        folder = write_pairs(tmp_path / "large", 4, noises=True, latents="16x32x32")
        content["data"] |= {"train_data_dir": str(folder), "cache_latents": cached, "cache_dir": str(tmp_path / "c")}
        with pytest.raises(DataError, match=r"16x32x32, and the latents of this run are 16x16x16.*by 2/1"):
            run(content)
        assert not list(tmp_path.glob("c/*/latents.npy"))

    def test_one_picture_without_it(self, content, run, tmp_path):
        table = pq.read_table(Path(content["data"]["train_data_dir"]) / "train.parquet").to_pandas()
        table.loc[3, "noise_1"] = None
        table.to_parquet(tmp_path / "some.parquet")
        for cached in (True, False):
            content["data"] |= {"train_data_dir": str(tmp_path / "some.parquet"), "cache_latents": cached}
            with pytest.raises(DataError, match="what 1 of"):
                run(content)

    def test_a_model_of_ddpm(self, content, run, tiny_sdxl):
        content["model"]["pretrained_model_name_or_path"] = str(tiny_sdxl)
        with pytest.raises(UserError, match=r"sdxl is of DDPM\. Choose denoising\.noising ddim_inversion \(InPO\)"):
            run(content)

    def test_mirrored_pictures(self, content):
        content["data"]["random_flip"] = True
        with pytest.raises(ConfigError, match=r"data\.random_flip: false"):
            configuration.check(content)

    def test_plain_winners(self, content, run):
        content["data"] |= {"preference_from": "label", "label_source": "human", "scorer": None}
        with pytest.raises(ConfigError, match=r'"pnapo" needs P\(winner preferred\)'):
            run(content)


def test_an_older_folder_learns_it_when_it_is_drawn_on(diffalign, tiny_sd3, tmp_path):
    command = ("generate", tiny_sd3, "--prompt", "a cat", "--steps", "1", "--height", "64")
    command += ("--width", "64", "--out", tmp_path / "drawn")
    assert diffalign(*command, "--seeds", "1")[0] == 0
    file = tmp_path / "drawn" / "manifest.parquet"
    table = pq.read_table(file)
    pq.write_table(table.drop_columns("noise").replace_schema_metadata(table.schema.metadata), file)
    code, said = diffalign(*command, "--seeds", "0-1")
    assert code == 0, said
    noises = pd.read_parquet(file).set_index("seed")["noise"].to_dict()
    assert noises == {seed: f"seed={seed} shape=16x16x16 dtype=float32 generator=cpu" for seed in (0, 1)}
    assert json.loads(pq.read_schema(file).metadata[b"diffalign"])["identity"]
