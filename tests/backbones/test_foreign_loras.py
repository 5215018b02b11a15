"""LoRAs of a UNet and its text encoders, as many programs write them: all of their layers act, by their alphas."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign import backbones
from diffalign.backbones import export, lora_layouts, peft_folders
from diffalign.backbones.families import adapted
from diffalign.backbones.kohya import ldm_name
from diffalign.backbones.lora_factors import Factors
from diffalign.backbones.lora_families import names_of
from diffalign.backbones.lora_files import Lora
from diffalign.errors import ModelError

UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OTHER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
MLP = "text_model.encoder.layers.1.mlp.fc1"
# By network and layer: rank and alpha.
WANTED = {
    "unet": {UNET: (2, 1.0), OTHER: (3, 6.0)},
    "text_encoder": {TEXT: (2, 4.0), MLP: (4, 4.0)},
    "text_encoder_2": {TEXT: (2, 0.5)},
}


@pytest.fixture(scope="module")
def backbone(tiny_sdxl):
    return backbones.load(tiny_sdxl)


@pytest.fixture(scope="module")
def factors(backbone):
    """Return network -> layer -> factors, at random."""
    generator = torch.Generator().manual_seed(0)
    networks = {"unet": backbone.denoiser}
    networks |= dict(zip(("text_encoder", "text_encoder_2"), backbone.text_encoders, strict=True))

    def of(network, name, rank, alpha):
        layers = dict(networks[network].named_modules())
        out, into = layers.get(name, layers.get(name.removeprefix("text_model."))).weight.shape
        down, up = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
        return Factors(down, up, alpha)

    return {network: {n: of(network, n, *ra) for n, ra in layers.items()} for network, layers in WANTED.items()}


def layout(name):
    """Return what writes a LoRA in one of our own layouts."""

    def write(factors, backbone, folder):
        text = {network: layers for network, layers in factors.items() if network != "unet"}
        lora, names = Lora(factors["unet"], text), names_of(backbone.denoiser)
        return lora_layouts.write(lora, name, folder / "x.safetensors", names, "unet")

    return write


def tensors(factors, prefixes, ends=("lora_A", "lora_B"), spell=lambda network, name: name):
    """Return tensors by keys of a layout; alphas as tensors where the ends are kohya's."""
    found = {}
    for network, layers in factors.items():
        for name, entry in layers.items():
            stem = prefixes[network] + spell(network, name)
            found |= {f"{stem}.{ends[0]}.weight": entry.down, f"{stem}.{ends[1]}.weight": entry.up}
            if ends[0] == "lora_down":
                found[f"{stem}.alpha"] = torch.tensor(entry.alpha)
    return found


def dotted_with_alphas(factors, backbone, folder):
    """Write diffusers' names with kohya's factors and alphas, as OneTrainer and others do."""
    prefixes = {network: f"{network}." for network in factors}
    save_file(tensors(factors, prefixes, ("lora_down", "lora_up")), folder / "x.safetensors")
    return folder / "x.safetensors"


def comfy_names(factors, backbone, folder):
    """Write ComfyUI's names: those of the original UNet, and of its text encoders."""
    prefixes = {"unet": "diffusion_model.", "text_encoder": "text_encoders.clip_l.transformer."}
    prefixes["text_encoder_2"] = "text_encoders.clip_g.transformer."

    def spell(network, name):
        return ldm_name(name, backbone.denoiser) if network == "unet" else name

    save_file(tensors(factors, prefixes, ("lora_down", "lora_up"), spell), folder / "x.safetensors")
    return folder / "x.safetensors"


