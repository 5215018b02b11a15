"""Full UNet folders, and what survives when the disk fills up during any export."""

import errno
import os
import resource

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from diffalign import backbones
from diffalign.backbones import adapters, export, files
from diffalign.errors import ModelError, UserError
from tests.backbones.drawing import draw, perturb


@pytest.fixture(params=["tiny_sd15", "tiny_sdxl"])
def folder(request):
    return request.getfixturevalue(request.param)


def _trained(folder):
    backbone = backbones.load(folder)
    perturb(backbone.denoiser.parameters(), scale=0.01)
    return backbone


def test_round_trip_through_diffusers(folder, tmp_path):
    trained = _trained(folder)
    expected = draw(trained.pipeline())
    assert export.save_denoiser(trained.denoiser, tmp_path) == tmp_path / "unet"
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    image = draw(DiffusionPipeline.from_pretrained(folder, unet=loaded))
    assert torch.equal(image, expected)
    assert (image - draw(DiffusionPipeline.from_pretrained(folder))).abs().max() > 0.01


def test_load_adapter_into_takes_unets_and_pipelines(folder, tmp_path):
    trained = _trained(folder)
    expected = draw(trained.pipeline())
    export.save_denoiser(trained.denoiser, tmp_path / "run")
    trained.pipeline().save_pretrained(tmp_path / "whole")
    for source in ("run", "run/unet", "whole"):
        pipeline = export.load_adapter_into(backbones.load(folder).pipeline(), tmp_path / source)
        assert torch.equal(draw(pipeline), expected)


def test_unet_init_continues_from_an_export(folder, tmp_path):
    trained = _trained(folder)
    export.save_denoiser(trained.denoiser, tmp_path)
    continued = backbones.load(folder, unet_init=tmp_path)
    assert continued.denoiser_fingerprint() == trained.denoiser_fingerprint()


def test_a_unet_of_another_family_is_refused(tiny_sd15, tiny_sdxl, tmp_path):
    export.save_denoiser(_trained(tiny_sd15).denoiser, tmp_path)
    with pytest.raises(ModelError, match="cross_attention_dim 32"):
        export.load_adapter_into(backbones.load(tiny_sdxl).pipeline(), tmp_path)


def test_dtype_and_state_dict_arguments(tiny_sd15, tmp_path):
    denoiser = backbones.load(tiny_sd15).denoiser
    averaged = {name: 2 * tensor for name, tensor in denoiser.state_dict().items()}
    export.save_denoiser(denoiser, tmp_path, state_dict=averaged, dtype=torch.bfloat16)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet", torch_dtype=torch.bfloat16)
    assert torch.equal(loaded.conv_in.weight, (2 * denoiser.conv_in.weight).bfloat16())


def test_a_network_with_adapters_is_refused(tiny_sd15, tmp_path):
    denoiser = backbones.load(tiny_sd15).denoiser
    adapters.add_lora(denoiser, 4)
    with pytest.raises(ModelError, match="save_lora"):
        export.save_denoiser(denoiser, tmp_path)


def _exports(tiny_sd15, tmp_path, kind):
    """Return a function that exports and the path it writes."""
    backbone = backbones.load(tiny_sd15)
    if kind == "unet":
        return lambda: export.save_denoiser(backbone.denoiser, tmp_path), tmp_path / "unet", backbone.denoiser
    adapters.add_lora(backbone.denoiser, 4)
    if kind == "lora":
        return lambda: export.save_lora(backbone.denoiser, tmp_path), tmp_path / files.LORA_FILE, backbone.denoiser
    file = tmp_path / "x.safetensors"
    return lambda: export.save_kohya_lora(backbone.denoiser, file), file, backbone.denoiser


def _content(path):
    parts = [path] if path.is_file() else sorted(path.rglob("*"))
    return {part.name: part.read_bytes() for part in parts}


def _fill_disk_in_write(monkeypatch):
    # The kernel refuses to let a file grow past this size, in the middle of the write.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _fill_disk_in_rename(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    return monkeypatch.undo


@pytest.mark.parametrize("kind", ["lora", "kohya", "unet"])
@pytest.mark.parametrize("fill_disk", [_fill_disk_in_write, _fill_disk_in_rename])
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "again"])
def test_a_full_disk_leaves_the_previous_export_intact(tiny_sd15, tmp_path, monkeypatch, kind, fill_disk, is_first):
    save, path, denoiser = _exports(tiny_sd15, tmp_path / "out", kind)
    if not is_first:
        save()
        before = _content(path)
        perturb(adapters.trainable_parameters(denoiser))
    restore = fill_disk(monkeypatch)
    try:
        with pytest.raises(UserError) as caught:
            save()
    finally:
        restore()
    message = str(caught.value)
    assert str(path) in message
    assert "free some space" in message
    if is_first:
        assert "Nothing was left behind" in message
        assert list((tmp_path / "out").iterdir()) == []
    else:
        assert "is intact" in message
        assert _content(path) == before
        assert [entry.name for entry in (tmp_path / "out").iterdir()] == [path.name]
        save()
        assert _content(path) != before


def test_a_failed_swap_of_folders_is_undone(tiny_sd15, tmp_path, monkeypatch):
    save, path, denoiser = _exports(tiny_sd15, tmp_path, "unet")
    save()
    before = _content(path)
    perturb(denoiser.parameters())
    replace = os.replace

    def fail_second(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(ModelError, match="is intact"):
        save()
    assert _content(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["unet"]


def test_a_path_that_cannot_be_a_folder(tiny_sd15, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="Cannot write"):
        export.save_denoiser(backbones.load(tiny_sd15).denoiser, tmp_path / "file")
