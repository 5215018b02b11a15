"""`diffalign train --dry-run`: its numbers against what is really written, and the report as scripts see it."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from rich.console import Console
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from diffalign import config as configuration
from diffalign.backbones import loading, published
from diffalign.backbones.families import BY_NAME
from diffalign.data import LatentCache
from diffalign.jobs.training import (
    assemble,
    cards,
    examples,
    memory,
    meta_model,
    plan,
    preflight,
    storage,
    survey,
    text_costs,
)
from diffalign.training.batching import BatchPlan
from diffalign.training.reference_cache import ReferenceCache
from tests.data.world import picture, rows, write_parquet
from tests.e2e.pairs import write_pairs

SDXL = Path(__file__).parents[3] / "configs" / "sdxl"
FLUX = SDXL.parent / "flux" / "dpo-lora.yaml"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Plan for a machine without a GPU or downloads, with much room: whatever this one has."""
    monkeypatch.setattr(memory, "device_memory", lambda: None)
    monkeypatch.setattr(preflight, "world_size", lambda: 1)
    monkeypatch.setattr(storage, "downloaded_snapshot", lambda *repository: None)
    monkeypatch.setattr(storage, "free", lambda folder: 10**15)


@pytest.fixture
def content(tiny_sdxl, tmp_path):
    """Return a valid configuration as a dictionary."""
    return {
        "model": {"pretrained_model_name_or_path": str(tiny_sdxl)},
        "data": {
            "train_data_dir": str(write_pairs(tmp_path / "pairs", 32)),
            "resolution": 64,
            "cache_dir": str(tmp_path / "cache"),
        },
        "reference": {"cache_draws": 3},
        "objective": {"name": "dpo"},
        "train": {"output_dir": str(tmp_path / "run"), "train_batch_size": 2, "max_train_steps": 4},
        "logging": {"report_to": []},
    }


def lines(config, *arguments):
    """Return the summary as a script reads it, by the names of its lines."""
    console = Console(record=True, width=60, file=open("/dev/null", "w", encoding="utf8"))
    plan.show(config, preflight.examine(config), console, *arguments)
    summary = console.export_text().split("\n\n")[0].splitlines()
    return {line[: plan.WIDTH].strip(): line[plan.WIDTH :] for line in summary}


@pytest.mark.parametrize(("dtype", "flip"), [("float16", True), ("float32", False)])
def test_the_latent_cache_is_as_large_as_foretold(content, dtype, flip):
    content["data"] |= {"cache_dtype": dtype, "random_flip": flip}
    config = configuration.check(content)
    source, model = examples.open_source(config), meta_model.read(config)
    foretold = storage.latent_cache(config, model, storage.Content.of(source))
    assert foretold.there == 0
    backbone = loading.load(config.model.pretrained_model_name_or_path)
    cache = LatentCache.build(
        source, backbone, examples.transform_of(config), config.data.cache_dir, dtype=dtype, progress=False
    )
    written = sum(file.stat().st_size for file in cache.folder.glob("*.npy"))
    assert foretold.size == pytest.approx(written, rel=0.02)  # but for the headers of ten files
    assert len(cache) == 28
    again = storage.latent_cache(config, model, storage.Content.of(source))
    assert (again.there, again.missing) == (math.inf, 0)
    content["data"]["resolution"] = 32
    smaller = storage.latent_cache(configuration.check(content), model, storage.Content.of(source))
    assert (smaller.there, smaller.missing) == (0, smaller.size)


