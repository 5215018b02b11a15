"""Single-file checkpoints in the original layout, without a network."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign import backbones
from diffalign.backbones.single_file import family_of
from diffalign.errors import ModelError
from tests.backbones.drawing import draw
from tests.backbones.ldm import write_single_file
from tests.tiny import tiny_vae


@pytest.fixture(params=["tiny_sd15", "tiny_sdxl"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def file(folder, tmp_path):
    return write_single_file(folder, tmp_path / "model.safetensors")


def _header_only(path, *names):
    save_file({name: torch.zeros(1) for name in names}, path)
    return path


def test_equals_the_folder_it_was_made_from(file, folder):
    whole, single = backbones.load(folder), backbones.load(file, config=folder)
    assert single.family == whole.family
    assert single.fingerprint() == whole.fingerprint()
    assert single.denoiser_fingerprint() == whole.denoiser_fingerprint()
    assert torch.equal(draw(single.pipeline()), draw(whole.pipeline()))


def test_options_apply(file, folder, tmp_path):
    tiny_vae(0.5).save_pretrained(tmp_path / "vae")
    loaded = backbones.load(
        file, config=folder, vae=tmp_path / "vae", torch_dtype=torch.bfloat16, prediction_type="v_prediction"
    )
    assert loaded.vae.config.scaling_factor == 0.5
    assert {module.dtype for module in (loaded.denoiser, loaded.vae, *loaded.text_encoders)} == {torch.bfloat16}
    assert loaded.path.prediction_type == "v_prediction"
    assert draw(loaded.pipeline()).isfinite().all()


def test_marks_of_v_prediction_checkpoints_are_read(folder, tmp_path):
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    loaded = backbones.load(write_single_file(folder, tmp_path / "v.safetensors", marks), config=folder)
    assert loaded.path.prediction_type == "v_prediction"
    assert loaded.path.alphas_cumprod[-1] == 0


def test_published_configurations_need_no_network(tiny_sd15, tmp_path):
    """Published sizes cannot fit tiny weights, but they are what the error then speaks of."""
    file = write_single_file(tiny_sd15, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="Cannot load the modules"):
        backbones.load(file)


def test_wrong_config_is_named(tiny_sdxl, tiny_sd15, tmp_path):
    file = write_single_file(tiny_sdxl, tmp_path / "xl.safetensors")
    with pytest.raises(ModelError, match="is an SDXL checkpoint, but its config"):
        backbones.load(file, config=tiny_sd15)
    file = write_single_file(tiny_sd15, tmp_path / "one.safetensors")
    with pytest.raises(ModelError, match="is an SD1 or SD2 checkpoint"):
        backbones.load(file, config=tiny_sdxl)


def test_config_from_the_hub_offline(file):
    with pytest.raises(ModelError, match="hf download someone/configs"):
        backbones.load(file, config="someone/configs")


@pytest.mark.parametrize("part", ["first_stage_model.decoder", "model.diffusion_model.out.2", "final_layer_norm"])
def test_missing_weights_are_named(file, folder, part):
    tensors = {name: tensor for name, tensor in load_file(file).items() if part not in name}
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"lacks .*tensors of (its UNet or its VAE|the text_encoder)"):
        backbones.load(file, config=folder)


def test_truncated(file, folder):
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="is truncated"):
        backbones.load(file, config=folder)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias", "transformer of sd3"),
        ("double_blocks.0.img_mod.lin.weight", "transformer of flux"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "a LoRA"),
        ("unet.down_blocks.0.to_q.lora_A.weight", "a LoRA"),
        ("conditioner.embedders.0.model.text_projection", "refiner"),
        ("down_blocks.0.resnets.0.conv1.weight", "single network"),
        ("something.else", "something.else"),
    ],
)
def test_other_files_are_recognised(tmp_path, name, named):
    with pytest.raises(ModelError, match=named):
        backbones.load(_header_only(tmp_path / "other.safetensors", name))


def test_sd2_asks_for_its_configurations(tmp_path):
    unet = "model.diffusion_model.input_blocks.0.0.weight"
    file = _header_only(tmp_path / "sd2.safetensors", unet, "cond_stage_model.model.ln_final.bias")
    assert family_of(file) == "sd2"
    with pytest.raises(ModelError, match="stable-diffusion-2-1"):
        backbones.load(file)
