"""What files say of their noise schedule, in tensors and headers, is followed wherever such a file is read."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign import backbones
from diffalign.backbones import adapters, export, inspection, marks
from diffalign.errors import ModelError
from tests.backbones.ldm import write_single_file

BOTH = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
SAI = {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": "stable-diffusion-xl-v1-base"}


def _file(path, metadata=None, *names):
    save_file({name: torch.zeros(0) for name in ("weight", *names)}, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("metadata", "names", "expected"),
    [
        (None, (), {}),
        ({"format": "pt"}, (), {}),
        (SAI | {"modelspec.prediction_type": "v"}, (), {"prediction_type": "v_prediction"}),
        (SAI | {"modelspec.prediction_type": "v_prediction"}, (), {"prediction_type": "v_prediction"}),
        (SAI | {"modelspec.prediction_type": "V-Prediction"}, (), {"prediction_type": "v_prediction"}),
        (SAI | {"modelspec.prediction_type": "epsilon"}, (), {"prediction_type": "epsilon"}),
        ({"prediction_type": "v_prediction"}, (), {"prediction_type": "v_prediction"}),
        ({"ss_v_parameterization": "True"}, (), {"prediction_type": "v_prediction"}),
        ({"ss_v_parameterization": "False", "ss_zero_terminal_snr": "False"}, (), {}),
        ({"ss_v2": "True", "ss_base_model_version": "sd_v2"}, (), {}),
        ({"ss_v2": "True", "ss_base_model_version": "sd_v2_v"}, (), {"prediction_type": "v_prediction"}),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, (), {"prediction_type": "v_prediction"}),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base"}, (), {}),
        (None, ("v_pred",), {"prediction_type": "v_prediction"}),
        (None, ("v_pred", "ztsnr"), BOTH),
        ({"ss_v_parameterization": "1", "ss_zero_terminal_snr": "True"}, (), BOTH),
        # What headers say may be left from the ancestor of a merge.
        ({"modelspec.prediction_type": "epsilon"}, ("v_pred",), {"prediction_type": "v_prediction"}),
    ],
)  # fmt: skip
def test_marks(tmp_path, metadata, names, expected):
    assert marks.schedule_hints(_file(tmp_path / "x.safetensors", metadata, *names)) == expected


def test_other_schedules_are_refused(tmp_path):
    with pytest.raises(ModelError, match="EDM schedule"):
        marks.schedule_hints(_file(tmp_path / "edm.safetensors", None, "edm_vpred.sigma_max"))
    with pytest.raises(ModelError, match=r'modelspec\.prediction_type "sample"; epsilon and v are supported'):
        marks.schedule_hints(_file(tmp_path / "x.safetensors", {"modelspec.prediction_type": "sample"}))


@pytest.fixture(scope="module")
def checkpoint(tiny_sdxl, tmp_path_factory):
    """Return a function that writes the tiny SDXL as a single file with other metadata, or without some tensors."""
    whole = write_single_file(tiny_sdxl, tmp_path_factory.mktemp("single") / "whole.safetensors")
    tensors = load_file(whole)

    def write(name, metadata=None, drop=(), strip="", extra=None):
        kept = {key.removeprefix(strip): value for key, value in tensors.items() if not key.startswith(tuple(drop))}
        save_file(kept | (extra or {}), whole.parent / name, metadata=metadata)
        return whole.parent / name

    return write


def test_a_header_decides_like_a_tensor(checkpoint, tiny_sdxl):
    file = checkpoint("v.safetensors", {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"})
    loaded = backbones.load(file, config=tiny_sdxl)
    assert loaded.path.prediction_type == "v_prediction"
    assert loaded.path.alphas_cumprod[-1] == 0
    assert loaded.pipeline().scheduler.config.prediction_type == "v_prediction"
    said = backbones.load(file, config=tiny_sdxl, prediction_type="epsilon")  # what the user says goes first
    assert said.path.prediction_type == "epsilon"
    assert said.path.alphas_cumprod[-1] > 0


OTHERS = ("first_stage_model.", "conditioner.")


def test_a_denoiser_alone_brings_its_schedule(checkpoint, tiny_sdxl):
    """Into a base for training, and into a pipeline to draw with."""
    file = checkpoint("unet.safetensors", {"modelspec.prediction_type": "v"}, OTHERS, "model.diffusion_model.")
    assert backbones.load(tiny_sdxl, unet_init=file).path.prediction_type == "v_prediction"
    plain = backbones.load(tiny_sdxl)
    drawn = export.load_adapter_into(plain.pipeline(), file)
    assert drawn.scheduler.config.prediction_type == "v_prediction"
    assert plain.pipeline().scheduler.config.prediction_type == "epsilon"  # the base is as it was


def test_a_denoiser_from_another_pipeline_brings_its_schedule(tiny_sdxl, tmp_path):
    (tmp_path / "unet").symlink_to(tiny_sdxl / "unet")
    (tmp_path / "scheduler").mkdir()
    config = (tiny_sdxl / "scheduler" / "scheduler_config.json").read_text()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(config.replace('"epsilon"', '"v_prediction"'))
    assert backbones.load(tiny_sdxl, unet_init=tmp_path).path.prediction_type == "v_prediction"


def test_a_lora_of_another_schedule_is_told_of(tiny_sdxl, tmp_path):
    backbone = backbones.load(tiny_sdxl)
    adapters.add_lora(backbone.denoiser, 2)
    file = export.save_lora(backbone.denoiser, tmp_path, metadata={"prediction_type": "v_prediction"})
    with pytest.warns(UserWarning, match="trained on a model that predicts v_prediction; this one predicts epsilon"):
        export.load_adapter_into(backbones.load(tiny_sdxl).pipeline(), file)


def test_a_checkpoint_without_a_vae_says_what_to_set(checkpoint, tiny_sdxl):
    file = checkpoint("bare.safetensors", None, ("first_stage_model.",))
    wanted = r"holds no VAE\. Set model\.pretrained_vae_model_name_or_path, to \"madebyollin/sdxl-vae-fp16-fix\""
    with pytest.raises(ModelError, match=wanted):
        backbones.load(file, config=tiny_sdxl)
    with pytest.raises(ModelError, match=wanted):  # before a run, and in its dry run
        inspection.check(str(file), 64)
    inspection.check(str(file), 64, vae=str(tiny_sdxl / "vae"))
    loaded = backbones.load(file, config=tiny_sdxl, vae=tiny_sdxl / "vae")
    assert loaded.fingerprint() == backbones.load(tiny_sdxl).fingerprint()