def test_prompts_of_unequal_lengths_are_tokenised_or_estimated(content, tiny_zimage, monkeypatch):
    content["model"]["pretrained_model_name_or_path"] = str(tiny_zimage)
    config = configuration.check(content)
    model, backbone, source = meta_model.read(config), loading.load(tiny_zimage), examples.open_source(config)
    data = storage.Content.of(source)
    told = text_costs.estimate(config, model, data.prompts, data.texts)
    cache = LatentCache.build(source, backbone, examples.transform_of(config), config.data.cache_dir, progress=False)
    tokens = len(np.load(cache.folder / "prompt_embeds.npy"))
    assert told.what == f"{data.prompts + 1} prompts of {tokens:,} tokens"
    names = ("prompt_embeds", "prompt_embeds_mask", "prompt_lengths")
    assert told.size == sum(np.load(cache.folder / f"{name}.npy").nbytes for name in names)
    assert f"{tokens:,} tokens" in storage.latent_cache(config, model, data).what
    assert storage.latent_cache(config, model, data).missing == 0
    monkeypatch.setattr(text_costs, "COUNTED", 2)
    sampled = text_costs.estimate(config, model, data.prompts, data.texts)
    assert sampled.what.startswith(f"{data.prompts + 1} prompts of about ")
    assert sampled.size == pytest.approx(told.size, rel=0.2)
    hub = text_costs.estimate(config, replace(model, folder=None), 1000, None)
    assert hub.what == "1,001 prompts of about 33,008 tokens"  # 8 of the chat template and 100 characters


@pytest.mark.parametrize(
    ("family", "mixed_precision", "chosen", "kept"),
    [
        ("sdxl", "bf16", None, "float16"),
        ("zimage", "no", None, "float16"),
        ("zimage", "bf16", None, "bfloat16"),
        ("zimage", "bf16", "float32", "float32"),
        ("flux", "bf16", None, "bfloat16"),
        ("sd3", "bf16", None, "bfloat16"),
    ],
)
def test_the_precision_of_prompts(content, family, mixed_precision, chosen, kept):
    content["train"]["mixed_precision"] = mixed_precision
    content["data"]["cache_text_dtype"] = chosen
    config = configuration.check(content)
    assert examples.text_dtype(config, BY_NAME[family]) == kept
    full = configuration.check(content | {"model": content["model"] | {"tune": "full"}})
    assert examples.text_dtype(full, BY_NAME[family]) == (chosen or "float16")


def test_a_cache_that_cannot_fit_is_refused_before_it_is_written(content, diffalign, tmp_path, monkeypatch):
    content["reference"] = {"cache_draws": None}
    config = configuration.check(content)
    cache = storage.latent_cache(config, meta_model.read(config), storage.Content.of(examples.open_source(config)))
    assert 0 < cache.least < cache.size
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(storage, "free", lambda folder: math.ceil(cache.least))
    preflight.examine(config).require()  # images may repeat
    monkeypatch.setattr(storage, "free", lambda folder: math.ceil(cache.least) - 1)
    for command in (["train"], ["train", "--dry-run"], ["precompute"]):
        code, said = diffalign(command[0], tmp_path / "run.yaml", *command[1:])
        assert code == 2
        said = " ".join(said.split())
        assert "free, and the cache takes at least" in said
        assert "prompts" in said
        assert "name another data.cache_dir, or encode at every step: data.cache_latents: false" in said
    assert not list((tmp_path / "cache").glob("*/latents.npy"))
    content["data"]["cache_latents"] = False
    preflight.examine(configuration.check(content)).require()


def test_the_reference_cache_is_as_large_as_foretold(content):
    config = configuration.check(content)
    data = storage.Content.of(examples.open_source(config))
    foretold = storage.reference_cache(config, data)
    assert foretold.there == 0
    identity = {"seed": 0, "noising": "shared"}
    kept = ReferenceCache.open(config.data.cache_dir, identity, (3, 28, 2))
    assert foretold.size == np.load(kept.folder / "errors.npy").nbytes
    assert storage.reference_cache(config, data).missing == 0
    content["train"]["seed"] = 1
    assert storage.reference_cache(configuration.check(content), data).missing == foretold.size


