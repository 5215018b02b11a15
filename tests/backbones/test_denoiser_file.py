"""A transformer or UNet in one file, in the original layout or diffusers', in the place of a pipeline's own."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign import backbones
from diffalign.backbones import export, inspection, loading, published
from diffalign.backbones.denoiser_file import DenoiserFile
from diffalign.backbones.families import BY_NAME
from diffalign.errors import ModelError
from tests.backbones.drawing import draw, perturb
from tests.backbones.ldm import write_single_file
from tests.backbones.original import original, write_header, write_original

FOLDERS = {"sd3": "tiny_sd3", "flux": "tiny_flux", "flux2": "tiny_klein", "qwen": "tiny_qwen", "zimage": "tiny_zimage"}
TINY = ("sd3", "flux2", "qwen", "zimage")  # diffusers' conversion of FLUX.1 knows its true width alone
PREFIXES = {"sd3": "model.diffusion_model.", "flux2": "", "qwen": "diffusion_model.", "zimage": "diffusion_model."}


@pytest.fixture
def folder_of(request):
    return lambda family: request.getfixturevalue(FOLDERS.get(family, f"tiny_{family}"))


@pytest.fixture
def made(folder_of, tmp_path):
    """Return a function: family -> (pipeline's folder, other weights of its denoiser, these in one file)."""

    def of(family, prefix=None, extra=None):
        folder = folder_of(family)
        denoiser = loading.load(folder).denoiser
        perturb(denoiser.parameters(), scale=0.1)
        file = tmp_path / f"{family}.safetensors"
        prefix = PREFIXES[family] if prefix is None else prefix
        return folder, denoiser, write_original(family, denoiser, file, prefix, extra)

    return of


def _changed(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return file


def _shapes(hub_id, family):
    """Return the shapes of a published transformer's tensors in the original layout."""
    network = published.random_transformer(hub_id, device="meta")
    return {name: list(tensor.shape) for name, tensor in original(family, network).items()}


def _same(first, second):
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("family", TINY)
class TestOriginalLayout:
    def test_loads_to_the_bit(self, made, family):
        folder, denoiser, file = made(family)
        assert family == "qwen" or load_file(file).keys().isdisjoint(denoiser.state_dict())
        loaded = backbones.load(folder, unet_init=file)
        assert _same(loaded.denoiser, denoiser)
        assert not _same(loaded.denoiser, loading.load(folder).denoiser)
        half = backbones.load(folder, unet_init=file, torch_dtype=torch.bfloat16).denoiser
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}

    def test_is_put_into_a_pipeline_that_draws(self, made, family):
        folder, denoiser, file = made(family)
        pipeline = export.load_adapter_into(loading.load(folder).pipeline(), file)
        assert _same(pipeline.transformer, denoiser)
        assert draw(pipeline).isfinite().all()

    def test_what_it_lacks_is_named(self, made, family):
        folder, _, file = made(family)
        name = sorted(name for name in load_file(file) if name.endswith("weight"))[0]
        _changed(file, lambda tensors: tensors.pop(name))
        with pytest.raises(ModelError, match=r"does not fit the transformer of .*it lacks .*tensors, such as"):
            backbones.load(folder, unet_init=file)

    def test_what_it_has_too_much_is_named(self, made, family):
        folder, _, file = made(family)
        _changed(file, lambda tensors: tensors.update({f"{PREFIXES[family]}control.weight": torch.zeros(1)}))
        with pytest.raises(ModelError, match=r'it has 1 that have no place there, such as "control.weight"'):
            backbones.load(folder, unet_init=file)

    def test_another_size_is_named(self, made, family):
        folder, _, file = made(family)
        wide = max(load_file(file).items(), key=lambda entry: entry[1].ndim == 2 and len(entry[1]))[0]
        _changed(file, lambda tensors: tensors.update({wide: torch.cat([tensors[wide]] * 2)}))
        with pytest.raises(ModelError, match="are of another size, such as"):
            backbones.load(folder, unet_init=file)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_what_else_is_in_a_checkpoint_stays_unread(made, prefix):
    others = {"first_stage_model.decoder.conv_in.weight": torch.zeros(2), "text_encoders.clip_l.x": torch.zeros(2)}
    folder, denoiser, file = made("sd3", prefix, others if prefix else None)
    assert _same(backbones.load(folder, unet_init=file).denoiser, denoiser)


@pytest.mark.parametrize("family", FOLDERS)
def test_a_file_in_diffusers_layout(folder_of, tmp_path, family):
    denoiser = loading.load(folder_of(family)).denoiser
    perturb(denoiser.parameters(), scale=0.1)
    export.save_denoiser(denoiser, tmp_path)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    assert DenoiserFile.find(file).kind.family == family
    assert _same(backbones.load(folder_of(family), unet_init=file).denoiser, denoiser)


@pytest.mark.parametrize(("family", "prefix"), [("sd15", ""), ("sdxl", "model.diffusion_model.")])
def test_the_unet_of_a_checkpoint_or_alone(folder_of, tmp_path, family, prefix):
    folder = folder_of(family)
    file = write_single_file(folder, tmp_path / "model.safetensors")
    long = "model.diffusion_model."
    unet = {name.removeprefix(long): tensor + 1 for name, tensor in load_file(file).items() if name.startswith(long)}
    save_file({prefix + name: tensor for name, tensor in unet.items()}, tmp_path / "unet.safetensors")
    own = loading.load(folder).denoiser.state_dict()
    found = backbones.load(folder, unet_init=tmp_path / "unet.safetensors").denoiser.state_dict()
    assert all(torch.equal(found[name], tensor + 1) for name, tensor in own.items())
    _changed(tmp_path / "unet.safetensors", lambda tensors: tensors.update({f"{prefix}zero_convs.0": torch.zeros(1)}))
    with pytest.raises(ModelError, match="it has 1 that have no place there"):
        backbones.load(folder, unet_init=tmp_path / "unet.safetensors")
    other = folder_of("sdxl" if family == "sd15" else "sd15")
    with pytest.raises(ModelError, match="does not fit the unet of"):
        backbones.load(other, unet_init=file)


@pytest.mark.parametrize(("hub_id", "family"), [
    (hub_id, family) for family in FOLDERS for hub_id in published.TRANSFORMERS[family] if "2512" not in hub_id
])  # fmt: skip
def test_published_sizes_are_told_by_the_header_alone(tmp_path, hub_id, family):
    file = DenoiserFile.find(write_header(tmp_path / "x.safetensors", _shapes(hub_id, family)))
    assert file.kind is BY_NAME[family]
    assert file.published_like == hub_id
    assert file.what == f"transformer of {family} with {file.parameters:,} parameters in BF16"
    network = published.random_transformer(hub_id, device="meta")
    assert file.parameters == sum(parameter.numel() for parameter in network.parameters())


def test_flux_norms_under_the_other_name(tmp_path):
    shapes = {
        name.replace("_norm.scale", "_norm.weight"): shape
        for name, shape in _shapes("black-forest-labs/FLUX.1-dev", "flux").items()
    }
    file = DenoiserFile.find(write_header(tmp_path / "x.safetensors", shapes))
    assert file.published_like == "black-forest-labs/FLUX.1-dev"


class TestRefused:
    def test_another_family(self, made, folder_of):
        _, _, file = made("zimage")
        with pytest.raises(ModelError, match=r'transformer of zimage .*is a pipeline of sd3.*"Tongyi-MAI/Z-Image"'):
            backbones.load(folder_of("sd3"), unet_init=file)
        with pytest.raises(ModelError, match="is a pipeline of sdxl"):
            inspection.check_denoiser(DenoiserFile.find(file), str(folder_of("sdxl")))

    def test_another_published_size(self, tmp_path):
        shapes = _shapes("stabilityai/stable-diffusion-3.5-large", "sd3")
        file = DenoiserFile.find(write_header(tmp_path / "large.safetensors", shapes))
        with pytest.raises(ModelError, match=r'It has the shapes of "stabilityai/stable-diffusion-3.5-large"'):
            inspection.check_denoiser(file, "stabilityai/stable-diffusion-3.5-medium")
        inspection.check_denoiser(file, "stabilityai/stable-diffusion-3.5-large")

    def test_schnell_has_no_embedding_of_guidance(self, tmp_path):
        shapes = _shapes("black-forest-labs/FLUX.1-dev", "flux")
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("guidance_in.")}
        file = DenoiserFile.find(write_header(tmp_path / "x.safetensors", shapes))
        with pytest.raises(ModelError, match=r'such as "time_text_embed.guidance_embedder'):
            inspection.check_denoiser(file, "black-forest-labs/FLUX.1-dev")

    @pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8"])
    def test_quantised_dtypes(self, tmp_path, folder_of, dtype):
        file = write_header(tmp_path / "x.safetensors", {"joint_blocks.0.x_block.attn.qkv.weight": [2, 2]}, dtype)
        with pytest.raises(ModelError, match=rf"is quantised: .* is {dtype}.*model.quantization"):
            backbones.load(folder_of("sd3"), unet_init=file)

    @pytest.mark.parametrize("name", ["scaled_fp8", "joint_blocks.0.x.scale_weight", "x.weight_scale", "x.comfy_quant"])
    def test_quantised_by_its_names(self, made, name):
        folder, _, file = made("sd3", "", {name: torch.zeros(1)})
        with pytest.raises(ModelError, match=f'is quantised: "{name}"'):
            backbones.load(folder, unet_init=file)

    def test_gguf(self, tmp_path, folder_of):
        (tmp_path / "flux1-dev-Q4_0.gguf").write_bytes(b"GGUF")
        with pytest.raises(ModelError, match="is a GGUF file"):
            backbones.load(folder_of("flux"), unet_init=tmp_path / "flux1-dev-Q4_0.gguf")

    def test_few_step_models_for_training(self, made):
        folder, _, file = made("zimage")
        turbo = file.rename(file.with_name("z_image_turbo_bf16.safetensors"))
        with pytest.raises(ModelError, match="distilled to draw in a few steps"):
            inspection.check(str(folder), 64, unet_init=str(turbo))
        assert backbones.load(folder, unet_init=turbo).family == "zimage"  # to draw with it

    def test_a_lora_or_nothing_known(self, tmp_path, folder_of):
        file = tmp_path / "x.safetensors"
        save_file({"joint_blocks.0.x_block.attn.qkv.lora_A.weight": torch.zeros(1)}, file)
        with pytest.raises(ModelError, match=r"holds no UNet or transformer.*lora_A.*A LoRA is merged"):
            backbones.load(folder_of("sd3"), unet_init=file)

    def test_as_the_model_it_says_what_to_write(self, made, tmp_path):
        file = write_header(tmp_path / "f.safetensors", _shapes("black-forest-labs/FLUX.1-dev", "flux"))
        wish = rf"model.pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev model.unet_init={file}"
        with pytest.raises(ModelError, match=wish):
            backbones.load(file)
        with pytest.raises(ModelError, match="stable-diffusion-3-medium-diffusers"):  # of no published size
            inspection.check(str(made("sd3")[2]), 64)