def kohya_names_of_diffusers(factors, backbone, folder):
    """Write kohya's keys with diffusers' names of the UNet's layers, as diffusers' own converter does."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    made = tensors(factors, prefixes, ("lora_down", "lora_up"), lambda _, name: name.replace(".", "_"))
    save_file(made, folder / "x.safetensors")
    return folder / "x.safetensors"


def peft_settings(layers):
    """Return an adapter_config.json with the alphas of layers, each by a pattern."""
    alphas = {name: entry.alpha for name, entry in layers.items()}
    ranks = {name: entry.rank for name, entry in layers.items()}
    said = {"r": 7, "lora_alpha": 7, "rank_pattern": ranks, "alpha_pattern": alphas, "target_modules": list(layers)}
    return said | {"base_model_name_or_path": "someone/base", "peft_type": "LORA"}


def peft(factors, backbone, folder):
    """Write a folder of peft's for each network, in its scripts' way."""
    for network, layers in factors.items():
        (folder / network).mkdir()
        held = tensors({network: layers}, {network: peft_folders.WRAPPER})
        save_file(held, folder / network / "adapter_model.safetensors")
        (folder / network / "adapter_config.json").write_text(json.dumps(peft_settings(layers)))
    return folder


WRITERS = {
    "diffusers": layout("diffusers"),
    "kohya": layout("kohya"),
    "kohya with diffusers' names": kohya_names_of_diffusers,
    "dots and alphas": dotted_with_alphas,
    "comfy": comfy_names,
    "peft": peft,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_all_layers_act_by_their_alphas(writer, backbone, factors, tmp_path):
    pipeline = backbone.pipeline()
    try:
        export.load_adapter_into(pipeline, WRITERS[writer](factors, backbone, tmp_path))
        assert len(adapted(pipeline)) == 3
        for network, layers in factors.items():
            found = {n.removeprefix("text_model."): p for n, p in getattr(pipeline, network).named_modules()}
            carriers = {name: part for name, part in found.items() if hasattr(part, "lora_A")}
            assert carriers.keys() == {name.removeprefix("text_model.") for name in layers}
            for name, entry in layers.items():
                layer = carriers[name.removeprefix("text_model.")]
                (adapter,) = layer.lora_A
                update = layer.get_delta_weight(adapter)
                torch.testing.assert_close(update, entry.alpha / entry.rank * entry.up @ entry.down)
    finally:
        export.unload_adapters(pipeline)
    assert not adapted(pipeline)


def test_a_peft_folder_names_its_base(backbone, factors, tmp_path):
    assert peft_folders.base_named(peft(factors, backbone, tmp_path)) == "someone/base"
    assert peft_folders.base_named(tmp_path / "unet" / "adapter_model.safetensors") == "someone/base"
    assert peft_folders.base_named(tmp_path / "nowhere" / "x.safetensors") is None


def test_a_part_that_does_not_fit_is_refused(tiny_sd15, backbone, factors, tmp_path):
    """SD1.5 has one text encoder: what a LoRA holds of a second is not dropped without a word."""
    sd15 = backbones.load(tiny_sd15)
    layers = {"unet": {}, "text_encoder_2": factors["text_encoder_2"]}
    out, into = dict(sd15.denoiser.named_modules())[OTHER].weight.shape
    layers["unet"][OTHER] = Factors(torch.randn(2, into), torch.randn(out, 2), 2.0)
    file = layout("diffusers")(layers, sd15, tmp_path)
    with pytest.raises(ModelError, match="Only 0 of the 1 modules for text_encoder_2"):
        export.load_adapter_into(sd15.pipeline(), file)


@pytest.mark.parametrize(("key", "words"), [("dora_scale", "DoRA"), ("lora_mid.weight", "third factor")])
def test_what_no_two_factors_say_is_refused(backbone, factors, tmp_path, key, words):
    """diffusers would leave it out and draw something else."""
    file = kohya_names_of_diffusers(factors, backbone, tmp_path)
    stem = f"lora_unet_{UNET.replace('.', '_')}"
    save_file(load_file(file) | {f"{stem}.{key}": torch.ones(2, 2)}, tmp_path / "y.safetensors")
    with pytest.raises(ModelError, match=words):
        export.load_adapter_into(backbone.pipeline(), tmp_path / "y.safetensors")