MADE = {
    "UNet2DConditionModel": UNet2DConditionModel.from_config,
    "AutoencoderKL": AutoencoderKL.from_config,
    "CLIPTextModel": lambda shape: CLIPTextModel(CLIPTextConfig(**shape)),
    "CLIPTextModelWithProjection": lambda shape: CLIPTextModelWithProjection(CLIPTextConfig(**shape)),
}


@pytest.mark.parametrize("family", published.PARAMETERS)
def test_the_published_parameters_are_counted(family):
    for part, expected in published.PARAMETERS[family].items():
        _, class_name, shape = published.COMPONENTS[family][part]
        with torch.device("meta"):
            module = MADE[class_name](shape)
        assert sum(parameter.numel() for parameter in module.parameters()) == expected, part


def test_crops_are_told_from_headers(tmp_path):
    shapes = [(64, 64)] * 4 + [(128, 64)] * 2 + [(30, 40)] * 2
    made = rows(4)
    for index, row in enumerate(made):
        row["jpg_0"], row["jpg_1"] = (picture(2 * index + k, shapes[2 * index + k]) for k in (0, 1))
    source = examples.open_pairs(write_parquet(tmp_path / "a.parquet", made))
    found = survey.survey(source, 64)
    assert (found.images, found.of, found.upscaled, found.cropped, found.unreadable) == (8, 8, 2, 4, 0)
    assert found.lost == pytest.approx((2 * 0.5 + 2 * 0.25) / 4)
    words = "of all 8 images (median 64x64): 2 upscaled to 64, 4 cropped, which lose 38% of their area on average"
    assert found.describe(64) == words


def test_a_large_data_set_is_sampled_from_end_to_end(monkeypatch):
    monkeypatch.setattr(survey, "STRETCHES", 4)
    assert list(survey._sample(100, 8)) == [0, 1, 32, 33, 65, 66, 98, 99]
    assert list(survey._sample(3, 8)) == [0, 1, 2]


def test_broken_images_are_counted(tmp_path):
    made = rows(3)
    made[1]["jpg_0"] = b"no picture"
    found = survey.survey(examples.open_pairs(write_parquet(tmp_path / "a.parquet", made)), 8)
    assert (found.unreadable, "1 cannot be opened" in found.describe(8)) == (1, True)


@pytest.mark.parametrize("kind", memory.KINDS)
def test_the_largest_batch_fits_and_one_more_does_not(kind):
    config = configuration.load(SDXL / "dpo-lora.yaml")
    model = meta_model.read(config)
    counts = memory.Counts(model.family, model.denoiser, *meta_model.count(config, model.denoiser))
    largest = memory.largest_batch(config, counts, kind, 24)
    assert largest >= 1
    fits, too_many = (memory.estimate(config, BatchPlan(n, 1, 1), counts, kind).total for n in (largest, largest + 1))
    assert fits <= memory.HEADROOM * 24 < too_many
    assert memory.largest_batch(config, counts, kind, 4) == 0


ENCODERS = {
    "text_encoder": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**published._CLIP_L)),
    "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**published._CLIP_BIG_G)),
    "text_encoder_3": lambda: T5EncoderModel(T5_XXL),
    "vae": lambda: AutoencoderKL(
        **(published._VAE | {"latent_channels": 16}), use_quant_conv=False, use_post_quant_conv=False
    ),
}
FLUX_ENCODERS = {"text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**published._CLIP_L))}
FLUX_ENCODERS["text_encoder_2"], FLUX_ENCODERS["vae"] = ENCODERS["text_encoder_3"], ENCODERS["vae"]
PIXART_ENCODERS = {"text_encoder": ENCODERS["text_encoder_3"], "vae": lambda: AutoencoderKL(**published._VAE)}
T5_XXL = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
QWEN3_4B = Qwen3Config(
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("sd3", ENCODERS),
        ("flux", FLUX_ENCODERS),
        *((f"pixart-{name}", PIXART_ENCODERS) for name in ("alpha", "sigma")),
        ("zimage", {"text_encoder": lambda: Qwen3Model(QWEN3_4B), "vae": ENCODERS["vae"]}),
    ],
)
def test_the_encoders_of_transformers_are_counted(family, parts):
    assert published.FLOW_ENCODERS[family].keys() == parts.keys()
    for part, make in parts.items():
        with torch.device("meta"):
            module = make()
        assert sum(p.numel() for p in module.parameters()) == published.FLOW_ENCODERS[family][part], part


