"""LoRAs in the layouts of diffusers, kohya and ComfyUI: what loads draws the same, and names alone change."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch import nn

from diffalign import backbones
from diffalign.backbones import adapters, export, loading, lora_files, lora_layouts
from diffalign.backbones.families import BY_NAME
from diffalign.backbones.lora_families import in_diffusers_layout
from diffalign.backbones.lora_files import LoraFile
from diffalign.errors import ModelError
from tests.backbones.drawing import PROMPT, draw, perturb
from tests.backbones.original import original as original_weights

TRANSFORMERS = ("sd3", "flux", "flux2", "qwen", "zimage")
FIXTURES = {"flux2": "tiny_klein"}  # else tiny_ and the family
FAMILIES = ("sd15", "sdxl", *TRANSFORMERS)
# diffusers' conversions of original weights: the proof for what it cannot load as a LoRA.
CONVERSIONS = {
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "zimage": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
}


def _folder(request, family):
    return request.getfixturevalue(FIXTURES.get(family, f"tiny_{family}"))


def _layers(denoiser):
    """Return the names of all layers a LoRA can adapt."""
    return [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """Return a function: family -> (folder, backbone with every layer adapted and trained, its file of diffusers')."""
    made = {}

    def of(family, keep=lambda name: True):
        key = (family, keep("proj_mlp"))
        if key not in made:
            folder = _folder(request, family)
            backbone = backbones.load(folder)
            names = [name for name in _layers(backbone.denoiser) if keep(name)]
            targets = [name for name in names if sum(other.endswith(f".{name}") for other in names) == 0]
            perturb(adapters.add_lora(backbone.denoiser, 4, alpha=8, target_modules=targets), scale=0.1)
            file = export.save_lora(backbone.denoiser, tmp_path_factory.mktemp("lora"), "some/base", {"note": 1})
            made[key] = folder, backbone, file
        return made[key]

    return of


def _convert(file, family, layout, out, denoiser=None):
    kind = BY_NAME[family]
    names = kind.layer_names(denoiser)
    lora = LoraFile(file).read(names, family)
    return lora_layouts.write(lora, layout, out, names, kind.denoiser_name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_a_name_elsewhere_and_back(request, family):
    denoiser = backbones.load(_folder(request, family)).denoiser
    names, layers = BY_NAME[family].layer_names(denoiser), _layers(denoiser)
    assert len(layers) > 20
    for name in layers:
        rename, part = names.find(name)
        assert rename.parts[part] == name
        assert names.find(name.replace(".", "_"), flat=True) == (rename, part)
        again, whole = names.find(rename.original)
        assert again == rename
        assert whole is None or rename.original == name
        assert names.find(rename.original.replace(".", "_"), flat=True) == (again, whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["kohya", "comfy"])
def test_there_and_back_nothing_changes(trained, tmp_path, family, layout):
    _, backbone, file = trained(family)
    there = _convert(file, family, layout, tmp_path / "there.safetensors", backbone.denoiser)
    back = _convert(there, family, "diffusers", tmp_path / "back.safetensors", backbone.denoiser)
    before, after = load_file(file), load_file(back)
    assert before.keys() == after.keys()
    folded = (family, layout) == ("flux2", "comfy")  # alpha / rank = 2 is in `up` there
    for key in before:
        assert torch.equal(after[key], before[key] * (2 if folded and "lora_B" in key else 1))
    assert before.keys() != load_file(there).keys()
    metadata = LoraFile(back).metadata
    assert (metadata["base_model"], metadata["note"]) == ("some/base", "1")
    alpha = json.loads(metadata["lora_adapter_metadata"])[f"{backbone.denoiser_name}.lora_alpha"]
    assert alpha == (4 if folded else 8)
    assert "lora_adapter_metadata" not in LoraFile(there).metadata  # diffusers would take alpha from it once more


@pytest.mark.parametrize("family", ["sd3", "flux", "zimage"])
def test_a_fused_lora_made_elsewhere_comes_back_to_the_bit(trained, tmp_path, family):
    _, _, file = trained(family)
    kohya = load_file(_convert(file, family, "kohya", tmp_path / "made.safetensors"))
    generator = torch.Generator().manual_seed(5)
    for key, tensor in kohya.items():  # one rank for q, k and v, as sd-scripts trains it
        if key.endswith(".alpha"):
            kohya[key] = torch.tensor(1.5)
        else:
            down = "lora_down" in key
            shape = (6, *tensor.shape[1:]) if down else (len(tensor), 6, *tensor.shape[2:])
            kohya[key] = torch.randn(shape, generator=generator).half()
    save_file(kohya, tmp_path / "foreign.safetensors", metadata={"ss_output_name": "foreign"})
    diffusers = _convert(tmp_path / "foreign.safetensors", family, "diffusers", tmp_path / "d.safetensors")
    again = _convert(diffusers, family, "kohya", tmp_path / "again.safetensors")
    after = load_file(again)
    assert after.keys() == kohya.keys()
    assert all(torch.equal(after[key], kohya[key]) and after[key].dtype == kohya[key].dtype for key in kohya)
    assert LoraFile(again).metadata["ss_output_name"] == "foreign"
    assert any(tensor.dtype == torch.float16 for tensor in load_file(diffusers).values())


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_trained_network_is_written_as_its_file_is_converted(trained, tmp_path, family):
    _, backbone, file = trained(family)
    for layout, save in (("kohya", export.save_kohya_lora), ("comfy", export.save_comfy_lora)):
        written = load_file(save(backbone.denoiser, tmp_path / f"{layout}.safetensors", dtype=torch.float16))
        converted = load_file(_convert(file, family, layout, tmp_path / "x.safetensors"))
        assert written.keys() == converted.keys()
        for key, tensor in converted.items():
            assert torch.equal(written[key], tensor if key.endswith(".alpha") else tensor.half())


class TestDiffusersLoadsIt:
    """`load_lora_weights` of the stock pipelines, of every layout that diffusers reads for the family."""

    @pytest.mark.parametrize(
        ("family", "layout"),
        [(family, layout) for family in FAMILIES for layout in lora_layouts.LAYOUTS if (family, layout) not in
         {("sd3", "kohya"), ("sd3", "comfy"), ("sd15", "comfy"), ("sdxl", "comfy")}],
    )  # fmt: skip
    def test_and_draws_the_same(self, trained, tmp_path, family, layout):
        # diffusers 0.42 reads of FLUX and Z-Image what lies in blocks, and linear1 of FLUX.1 at its true width only.
        narrow = family in TRANSFORMERS and layout != "diffusers"
        blocks = ("transformer_blocks.", "layers.", "noise_refiner.", "context_refiner.")

        def keep(name):
            in_linear1 = (
                family == "flux" and name.startswith("single_") and (".attn." in name or name.endswith("proj_mlp"))
            )
            return not narrow or (name.removeprefix("single_").startswith(blocks) and not in_linear1)

        folder, backbone, file = trained(family, keep)
        plain = DiffusionPipeline.from_pretrained(folder)
        base = draw(plain)
        written = _convert(file, family, layout, tmp_path / "x.safetensors", backbone.denoiser)
        plain.load_lora_weights(written)
        image = draw(plain)
        torch.testing.assert_close(image, draw(backbone.pipeline()), rtol=0, atol=2e-5)
        assert (image - base).abs().max() > 0.01

    def test_flux_at_its_true_width(self, tmp_path):
        """The factors alone: diffusers' own conversion of kohya's and ComfyUI's files ends in the same matrices."""
        names, generator = BY_NAME["flux"].layer_names(), torch.Generator().manual_seed(2)
        widths = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
        layers = {f"single_transformer_blocks.3.{name}": width for name, width in widths.items()}
        layers |= {f"transformer_blocks.0.attn.{name}": 3072 for name in ("to_q", "to_v", "add_k_proj", "to_out.0")}
        factors = {
            name: lora_files.Factors(
                torch.randn(rank, 3072, generator=generator), torch.randn(width, rank, generator=generator), alpha
            )
            for (name, width), rank, alpha in zip(
                layers.items(), (2, 2, 2, 2, 1, 3, 2, 2), (4.0,) * 4 + (2.0, 6.0) + (1.0,) * 2, strict=True
            )
        }
        lora = lora_files.Lora(factors)
        for layout in ("kohya", "comfy"):
            file = lora_layouts.write(lora, layout, tmp_path / f"{layout}.safetensors", names, "transformer")
            read = FluxPipeline.lora_state_dict(str(file))
            for name, entry in factors.items():
                a, b = (read[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
                torch.testing.assert_close(b @ a, entry.scale * entry.up @ entry.down, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("family", "layout"), [("sd3", "kohya"), ("sd3", "comfy"), ("zimage", "kohya")])
def test_merged_into_the_original_weights_it_predicts_the_same(trained, tmp_path, family, layout):
    """What diffusers does not load is proved by its own conversion of original weights, with the update in them."""
    folder, backbone, file = trained(family)
    written = load_file(_convert(file, family, layout, tmp_path / "x.safetensors"))
    network = loading.load(folder).denoiser
    unchanged, original = CONVERSIONS[family](original_weights(family, network)), original_weights(family, network)
    assert all(torch.equal(unchanged[key], tensor) for key, tensor in network.state_dict().items())
    used = set()
    for key in [key for key in original if key.endswith(".weight")]:
        name = key.removesuffix(".weight")
        stem = f"lora_unet_{name.replace('.', '_')}" if layout == "kohya" else f"diffusion_model.{name}"
        if f"{stem}.alpha" in written:
            down, up, alpha = (written[f"{stem}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
            update = (up.flatten(1) @ down.flatten(1)).reshape(original[key].shape)
            original[key] = original[key] + alpha / len(down) * update
            used |= {entry for entry in written if entry.startswith(f"{stem}.")}
    assert used == written.keys()  # all of them name layers of the original network
    network.load_state_dict(CONVERSIONS[family](original))
    xt = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(3))
    times = torch.tensor([100.0, 800.0])
    with torch.no_grad():
        cond = backbone.condition(backbone.encode_prompts([PROMPT, "a cat"]), None)
        expected = backbone.predict(backbone.denoiser, xt, times, cond)
        with adapters.adapters_off(backbone.denoiser):
            without = backbone.predict(backbone.denoiser, xt, times, cond)
        prediction = backbone.predict(network, xt, times, cond)
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-4)
    assert (expected - without).abs().max() > 0.1


class TestDiffalignLoadsIt:
    """`generate`, `grid` and `evaluate` go through `load_adapter_into`."""

    @pytest.mark.parametrize("layout", ["kohya", "comfy"])
    @pytest.mark.parametrize("family", TRANSFORMERS)
    def test_all_layers_in_every_layout(self, trained, tmp_path, family, layout):
        folder, backbone, file = trained(family)
        written = _convert(file, family, layout, tmp_path / "x.safetensors")
        loaded = export.load_adapter_into(loading.load(folder).pipeline(), written)
        torch.testing.assert_close(draw(loaded), draw(backbone.pipeline()), rtol=0, atol=2e-5)

    def test_a_lora_of_another_transformer_is_refused_with_the_reason(self, trained, tmp_path):
        folder, _, _ = trained("sd3")
        flux = _convert(trained("flux")[2], "flux", "kohya", tmp_path / "flux.safetensors")
        with pytest.raises(ModelError, match="not of sd3: its layers are those of flux"):
            export.load_adapter_into(loading.load(folder).pipeline(), flux)

    def test_a_lora_of_another_size_is_refused_with_the_reason(self, trained, tmp_path):
        folder, _, file = trained("sd3")
        kohya = load_file(_convert(file, "sd3", "kohya", tmp_path / "small.safetensors"))
        key = "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"
        kohya[key] = torch.zeros(len(kohya[key]), 48)
        save_file(kohya, tmp_path / "large.safetensors")
        with pytest.raises(ModelError, match=r'"transformer_blocks.0.attn.to_q" by a matrix of \[64, 48\]'):
            export.load_adapter_into(loading.load(folder).pipeline(), tmp_path / "large.safetensors")

    def test_diffusers_names_with_alphas_as_tensors(self, trained, tmp_path):
        folder, backbone, file = trained("sd3")
        tensors = {}
        for key, tensor in load_file(file).items():
            tensors[key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")] = tensor
            tensors[f"{key.rsplit('.lora_', 1)[0]}.alpha"] = torch.tensor(8.0)
        save_file(tensors, tmp_path / "x.safetensors")
        loaded = export.load_adapter_into(loading.load(folder).pipeline(), tmp_path / "x.safetensors")
        torch.testing.assert_close(draw(loaded), draw(backbone.pipeline()), rtol=0, atol=2e-5)

    def test_clips_part_of_a_kohya_lora_acts(self, trained, tmp_path):
        folder, _, file = trained("flux")
        tensors = load_file(_convert(file, "flux", "kohya", tmp_path / "plain.safetensors"))
        wanted = {"layers.0.self_attn.q_proj": (2, 4.0), "layers.1.self_attn.q_proj": (2, 4.0)}
        wanted["layers.1.self_attn.v_proj"] = (3, 1.5)
        for name, (rank, alpha) in wanted.items():
            stem = f"lora_te1_text_model_encoder_{name.replace('.', '_')}"
            tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, 16)
            tensors[f"{stem}.lora_up.weight"] = torch.randn(16, rank)
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        save_file(tensors, tmp_path / "text.safetensors")
        pipeline = export.load_adapter_into(loading.load(folder).pipeline(), tmp_path / "text.safetensors")
        layers = {name: part for name, part in pipeline.text_encoder.named_modules() if hasattr(part, "lora_A")}
        assert len(layers) == len(wanted)
        for end, (rank, alpha) in wanted.items():
            (layer,) = [part for name, part in layers.items() if name.endswith(end)]
            (name,), stem = layer.lora_A, f"lora_te1_text_model_encoder_{end.replace('.', '_')}"
            assert torch.equal(layer.lora_A[name].weight, tensors[f"{stem}.lora_down.weight"])
            assert torch.equal(layer.lora_B[name].weight, tensors[f"{stem}.lora_up.weight"])
            assert layer.scaling[name] == alpha / rank

    def test_diffusers_own_files_are_left_to_it(self, trained):
        _, backbone, file = trained("sd3")
        with in_diffusers_layout(file, backbone.denoiser) as same:
            assert same == file
