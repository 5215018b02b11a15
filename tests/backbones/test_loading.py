"""Loading from folders and hub ids: options, and what users get wrong."""

import json
import shutil

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from diffalign import backbones
from diffalign.backbones.sd15 import SD15
from diffalign.backbones.sdxl import SDXL
from diffalign.errors import ModelError
from tests.tiny import build_tiny_sd15, build_tiny_sdxl, tiny_vae

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny_sdxl, tmp_path):
    """Return a copy of the tiny SDXL folder that a test may break."""
    return shutil.copytree(tiny_sdxl, tmp_path / "model")


def test_family_follows_the_folder(tiny_sdxl, tiny_sd15):
    assert isinstance(backbones.load(tiny_sdxl), SDXL)
    assert isinstance(backbones.load(str(tiny_sd15)), SD15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_modules_get_the_dtype(tiny_sdxl, dtype):
    backbone = backbones.load(tiny_sdxl, torch_dtype=dtype)
    for module in (backbone.denoiser, backbone.vae, *backbone.text_encoders):
        assert {parameter.dtype for parameter in module.parameters()} == {dtype}


def test_variant_is_read_and_its_absence_reported(tmp_path, tiny_sdxl):
    pipeline = DiffusionPipeline.from_pretrained(tiny_sdxl, torch_dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "fp16", variant="fp16")
    loaded = backbones.load(tmp_path / "fp16", variant="fp16", torch_dtype=torch.float16)
    assert torch.equal(loaded.denoiser.conv_in.weight, pipeline.unet.conv_in.weight)
    with pytest.raises(ModelError, match="no safetensors weights"):
        backbones.load(tmp_path / "fp16")
    with pytest.raises(ModelError, match='variant "fp16"'):
        backbones.load(tiny_sdxl, variant="fp16")


def test_vae_replacement_keeps_its_own_scaling(tiny_sdxl, tmp_path):
    torch.manual_seed(5)
    vae = tiny_vae(0.5)
    vae.save_pretrained(tmp_path / "vae-only")
    vae.save_pretrained(tmp_path / "whole" / "vae")
    for place in ("vae-only", "whole", "vae-only/diffusion_pytorch_model.safetensors"):
        loaded = backbones.load(tiny_sdxl, vae=tmp_path / place)
        assert torch.equal(loaded.vae.decoder.conv_out.weight, vae.decoder.conv_out.weight)
        assert loaded.pipeline().vae is loaded.vae
    assert backbones.load(tiny_sdxl, vae=tmp_path / "vae-only").vae.config.scaling_factor == 0.5


def test_the_vae_that_is_replaced_is_never_read(copy, tiny_sdxl):
    (copy / "vae/diffusion_pytorch_model.safetensors").unlink()
    assert backbones.load(copy, vae=tiny_sdxl).fingerprint() == backbones.load(tiny_sdxl).fingerprint()


def test_unet_init_replaces_the_unet(tiny_sdxl, tmp_path):
    other = build_tiny_sdxl(tmp_path / "other", seed=9)
    expected = UNet2DConditionModel.from_pretrained(other / "unet").conv_in.weight
    for place in (other, other / "unet"):
        loaded = backbones.load(tiny_sdxl, unet_init=place)
        assert torch.equal(loaded.denoiser.conv_in.weight, expected)
    assert not torch.equal(backbones.load(tiny_sdxl).denoiser.conv_in.weight, expected)


def test_sharded_weights_load(copy, tiny_sdxl):
    unet = UNet2DConditionModel.from_pretrained(copy / "unet")
    shutil.rmtree(copy / "unet")
    unet.save_pretrained(copy / "unet", max_shard_size="1MB")
    assert len(list((copy / "unet").glob("*.safetensors"))) > 1
    assert backbones.load(copy).denoiser_fingerprint() == backbones.load(tiny_sdxl).denoiser_fingerprint()


def test_schedule_follows_the_scheduler_config(tiny_sd15, tmp_path):
    assert backbones.load(tiny_sd15).path.prediction_type == "epsilon"
    v_model = build_tiny_sd15(tmp_path / "v", prediction_type="v_prediction")
    assert backbones.load(v_model).path.prediction_type == "v_prediction"
    schedule = backbones.load(tiny_sd15)
    torch.testing.assert_close(schedule.path.alphas_cumprod, schedule.scheduler.alphas_cumprod)


@pytest.mark.parametrize("name", ["tiny_sd15", "tiny_sdxl"])
def test_schedule_overrides_reach_path_and_pipeline(name, request):
    folder = request.getfixturevalue(name)
    loaded = backbones.load(folder, prediction_type="v_prediction", zero_terminal_snr=True)
    assert loaded.path.prediction_type == "v_prediction"
    assert loaded.path.alphas_cumprod[-1] == 0
    scheduler = loaded.pipeline().scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.alphas_cumprod[-1] < 1e-6


def test_impossible_schedules_are_refused(tiny_sdxl):
    with pytest.raises(ModelError, match="needs a v_prediction"):
        backbones.load(tiny_sdxl, zero_terminal_snr=True)
    with pytest.raises(ModelError, match='got "sample"'):
        backbones.load(tiny_sdxl, prediction_type="sample")


def test_a_folder_whose_epsilon_model_ends_in_pure_noise_is_refused_unless_it_is_said_to_predict_v(copy):
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    with pytest.raises(ModelError, match=r"ends in pure noise .*Set model\.prediction_type: v_prediction if"):
        backbones.load(copy)
    assert backbones.load(copy, prediction_type="v_prediction").path.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("name", ["runs/of/yesterday/model", "./model", "missing.safetensors", "/nowhere/model"])
def test_missing_path(name):
    with pytest.raises(ModelError, match="There is no model") as caught:
        backbones.load(name)
    assert name in str(caught.value)
    assert "hub id such as" in str(caught.value)


def test_hub_id_offline():
    with pytest.raises(ModelError, match="hf download someone/some-model") as caught:
        backbones.load("someone/some-model")
    assert "HF_HUB_OFFLINE" in str(caught.value)


@pytest.mark.parametrize("option", ["vae", "unet_init"])
def test_hub_id_of_a_part_offline(tiny_sdxl, option):
    with pytest.raises(ModelError, match="hf download someone/a-part"):
        backbones.load(tiny_sdxl, **{option: "someone/a-part"})


def test_pickled_component(copy):
    weights = load_file(copy / UNET)
    (copy / UNET).unlink()
    pickled = copy / "unet" / "diffusion_pytorch_model.bin"
    torch.save(weights, pickled)
    with pytest.raises(ModelError, match="is a pickle") as caught:
        backbones.load(copy)
    assert str(pickled) in str(caught.value)


def test_the_suggested_conversion_works(copy, tiny_sdxl, monkeypatch):
    weights = load_file(copy / UNET)
    (copy / UNET).unlink()
    torch.save({"state_dict": weights}, copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        backbones.load(copy)
    code = str(caught.value).split('python -c "')[1].rstrip('"')
    monkeypatch.chdir(copy / "unet")
    exec(code, {})
    assert backbones.load(copy).denoiser_fingerprint() == backbones.load(tiny_sdxl).denoiser_fingerprint()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickled_single_file(tmp_path, suffix):
    file = tmp_path / f"model{suffix}"
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="is a pickle") as caught:
        backbones.load(file)
    assert "model.safetensors" in str(caught.value)
    with pytest.raises(ModelError, match="There is no file"):
        backbones.load(tmp_path / f"other{suffix}")


def _break(path, how: str) -> None:
    content = path.read_bytes()
    broken = {
        "truncated": content[: len(content) // 2],
        "header only": content[:100],
        "corrupt": content + b"0" * 8,
        "empty": b"",
        "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "pickle": b"PK\x03\x04" + content,
    }
    path.write_bytes(broken[how])


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((UNET, how) for how in ("truncated", "header only", "corrupt", "empty", "LFS", "pickle")),
        ("vae/diffusion_pytorch_model.safetensors", "truncated"),
        ("text_encoder_2/model.safetensors", "truncated"),
    ],
)
def test_broken_weights_name_the_file(copy, name, how):
    _break(copy / name, how)
    with pytest.raises(ModelError) as caught:
        backbones.load(copy)
    assert str(copy / name) in str(caught.value)
    assert {"header only": "truncated"}.get(how, how) in str(caught.value)


