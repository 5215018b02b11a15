"""Exported LoRAs draw what the trained network in memory draws, in diffusers' layout and in kohya's."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign import backbones
from diffalign.backbones import adapters, export
from diffalign.errors import ModelError
from tests.backbones.drawing import draw, perturb

EVERYTHING = (
    *adapters.ATTENTION,
    *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    *("conv_in", "conv_out", "linear_1", "linear_2", "downsamplers.0.conv", "upsamplers.0.conv"),
)


@pytest.fixture(params=["tiny_sd15", "tiny_sdxl"])
def folder(request):
    return request.getfixturevalue(request.param)


def _trained(folder, target_modules=adapters.ATTENTION):
    backbone = backbones.load(folder)
    perturb(adapters.add_lora(backbone.denoiser, 4, alpha=8, target_modules=target_modules))
    return backbone


def _metadata(file):
    with safe_open(file, "pt") as stream:
        return stream.metadata()


@pytest.mark.parametrize("target_modules", [adapters.ATTENTION, EVERYTHING], ids=["attention", "everything"])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_loaded_by_diffusers_it_draws_the_same_image(folder, tmp_path, target_modules, layout):
    trained = _trained(folder, target_modules)
    plain = DiffusionPipeline.from_pretrained(folder)
    base = draw(plain)
    if layout == "diffusers":
        export.save_lora(trained.denoiser, tmp_path, "some/base")
        plain.load_lora_weights(tmp_path)
    else:
        export.save_kohya_lora(trained.denoiser, tmp_path / "trained.safetensors")
        plain.load_lora_weights(tmp_path / "trained.safetensors")
    image = draw(plain)
    torch.testing.assert_close(image, draw(trained.pipeline()), rtol=0, atol=1e-5)
    assert (image - base).abs().max() > 0.01


def test_adapters_of_some_blocks_load_without_a_warning(tiny_sdxl, tmp_path, recwarn):
    denoiser = backbones.load(tiny_sdxl).denoiser
    perturb(adapters.add_lora(denoiser, 4, blocks=["mid", "up"]))
    export.save_lora(denoiser, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tiny_sdxl)
    recwarn.clear()
    pipeline.load_lora_weights(tmp_path)
    assert not [warning.message for warning in recwarn if "modules" in str(warning.message)]
    adapted = [name for name, _ in pipeline.unet.named_parameters() if "lora_A" in name]
    assert adapted
    assert not any("down_blocks" in name for name in adapted)


def test_alpha_and_rank_survive(tiny_sdxl, tmp_path):
    export.save_lora(_trained(tiny_sdxl).denoiser, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tiny_sdxl)
    pipeline.load_lora_weights(tmp_path, adapter_name="loaded")
    config = pipeline.unet.peft_config["loaded"]
    assert (config.r, config.lora_alpha) == (4, 8)


def test_metadata_of_the_diffusers_file(tiny_sdxl, tmp_path):
    file = export.save_lora(_trained(tiny_sdxl).denoiser, tmp_path / "new" / "folder", "some/base", {"max_steps": 10})
    assert file == tmp_path / "new" / "folder" / "pytorch_lora_weights.safetensors"
    metadata = _metadata(file)
    assert metadata["base_model"] == "some/base"
    assert metadata["max_steps"] == "10"
    assert json.loads(metadata["lora_adapter_metadata"])["unet.lora_alpha"] == 8
    assert all(name.startswith("unet.") for name in load_file(file))


def test_kohya_keys_and_metadata(folder, tmp_path):
    backbone = _trained(folder)
    file = export.save_kohya_lora(backbone.denoiser, tmp_path / "red-circles.safetensors", "some/base", {"note": 1})
    tensors, metadata = load_file(file), _metadata(file)
    block = {"sd15": "down_blocks_1_attentions_0", "sdxl": "input_blocks_4_1"}[backbone.family]
    stem = f"lora_unet_{block}_transformer_blocks_0_attn1_to_q"
    width = 16
    assert tensors[f"{stem}.lora_down.weight"].shape == (4, width)
    assert tensors[f"{stem}.lora_up.weight"].shape == (width, 4)
    assert tensors[f"{stem}.alpha"] == 8
    assert len(tensors) == 3 * len(adapters.trainable_parameters(backbone.denoiser)) // 2
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "8.0")
    assert metadata["ss_base_model_version"] == {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}[backbone.family]
    assert metadata["modelspec.architecture"].endswith("/lora")
    assert metadata["modelspec.title"] == "red-circles"
    assert metadata["ss_sd_model_name"] == "some/base"
    assert metadata["note"] == "1"


def test_dtype_and_state_dict_arguments(tiny_sd15, tmp_path):
    denoiser = _trained(tiny_sd15).denoiser
    averaged = {name: 2 * tensor for name, tensor in denoiser.state_dict().items()}
    exact = load_file(export.save_lora(denoiser, tmp_path / "a"))
    doubled = load_file(export.save_lora(denoiser, tmp_path / "b", state_dict=averaged, dtype=torch.float16))
    assert set(exact) == set(doubled)
    for name, tensor in exact.items():
        assert tensor.dtype == torch.float32
        assert doubled[name].dtype == torch.float16
        torch.testing.assert_close(doubled[name].float(), 2 * tensor, rtol=1e-3, atol=1e-3)


def test_load_adapter_into_takes_files_and_folders(folder, tmp_path):
    trained = _trained(folder)
    expected = draw(trained.pipeline())
    lora = export.save_lora(trained.denoiser, tmp_path / "lora")
    kohya = export.save_kohya_lora(trained.denoiser, tmp_path / "kohya" / "x.safetensors")
    # A run exports both beside each other: the folder then means diffusers' file.
    export.save_kohya_lora(trained.denoiser, tmp_path / "lora" / "x.safetensors")
    for source in (lora, lora.parent, kohya, kohya.parent):
        pipeline = export.load_adapter_into(backbones.load(folder).pipeline(), source)
        torch.testing.assert_close(draw(pipeline), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
def test_a_lora_of_another_family_is_refused(tiny_sd15, tiny_sdxl, tmp_path):
    export.save_lora(_trained(tiny_sd15).denoiser, tmp_path / "a")
    export.save_kohya_lora(_trained(tiny_sd15).denoiser, tmp_path / "b" / "b.safetensors")
    for name in ("a", "b"):
        with pytest.raises(ModelError, match=f"{tmp_path.name}/{name}"):
            export.load_adapter_into(backbones.load(tiny_sdxl).pipeline(), tmp_path / name)


def test_files_without_a_lora_are_refused(tiny_sd15, tmp_path):
    pipeline = backbones.load(tiny_sd15).pipeline()
    save_file({"weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="no LoRA tensors"):
        export.load_adapter_into(pipeline, tmp_path / "x.safetensors")
    save_file({"text_encoder.a.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "text.safetensors")
    with pytest.raises(ModelError, match=r"text\.safetensors"):
        export.load_adapter_into(pipeline, tmp_path / "text.safetensors")
    (tmp_path / "y.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"not a \.safetensors"):
        export.load_adapter_into(pipeline, tmp_path / "y.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty"):
        export.load_adapter_into(pipeline, tmp_path / "empty")
    with pytest.raises(ModelError, match="hf download someone/lora"):
        export.load_adapter_into(pipeline, "someone/lora")


def test_a_lora_that_fits_in_part_only_is_refused(tiny_sd15, tmp_path):
    file = export.save_lora(_trained(tiny_sd15).denoiser, tmp_path)
    tensors = load_file(file)
    name = "down_blocks.0.attentions.0.transformer_blocks.{}.attn1.to_q.lora_{}.weight"
    for part in "AB":
        tensors["unet." + name.format(7, part)] = tensors["unet." + name.format(0, part)].clone()
    save_file(tensors, file)
    with pytest.raises(ModelError, match="Only 128 of the 129 modules"):
        export.load_adapter_into(backbones.load(tiny_sd15).pipeline(), file)


def test_a_truncated_lora_is_refused(tiny_sd15, tmp_path):
    trained = _trained(tiny_sd15)
    file = export.save_lora(trained.denoiser, tmp_path)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match="is truncated"):
        export.load_adapter_into(backbones.load(tiny_sd15).pipeline(), tmp_path)


def test_several_loras_in_a_folder_need_a_choice(tiny_sd15, tmp_path):
    trained = _trained(tiny_sd15)
    for name in ("one", "two"):
        export.save_kohya_lora(trained.denoiser, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=r"one\.safetensors, two\.safetensors"):
        export.load_adapter_into(backbones.load(tiny_sd15).pipeline(), tmp_path)


def test_a_network_without_adapters_has_no_lora(tiny_sd15, tmp_path):
    denoiser = backbones.load(tiny_sd15).denoiser
    with pytest.raises(ModelError, match="save_denoiser"):
        export.save_lora(denoiser, tmp_path)
    with pytest.raises(ModelError, match="save_denoiser"):
        export.save_kohya_lora(denoiser, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"one \.safetensors file"):
        export.save_kohya_lora(_trained(tiny_sd15).denoiser, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