@pytest.mark.parametrize("cached", [True, False])
def test_encoders_count_where_they_stay(content, tiny_sd3, cached):
    content["model"]["pretrained_model_name_or_path"] = str(tiny_sd3)
    content["data"]["cache_latents"], content["train"]["mixed_precision"] = cached, "bf16"
    content["reference"]["cache_draws"] = None
    config = configuration.check(content)
    backbone = assemble.load_backbone(config)
    held = sum(p.nbytes for module in backbone.encoders() for p in module.parameters())
    model = meta_model.read(config)
    assert meta_model.encoder_bytes(config, model) == held
    counts = memory.Counts("sd3", model.denoiser, *meta_model.count(config, model.denoiser), held)
    stays = memory.estimate(config, BatchPlan(1, 1, 1), counts, "none").encoders
    assert stays == (0 if cached else held / memory.GIB)
    assert lines(config)["encoders"].endswith("before training" if cached else "before training, and stay there")


@pytest.mark.parametrize(("kind", "gib"), [("none", 22.17), ("int8", 11.1), ("fp8", 11.1), ("nf4", 5.72)])
def test_a_quantised_base_is_counted_by_its_layers(kind, gib):
    config = configuration.load(FLUX, [f"model.quantization={kind}"])
    denoiser = published.random_transformer("black-forest-labs/FLUX.1-dev", device="meta")
    largest = 0 if kind == "none" else 2 * 18432 * 3072 / memory.GIB  # dense while it is used
    counts = memory.Counts("flux", denoiser, sum(p.numel() for p in denoiser.parameters()), 0)
    estimated = memory.estimate(config, BatchPlan(1, 1, 1), counts, "full")
    assert estimated.weights - largest == pytest.approx(gib, abs=0.01)
    meta_model.count(config, denoiser)  # adapters change nothing about the base
    assert memory.estimate(config, BatchPlan(1, 1, 1), counts, "full").weights == estimated.weights


def test_cards_are_told_what_they_need():
    config = configuration.load(FLUX, ["max_train_samples=100"])
    told = lines(config, 16.0)
    assert told["cards"].startswith("model.quantization: pairs a device with nothing")
    kinds = [told[f"{size} GiB"].split(":")[0] for size in cards.CARDS]
    assert kinds == ["nf4", "nf4", "int8", "none", "none"]
    assert "set model.quantization: nf4 (docs/quantization.md)" in told["verdict"]
    assert "too small for the encoders beside the model" in told["16 GiB"]
    alone = lines(configuration.load(FLUX, ["max_train_samples=100", "validation.validation_steps=null"]), 16.0)
    assert "encoders" not in alone["16 GiB"]
    fitting = int(alone["16 GiB"].split(", ")[-1])
    small = configuration.load(FLUX, ["max_train_samples=100", "quantization=nf4", f"train_batch_size={fitting}"])
    assert lines(small, 16.0)["checkpointing"].startswith("full: about")
    assert "does not fit" in lines(configuration.load(SDXL / "dpo.yaml", ["max_train_samples=9"]))["12 GiB"]