def test_incomplete_weights_are_not_filled_with_random_numbers(copy):
    weights = load_file(copy / UNET)
    weights.pop("conv_out.bias")
    save_file(weights, copy / UNET, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors, such as \"conv_out.bias\""):
        backbones.load(copy)


def test_missing_weights(copy):
    (copy / UNET).unlink()
    with pytest.raises(ModelError, match="no safetensors weights"):
        backbones.load(copy)


@pytest.mark.parametrize("name", ["HiDreamImagePipeline", "AuraFlowPipeline", "StableDiffusionXLImg2ImgPipeline"])
def test_unsupported_family(copy, name):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
    with pytest.raises(ModelError, match=f"is a {name}") as caught:
        backbones.load(copy)
    assert "zimage (ZImagePipeline); other families are not supported yet" in str(caught.value)


def test_refiner_is_refused(copy):
    index = json.loads((copy / "model_index.json").read_text())
    index |= {"tokenizer": [None, None], "text_encoder": [None, None]}
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="text_encoder, tokenizer"):
        backbones.load(copy)


def test_unknown_text_encoder_is_refused(copy):
    index = json.loads((copy / "model_index.json").read_text())
    index["text_encoder_2"] = ["transformers", "T5EncoderModel"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="T5EncoderModel"):
        backbones.load(copy)


