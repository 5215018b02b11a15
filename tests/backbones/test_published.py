"""The published configurations: sizes, tokenizers, and the names of SDXL's modules in the original UNet."""

import json

import diffusers
import open_clip
import pytest
import torch
import transformers

from diffalign.backbones import published
from diffalign.backbones.adapters import ATTENTION, add_lora
from diffalign.backbones.flux import Flux
from diffalign.backbones.flux2 import Flux2
from diffalign.backbones.kohya import kohya_metadata, ldm_name
from diffalign.backbones.lumina2 import Lumina2
from diffalign.backbones.pixart import PixArtSigma
from diffalign.backbones.qwen_image import QwenImage
from diffalign.backbones.sana import Sana
from diffalign.backbones.sd3 import SD3
from diffalign.backbones.z_image import ZImage
from diffalign.errors import ModelError

# Counts of the checkpoints on the hub.
PARAMETERS = {
    ("sd15", "unet"): 859_520_964,
    ("sd15", "vae"): 83_653_863,
    ("sd15", "text_encoder"): 123_060_480,
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "vae"): 83_653_863,
    ("sdxl", "text_encoder"): 123_060_480,
    ("sdxl", "text_encoder_2"): 694_659_840,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {family: published.write_config_folder(family, root / family) for family in published.PIPELINE_NAMES}


@pytest.fixture(scope="module")
def sdxl_unet():
    return published.random_unet("sdxl", device="meta")


def _count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("family", "name"), PARAMETERS)
def test_parameter_counts(folders, family, name):
    library, class_name = json.loads((folders[family] / "model_index.json").read_text())[name]
    loader = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
    with torch.device("meta"):
        if library == "diffusers":
            module = loader.from_config(loader.load_config(folders[family] / name))
        else:
            module = loader(transformers.CLIPTextConfig.from_pretrained(folders[family] / name))
    assert _count(module) == PARAMETERS[family, name]


def test_random_unet_on_meta_has_the_dtype_and_restores_the_default():
    unet = published.random_unet("sd15", torch.float16, device="meta")
    assert _count(unet) == PARAMETERS["sd15", "unet"]
    assert unet.dtype == torch.float16
    assert unet.conv_in.weight.is_meta
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(ModelError, match='"flux"'):
        published.random_unet("flux")