class TestReport:
    def test_local_data_is_read(self, content):
        told = lines(configuration.check(content))
        assert told["data"].endswith("train.parquet: 32 rows, 28 pairs, 4 ties dropped")
        assert told["pairs seen"] == "4 steps of 2 = 8: 0.286 epochs of 28"
        assert told["verdict"] == "fits, leaving out memory: there is no GPU here, and --gpu-memory GIB names none"

    def test_a_gpu_that_is_planned_for(self):
        config = configuration.load(SDXL / "dpo-lora.yaml", ["optimizer.name=adamw", "max_train_samples=100"])
        told = lines(config, 24.0)
        assert told["checkpointing"].startswith("full: about 9.0 of 21.6 GiB")
        assert told["largest batch"].startswith("in 24 GiB, pairs a device: 1 with nothing recomputed")
        assert "16 is the largest that divides 16" in told["largest batch"]
        assert told["data"] == "yuvalkirstain/pickapic_v2 on the hub, split train, the first 100"
        assert told["verdict"].startswith("fits, leaving out downloads of unknown size")
        small = lines(config, 4.0)
        assert small["verdict"].startswith("does not fit: about 9.0 GiB of the 3.6 GiB that a step may take")

    def test_downloads_are_named_with_their_sizes(self):
        config = configuration.load(SDXL / "dpo.yaml")
        found = {download.what: download.size for download in storage.downloads(config)}
        base = found["stabilityai/stable-diffusion-xl-base-1.0"]
        assert base == 4 * (2_567_463_684 + 123_060_480 + 694_659_840)  # another VAE is taken
        assert found["madebyollin/sdxl-vae-fp16-fix"] == 4 * 83_653_863
        assert found["yuvalkirstain/pickapic_v2, all of it"] == 335e9

    def test_a_full_disk_does_not_fit(self, content, monkeypatch):
        monkeypatch.setattr(storage, "free", lambda folder: 1000)
        assert lines(configuration.check(content))["verdict"].startswith("does not fit: the disk of ")

    def test_faults_are_listed_after_the_summary(self, content, diffalign, tmp_path):
        content["data"]["train_data_dir"] = "absent"
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        code, said = diffalign("train", tmp_path / "run.yaml", "--dry-run")
        assert code == 2
        assert f"data {tmp_path}/absent: cannot be read" in " ".join(said.split())
        assert "It would not start: 1 fault, listed below" in said
        assert said.index("verdict") < said.index(f"Error: There is no file or folder {tmp_path}/absent")

    def test_a_file_gets_the_changed_keys_and_no_colours(self, content, diffalign, tmp_path):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        code, short = diffalign("train", tmp_path / "run.yaml", "--dry-run")
        _, full = diffalign("train", tmp_path / "run.yaml", "--dry-run", "--full")
        assert code == 0
        assert "\x1b" not in short + full
        assert "cache_draws: 3" in short
        assert "lr_scheduler" not in short
        assert "lr_scheduler: constant_with_warmup" in full
        assert not (tmp_path / "run").exists()
        assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("denoising", "said"),
    [
        ({}, "uniform, shift 3 (mu 1.099)"),
        ({"timestep_density": "logit_normal"}, "logit_normal(mean 0, std 1), shift 3 (mu 1.099)"),
        ({"timestep_density": "mode", "timestep_shift": 1.0}, "mode(scale 1.29), no shift"),
        ({"timestep_density": "list", "timesteps": [801, 548]}, "one of 801, 548"),
    ],
)
def test_timesteps_of_a_flow_model_are_said(content, tiny_sd3, denoising, said):
    assert "timesteps" not in lines(configuration.check(content))
    content["model"]["pretrained_model_name_or_path"] = str(tiny_sd3)
    report = lines(configuration.check(content | {"denoising": denoising}))
    assert report["timesteps"] == said
    assert report["model"].startswith("sd3, 321,824 parameters")


def test_the_prompts_of_a_flow_model_take_what_is_stored(content, tiny_sd3):
    content["model"]["pretrained_model_name_or_path"] = str(tiny_sd3)
    config = configuration.check(content)
    model, backbone = meta_model.read(config), loading.load(tiny_sd3)
    with torch.no_grad():
        text = backbone.encode_prompts(["a red circle"])
    assert model.kind.prompt_size(model.denoiser.config) == sum(column.numel() for column in text.values())
    assert model.shift_at(64) == backbone.shift_at(64)