def test_unsupported_noise_schedule_is_a_user_error(copy):
    file = copy / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_schedule": "laplace"}))
    with pytest.raises(ValueError, match="laplace"):
        backbones.load(copy)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_models_without_a_ddpm_schedule_are_refused(copy, name):
    """Their configs have no betas; the defaults of DDPM would train on wrong noise levels without a word."""
    scheduler = getattr(diffusers, name)()
    shutil.rmtree(copy / "scheduler")
    scheduler.save_pretrained(copy / "scheduler")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    with pytest.raises(ModelError, match=f"{name} .* no DDPM noise schedule"):
        backbones.load(copy)


def test_vaes_with_the_attention_names_of_2022_load(copy, tiny_sdxl):
    """The VAE of SD1.5 on the hub has them."""
    file = copy / "vae/diffusion_pytorch_model.safetensors"
    renames = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    old = {}
    for key, tensor in load_file(file).items():
        for new_name, old_name in renames.items():
            key = key.replace(f"attentions.0.{new_name}", f"attentions.0.{old_name}")
        old[key] = tensor
    assert any("proj_attn" in key for key in old)
    save_file(old, file, metadata={"format": "pt"})
    assert backbones.load(copy).fingerprint() == backbones.load(tiny_sdxl).fingerprint()


def test_a_folder_of_one_network_is_not_a_model(copy):
    with pytest.raises(ModelError, match="unet_init"):
        backbones.load(copy / "unet")


def test_a_lora_folder_is_not_a_model(tmp_path):
    save_file({"unet.a.lora_A.weight": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ModelError, match="holds a LoRA"):
        backbones.load(tmp_path)


def test_an_empty_folder_is_not_a_model(tmp_path):
    with pytest.raises(ModelError, match="It holds: nothing"):
        backbones.load(tmp_path)


def test_config_is_for_single_files(tiny_sdxl):
    with pytest.raises(ModelError, match=r"single \.safetensors file"):
        backbones.load(tiny_sdxl, config=tiny_sdxl)