def test_random_unet_is_seeded(monkeypatch):
    small = published.UNET_SD15 | {"block_out_channels": [32] * 4, "cross_attention_dim": 16}
    monkeypatch.setitem(published.UNETS, "sd15", small)
    state = torch.get_rng_state()
    first = published.random_unet("sd15", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.conv_in.weight.dtype == torch.bfloat16
    assert torch.equal(first.conv_in.weight, published.random_unet("sd15", seed=1).conv_in.weight)
    assert not torch.equal(first.conv_in.weight, published.random_unet("sd15", seed=2).conv_in.weight)


def test_lora_size_of_sdxl():
    """Rank 64 on the attention: shared/reference/performance.md counts 92.9 M trainable parameters."""
    parameters = add_lora(published.random_unet("sdxl", device="meta"), 64)
    assert sum(parameter.numel() for parameter in parameters) == 92_897_280


@pytest.mark.parametrize(
    ("hub_id", "parameters", "lora"),
    [
        ("stabilityai/stable-diffusion-3-medium-diffusers", 2_028_328_000, 18_677_760),
        ("stabilityai/stable-diffusion-3.5-medium", 2_243_171_520, 23_789_568),
        ("stabilityai/stable-diffusion-3.5-large", 8_056_627_520, None),
    ],
)
def test_sizes_of_sd3(hub_id, parameters, lora):
    """Those of the published checkpoints, and of a LoRA of rank 32 on the attention of text and picture."""
    network = published.random_transformer(hub_id, device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    trained = add_lora(network, 32, target_modules=SD3.lora_targets, idle=SD3.idle_layers(network))
    blocks, width = network.config.num_layers, network.inner_dim
    layers = 8 * blocks - 2 + 4 * len(network.config.dual_attention_layers)  # the last block lacks two of them
    assert sum(parameter.numel() for parameter in trained) == layers * 32 * 2 * width == (lora or layers * 64 * width)


def test_size_of_flux():
    """That of FLUX.1-dev, and of a LoRA of rank 16 on the layers that are adapted by default."""
    network = published.random_transformer("black-forest-labs/FLUX.1-dev", device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_901_408_320
    trained = add_lora(network, 16, target_modules=Flux.lora_targets, idle=Flux.idle_layers(network))
    square, mlp_in, both = 2 * 3072, 3072 + 4 * 3072, 5 * 3072 + 3072  # inputs and outputs of a layer
    layers = 19 * 8 * square + 38 * (3 * square + mlp_in + both)
    assert sum(parameter.numel() for parameter in trained) == 16 * layers


@pytest.mark.parametrize(
    ("name", "parameters", "width", "blocks"),
    [
        ("klein-base-4B", 3_875_544_576, 3072, (5, 20)),
        ("klein-base-9B", 9_078_581_248, 4096, (8, 24)),
        ("dev", 32_223_281_152, 6144, (8, 48)),
    ],
)
def test_sizes_of_flux2(name, parameters, width, blocks):
    """And of a LoRA of rank 16: eight squares and four layers of MLPs of three widths, then two layers of both."""
    network = published.random_transformer(f"black-forest-labs/FLUX.2-{name}", device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    trained = add_lora(network, 16, target_modules=Flux2.lora_targets, idle=Flux2.idle_layers(network))
    double, single = 8 * 2 + 2 * (1 + 6 + 3 + 1), (1 + 3 + 6) + (1 + 3 + 1)
    assert sum(parameter.numel() for parameter in trained) == 16 * width * (blocks[0] * double + blocks[1] * single)


def test_size_of_lumina2():
    """Of a LoRA of rank 32: attention (keys and values 768 wide) and feed-forward layers (9216) of 30 blocks."""
    network = published.random_transformer("Alpha-VLLM/Lumina-Image-2.0", device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_609_769_152
    trained = add_lora(network, 32, target_modules=Lumina2.lora_targets, idle=Lumina2.idle_layers(network))
    attention, mlp = 2 * (2304 + 2304) + 2 * (2304 + 768), 3 * (2304 + 9216)
    assert sum(parameter.numel() for parameter in trained) == 30 * 32 * (attention + mlp)


@pytest.mark.parametrize(
    ("hub_id", "parameters"),
    [("PixArt-alpha/PixArt-XL-2-1024-MS", 611_349_152), ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 610_856_096)],
)
def test_sizes_of_pixart(hub_id, parameters):
    """0.61 billion, of alpha with embeddings of sizes; of a LoRA of rank 16 on two attentions and an MLP a block."""
    network = published.random_transformer(hub_id, device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    trained = add_lora(network, 16, target_modules=PixArtSigma.lora_targets)
    assert sum(parameter.numel() for parameter in trained) == 28 * 16 * (8 * 2 * 1152 + 2 * 5 * 1152)


def test_size_of_qwen_image():
    """Of a LoRA of rank 16: attention and MLPs of text and picture in 60 blocks, without the last one's idle layers."""
    network = published.random_transformer("Qwen/Qwen-Image-2512", device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) == 20_430_401_088
    trained = add_lora(network, 16, target_modules=QwenImage.lora_targets, idle=QwenImage.idle_layers(network))
    square, mlp = 2 * 3072, 2 * (3072 + 4 * 3072)  # inputs and outputs of a layer; of the two of an MLP
    idle = 2 * square + mlp
    assert sum(parameter.numel() for parameter in trained) == 16 * (60 * (8 * square + 2 * mlp) - idle)


@pytest.mark.parametrize(
    ("hub_id", "parameters", "width"),
    [
        ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", 1_604_462_752, 2240),
        ("Efficient-Large-Model/Sana_600M_1024px_diffusers", 591_747_872, 1152),
        ("Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers", 4_721_825_952, 2240),
    ],
)
def test_sizes_of_sana(hub_id, parameters, width):
    """Of a LoRA of rank 32: the four layers of two attentions in every block."""
    network = published.random_transformer(hub_id, device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    trained = add_lora(network, 32, target_modules=Sana.lora_targets, idle=Sana.idle_layers(network))
    assert sum(parameter.numel() for parameter in trained) == network.config.num_layers * 8 * 32 * 2 * width


def test_size_of_z_image():
    """Of a LoRA of rank 32: attention and feed-forward layers (10240 wide) of 30 blocks and of two refiners of two."""
    network = published.random_transformer("Tongyi-MAI/Z-Image", device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) == 6_154_908_736
    trained = add_lora(network, 32, target_modules=ZImage.lora_targets, idle=ZImage.idle_layers(network))
    assert sum(parameter.numel() for parameter in trained) == 34 * 32 * (4 * 2 * 3840 + 3 * (3840 + 10240))


@pytest.mark.parametrize(("pad_token", "pad_id"), [("<|endoftext|>", 49407), ("!", 0)])
def test_clip_tokenizer_agrees_with_open_clip(pad_token, pad_id):
    tokenizer = published.clip_tokenizer(pad_token)
    assert len(tokenizer) == 49408
    assert tokenizer.model_max_length == 77
    assert tokenizer.pad_token_id == pad_id
    # Without "!": where it pads, Hugging Face's tokenizer takes it for a mark of its own and splits "!!".
    texts = ["a photo of an astronaut riding a horse.", "caf\u00e9 2024, it's the dog's  \n \u2603", "", "x" * 500]
    ours = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    reference = open_clip.tokenize(texts)
    for row, expected in zip(ours, reference, strict=True):
        end = int((expected == 49407).nonzero()[0])
        assert torch.equal(row[: end + 1], expected[: end + 1])
        assert (row[end + 1 :] == pad_id).all()


def test_written_tokenizers_and_schedulers_load(folders):
    for family, folder in folders.items():
        index = json.loads((folder / "model_index.json").read_text())
        for name, (_, class_name) in ((key, value) for key, value in index.items() if isinstance(value, list)):
            if name.startswith("tokenizer"):
                tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / name)
                assert tokenizer.pad_token == published.COMPONENTS[family][name][2]["pad_token"]
                assert tokenizer("a cat").input_ids == [49406, 320, 2368, 49407]
            elif name == "scheduler":
                scheduler = getattr(diffusers, class_name).from_pretrained(folder / name)
                assert scheduler.alphas_cumprod[-1] == pytest.approx(0.0047, abs=1e-4)


def test_ldm_names_of_sdxl_attention(sdxl_unet):
    """Blocks with attention in SDXL's original UNet and their number of transformer layers (ComfyUI, kohya)."""
    depths = {
        **dict.fromkeys(["input_blocks.4.1", "input_blocks.5.1"], 2),
        **dict.fromkeys(["output_blocks.3.1", "output_blocks.4.1", "output_blocks.5.1"], 2),
        **dict.fromkeys(["input_blocks.7.1", "input_blocks.8.1", "middle_block.1"], 10),
        **dict.fromkeys(["output_blocks.0.1", "output_blocks.1.1", "output_blocks.2.1"], 10),
    }
    expected = {
        f"{block}.transformer_blocks.{layer}.{attention}.{projection}"
        for block, depth in depths.items()
        for layer in range(depth)
        for attention in ("attn1", "attn2")
        for projection in ATTENTION
    }
    names = [name for name, _ in sdxl_unet.named_modules() if name.endswith(ATTENTION)]
    assert {ldm_name(name, sdxl_unet) for name in names} == expected
    assert len(names) == len(expected) == 560


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv_in", "input_blocks.0.0"),
        ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection"),
        ("down_blocks.2.attentions.1.proj_out", "input_blocks.8.1.proj_out"),
        ("mid_block.resnets.0.time_emb_proj", "middle_block.0.emb_layers.1"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.2.resnets.2.conv2", "output_blocks.8.0.out_layers.3"),
        ("add_embedding.linear_1", "label_emb.0.0"),
    ],
)
def test_ldm_names_of_sdxl_modules(sdxl_unet, name, expected):
    assert ldm_name(name, sdxl_unet) == expected


def test_unknown_modules_have_no_ldm_name(sdxl_unet):
    with pytest.raises(ModelError, match="encoder_hid_proj"):
        ldm_name("encoder_hid_proj", sdxl_unet)


def test_kohya_metadata_of_sd2():
    unet = published.random_unet("sd15", device="meta")
    unet.register_to_config(cross_attention_dim=1024)
    metadata = kohya_metadata(unet, 4, 8, "v_prediction", "x")
    assert metadata["ss_base_model_version"] == "sd_v2_v"
    assert metadata["ss_v2"] == "True"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert kohya_metadata(unet, 4, 8, "epsilon", "x")["ss_base_model_version"] == "sd_v2"
