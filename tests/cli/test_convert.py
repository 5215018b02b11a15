"""`diffalign convert`: there and back, what it says, and what it refuses with exit code 2."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign import backbones
from diffalign.backbones import adapters, export
from diffalign.backbones.files import read_header
from tests.backbones.drawing import perturb


@pytest.fixture(scope="module")
def lora(tiny_sd3, tmp_path_factory):
    backbone = backbones.load(tiny_sd3)
    idle = backbone.idle_layers(backbone.denoiser)
    perturb(adapters.add_lora(backbone.denoiser, 4, alpha=8, target_modules=backbone.lora_targets, idle=idle))
    return export.save_lora(backbone.denoiser, tmp_path_factory.mktemp("mine"), str(tiny_sd3))


def test_there_and_back(diffalign, lora, tiny_sd3, tmp_path):
    code, said = diffalign("convert", lora.parent, tmp_path / "loras", "--to", "kohya", "--model", tiny_sd3)
    kohya = tmp_path / "loras" / f"{lora.parent.name}.safetensors"
    assert code == 0
    assert f"diffusers, sd3, {len(load_file(lora)) // 2} layers, rank 4, alpha/rank 2" in said
    assert str(kohya) in said
    assert all(key.startswith("lora_unet_joint_blocks_") for key in load_file(kohya))
    code, said = diffalign("convert", kohya, tmp_path / "back", "--to", "diffusers")
    back = load_file(tmp_path / "back" / "pytorch_lora_weights.safetensors")
    assert code == 0
    assert all(torch.equal(back[key], tensor) for key, tensor in load_file(lora).items())


def test_dtype_and_family(diffalign, lora, tmp_path):
    out = tmp_path / "x.safetensors"
    assert diffalign("convert", lora, out, "--to", "comfy", "--family", "sd3", "--dtype", "bfloat16")[0] == 0
    tensors = load_file(out)
    assert {tensor.dtype for key, tensor in tensors.items() if not key.endswith(".alpha")} == {torch.bfloat16}
    assert any(key.startswith("diffusion_model.joint_blocks.0.x_block.attn.qkv.") for key in tensors)


def test_unets_too(diffalign, tiny_sdxl, tmp_path):
    backbone = backbones.load(tiny_sdxl)
    perturb(adapters.add_lora(backbone.denoiser, 4, alpha=8))
    lora = export.save_lora(backbone.denoiser, tmp_path / "sdxl")
    kohya = export.save_kohya_lora(backbone.denoiser, tmp_path / "kohya.safetensors")
    for layout in ("kohya", "comfy"):
        out = tmp_path / f"{layout}-out.safetensors"
        assert diffalign("convert", lora, out, "--to", layout, "--family", "sdxl")[0] == 0
        assert load_file(out).keys() == load_file(kohya).keys()
        assert all(torch.equal(tensor, load_file(kohya)[key]) for key, tensor in load_file(out).items())
        metadata = [read_header(file)["__metadata__"] for file in (kohya, out)]
        for said, title in zip(metadata, ("kohya", out.stem), strict=True):
            assert (said.pop("ss_output_name"), said.pop("modelspec.title")) == (title, title)
        assert metadata[0] == metadata[1]
    assert diffalign("convert", kohya, tmp_path / "back", "--to", "diffusers", "--model", tiny_sdxl)[0] == 0
    back = load_file(tmp_path / "back" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(back[key], tensor) for key, tensor in load_file(lora).items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "komfy"], 'Did you mean "comfy"'),
        (["--to", "kohya", "--family", "flx"], 'Did you mean "flux"'),
        (["--to", "kohya", "--family", "zimage"], "not of zimage"),
        (["--to", "kohya", "--family", "sd3", "--model", "x"], "not both"),
        (["--to", "kohya", "--family", "sd3", "--dtype", "int8"], "int8"),
    ],
)
def test_refusals(diffalign, lora, tmp_path, arguments, words):
    code, said = diffalign("convert", lora, tmp_path / "x.safetensors", *arguments)
    assert code == 2
    assert words in said
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unasked(diffalign, lora, tmp_path):
    out = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, out)
    code, said = diffalign("convert", lora, out, "--to", "comfy", "--family", "sd3")
    assert (code, "--overwrite" in said) == (2, True)
    assert load_file(out).keys() == {"a"}
    assert diffalign("convert", lora, out, "--to", "comfy", "--family", "sd3", "--overwrite")[0] == 0
    assert "a" not in load_file(out)
    code, said = diffalign("convert", out, out, "--to", "kohya", "--family", "sd3", "--overwrite")
    assert (code, "is the source" in said) == (2, True)


def test_what_is_no_lora(diffalign, tmp_path):
    assert diffalign("convert", tmp_path / "none.safetensors", tmp_path / "out", "--to", "kohya")[0] == 2
    assert diffalign("convert", tmp_path, tmp_path / "out", "--to", "kohya")[0] == 2
    (tmp_path / "old.pt").write_bytes(b"")
    code, said = diffalign("convert", tmp_path / "old.pt", tmp_path / "out", "--to", "kohya")
    assert (code, "pickle" in said) == (2, True)
