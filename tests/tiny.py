"""Real diffusers pipelines with random weights, small enough for a test: 64x64 images, 16x16 latents."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffalign.backbones.published import SHIFTS
from diffalign.backbones.sana import INSTRUCTION

IMAGE_SIZE = 64
LATENT_SIZE = 16
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORDS = ("a", "on", "red", "blue", "green", "circle", "square", "background", "photo", "of", "the", "cat")
# The schedule both published families were trained on.
DDPM_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
}


def tiny_unet_sdxl() -> UNet2DConditionModel:
    """Return SDXL's UNet topology (three levels, two layers a block, 0/1/2 transformers) at a few channels."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 16, 32),
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=48,
        attention_head_dim=(2, 2, 4),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )


def tiny_unet_sd15() -> UNet2DConditionModel:
    """Return SD1.5's UNet topology (four levels, two layers a block, convolutional projections) at a few channels."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(16, 16, 16, 32),
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=2,
    )


def tiny_transformer_sd3() -> SD3Transformer2DModel:
    """Return SD3.5-medium's topology (its first block has a second attention) with two blocks of 64 channels."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )


def tiny_transformer_flux(guidance_embeds: bool = True) -> FluxTransformer2DModel:
    """Return FLUX.1's topology (blocks of two streams, then of one) with a block and two of 32 channels."""
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )


def tiny_vae(scaling_factor: float, latent_channels: int = 4, halvings: int = 2, **settings) -> AutoencoderKL:
    """Return an autoencoder that halves the image twice, or as often as is said, into a few channels."""
    return AutoencoderKL(
        block_out_channels=(8, *(16,) * halvings),
        down_block_types=("DownEncoderBlock2D",) * (halvings + 1),
        up_block_types=("UpDecoderBlock2D",) * (halvings + 1),
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=scaling_factor,
        **settings,
    )


def tiny_tokenizer(pad_token: str = EOS) -> CLIPTokenizer:
    """Return a CLIP tokenizer over the byte alphabet and the merges of a few words; 77 tokens like the published."""
    merges = _merges(WORDS)
    alphabet = list(_byte_alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges] + [BOS, EOS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def tiny_t5_tokenizer() -> T5Tokenizer:
    """Return a T5 tokenizer over letters and a few words."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *("\u2581" + word for word in WORDS)]
    letters = [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz,!"]
    return T5Tokenizer(vocab=[*((piece, -2.0) for piece in pieces), *letters], extra_ids=0, model_max_length=512)


def tiny_text_config(tokenizer: CLIPTokenizer, hidden_size: int, hidden_act: str) -> CLIPTextConfig:
    """Return a three-layer CLIP text encoder configuration that fits `tokenizer`."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_act=hidden_act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_tiny_sdxl(directory: str | Path, seed: int = 0) -> Path:
    """Write a random-weight StableDiffusionXLPipeline of about 0.5 M parameters to `directory` and return its path."""
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            vae=tiny_vae(0.13025),
            text_encoder=CLIPTextModel(tiny_text_config(tokenizer, 16, "quick_gelu")),
            text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(tokenizer_2, 32, "gelu")),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=tiny_unet_sdxl(),
            scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **DDPM_SCHEDULE),
            add_watermarker=False,
        )
    return _save(pipeline, directory)


def build_tiny_sd15(directory: str | Path, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """Write a random-weight StableDiffusionPipeline of about 0.5 M parameters to `directory` and return its path."""
    tokenizer = tiny_tokenizer()
    schedule = DDPM_SCHEDULE | {"prediction_type": prediction_type}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=tiny_vae(0.18215),
            text_encoder=CLIPTextModel(tiny_text_config(tokenizer, 32, "quick_gelu")),
            tokenizer=tokenizer,
            unet=tiny_unet_sd15(),
            scheduler=PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **schedule),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _save(pipeline, directory)


def build_tiny_sd3(directory: str | Path, seed: int = 0, t5: bool = True) -> Path:
    """Write a random-weight StableDiffusion3Pipeline of about 0.4 M parameters to `directory` and return its path."""
    first, second = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
    third = tiny_t5_tokenizer() if t5 else None
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            vae=tiny_vae(1.5305, 16, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModelWithProjection(tiny_text_config(first, 8, "quick_gelu")),
            text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(second, 16, "gelu")),
            text_encoder_3=T5EncoderModel(T5Config(vocab_size=len(third), **shape)) if t5 else None,
            tokenizer=first,
            tokenizer_2=second,
            tokenizer_3=third,
            transformer=tiny_transformer_sd3(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    return _save(pipeline, directory)


def build_tiny_flux(directory: str | Path, seed: int = 0, guidance_embeds: bool = True) -> Path:
    """Write a random-weight FluxPipeline of about 0.3 M parameters to `directory` and return its path."""
    first, second = tiny_tokenizer(), tiny_t5_tokenizer()
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FluxPipeline(
            vae=tiny_vae(0.3611, 16, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModel(tiny_text_config(first, 16, "quick_gelu")),
            text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(second), **shape)),
            tokenizer=first,
            tokenizer_2=second,
            transformer=tiny_transformer_flux(guidance_embeds),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        )
    return _save(pipeline, directory)


def tiny_transformer_pixart(**settings) -> PixArtTransformer2DModel:
    """Return PixArt's topology with two blocks of 24 channels."""
    return PixArtTransformer2DModel(
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        cross_attention_dim=24,
        **settings,
    )


def build_tiny_pixart(directory: str | Path, generation: str, seed: int = 0, **settings) -> Path:
    """Write a random-weight pipeline of about 0.1 M parameters of PixArt-"alpha" or "sigma" and return its path.

    alpha: of 1024 pixels, told the size of the picture. settings: of the transformer.
    """
    kind, sides, factor = {
        "alpha": (PixArtAlphaPipeline, {"sample_size": 128}, 0.18215),
        "sigma": (PixArtSigmaPipeline, {"sample_size": LATENT_SIZE}, 0.13025),
    }[generation]
    tokenizer = tiny_t5_tokenizer()
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = kind(
            vae=tiny_vae(factor),
            text_encoder=T5EncoderModel(T5Config(vocab_size=len(tokenizer), **shape)),
            tokenizer=tokenizer,
            transformer=tiny_transformer_pixart(**(sides | settings)),
            scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
        )
    return _save(pipeline, directory)


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """Return a Qwen tokenizer over single bytes, with the part of Qwen3's chat template that a prompt meets."""
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocabulary = {token: index for index, token in enumerate((*_byte_alphabet(), *marks))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks[1:])})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think></think>{% endif %}"
        "{% endif %}"
    )
    return tokenizer


def tiny_transformer_flux2(guidance_embeds: bool = False) -> Flux2Transformer2DModel:
    """Return FLUX.2's topology (blocks of two streams, then of one) with two blocks of each and 32 channels."""
    return Flux2Transformer2DModel(
        in_channels=128,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def tiny_vae_flux2() -> AutoencoderKLFlux2:
    """Return an autoencoder that halves the image twice, with the statistics of some latents."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )
    torch.nn.init.normal_(vae.bn.running_mean, std=0.2)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return vae


def build_tiny_klein(directory: str | Path, seed: int = 0, is_distilled: bool = False) -> Path:
    """Write a random-weight Flux2KleinPipeline of about 0.3 M parameters to `directory` and return its path.

    The text encoder has as many layers as the pipeline reads from.
    """
    tokenizer = tiny_qwen_tokenizer()
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 28, "head_dim": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = Flux2KleinPipeline(
            vae=tiny_vae_flux2(),
            text_encoder=Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **shape, **heads)),
            tokenizer=tokenizer,
            transformer=tiny_transformer_flux2(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            is_distilled=is_distilled,
        )
    pipeline.save_pretrained(directory, safe_serialization=True)
    return Path(directory)


def tiny_pixtral_processor() -> PixtralProcessor:
    """Return Mistral's processor over single bytes, with the part of its chat template that a prompt meets."""
    marks = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    vocabulary = {
        token: index for index, token in enumerate(("<unk>", "<s>", "</s>", "<pad>", *marks, *_byte_alphabet()))
    }
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(marks),
        padding_side="left",
    )
    template = (
        "{{ bos_token }}{% for message in messages %}{% set mark = {'system': 'SYSTEM_PROMPT', 'user': 'INST'} %}"
        "[{{ mark[message.role] }}]{% for part in message.content %}{{ part.text }}{% endfor %}"
        "[/{{ mark[message.role] }}]{% endfor %}"
    )
    return PixtralProcessor(image_processor=PixtralImageProcessor(), tokenizer=tokenizer, chat_template=template)


def build_tiny_flux2_dev(directory: str | Path, seed: int = 1) -> Path:
    """Write a random-weight Flux2Pipeline of about 0.3 M parameters to `directory` and return its path.

    The text encoder has as many layers as the pipeline reads from.
    """
    processor = tiny_pixtral_processor()
    shape = {"hidden_size": 8, "intermediate_size": 16, "head_dim": 8, "num_attention_heads": 1}
    words = {"vocab_size": len(processor.tokenizer), "num_key_value_heads": 1, "num_hidden_layers": 30}
    config = Mistral3Config(
        text_config={"model_type": "mistral", "sliding_window": None, **shape, **words},
        vision_config={"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 16, "patch_size": 8, **shape},
        image_token_index=processor.image_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = Flux2Pipeline(
            vae=tiny_vae_flux2(),
            text_encoder=Mistral3ForConditionalGeneration(config),
            tokenizer=processor,
            transformer=tiny_transformer_flux2(guidance_embeds=True),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        )
    pipeline.save_pretrained(directory, safe_serialization=True)
    return Path(directory)


def tiny_transformer_qwen(**settings) -> QwenImageTransformer2DModel:
    """Return Qwen-Image's topology with two blocks of 32 channels."""
    return QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        **settings,
    )


def tiny_vae_qwen() -> AutoencoderKLQwenImage:
    """Return an autoencoder of films that halves a picture twice, with Qwen-Image's means and deviations."""
    return AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True])


def build_tiny_qwen(directory: str | Path, seed: int = 0) -> Path:
    """Write a random-weight QwenImagePipeline of about 0.3 M parameters to `directory` and return its path."""
    tokenizer = tiny_qwen_tokenizer()
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    text["rope_scaling"] = {"mrope_section": [1, 1, 2], "rope_type": "default"}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = QwenImagePipeline(
            vae=tiny_vae_qwen(),
            text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
            tokenizer=tokenizer,
            transformer=tiny_transformer_qwen(),
            scheduler=FlowMatchEulerDiscreteScheduler(**SHIFTS["qwen"]),
        )
    pipeline.save_pretrained(directory, safe_serialization=True)
    return Path(directory)


def tiny_gemma_tokenizer() -> GemmaTokenizer:
    """Return a Gemma tokenizer over letters and words, those of SANA's instruction among them: it is long."""
    merges = _merges((*WORDS, *dict.fromkeys(word for word in INSTRUCTION.split() if word.isalpha())), "\u2581", "")
    letters = sorted({*map(chr, range(ord("!"), 127)), "\n", "\u2581"})
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters, *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges)
    first = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    tokenizer.backend_tokenizer.post_processor = first
    return tokenizer


def tiny_gemma(tokenizer: GemmaTokenizer) -> Gemma2Model:
    """Return a Gemma2 of three layers of 16 channels."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), **shape, **heads))


def tiny_transformer_sana(**settings) -> SanaTransformer2DModel:
    """Return SANA's topology with two blocks of 16 channels."""
    return SanaTransformer2DModel(
        sample_size=LATENT_SIZE,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=16,
        **settings,
    )


def tiny_vae_sana() -> AutoencoderDC:
    """Return an autoencoder that halves the image twice into 32 channels, with both kinds of SANA's blocks."""
    return AutoencoderDC(
        latent_channels=32,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 32),
        decoder_block_out_channels=(8, 16, 32),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.41407,
    )


def build_tiny_sana(directory: str | Path, seed: int = 0) -> Path:
    """Write a random-weight SanaPipeline of about 0.1 M parameters to `directory` and return its path."""
    tokenizer = tiny_gemma_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = SanaPipeline(
            vae=tiny_vae_sana(),
            text_encoder=tiny_gemma(tokenizer),
            tokenizer=tokenizer,
            transformer=tiny_transformer_sana(),
            scheduler=DPMSolverMultistepScheduler(**SHIFTS["sana"]),
        )
    pipeline.save_pretrained(directory, safe_serialization=True)
    return Path(directory)


def tiny_transformer_lumina2() -> Lumina2Transformer2DModel:
    """Return Lumina-Image 2.0's topology with two blocks of 24 channels and a refiner of each kind."""
    return Lumina2Transformer2DModel(
        sample_size=IMAGE_SIZE // 8,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 8, 8),
        cap_feat_dim=16,
    )


def build_tiny_lumina2(directory: str | Path, seed: int = 0) -> Path:
    """Write a random-weight Lumina2Pipeline of about 0.1 M parameters to `directory` and return its path.

    Its VAE is of 1/8 as the published one: the pipeline takes that for granted.
    """
    tokenizer = tiny_gemma_tokenizer()
    vae = {"shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = Lumina2Pipeline(
            vae=tiny_vae(0.3611, 16, halvings=3, **vae),
            text_encoder=tiny_gemma(tokenizer),
            tokenizer=tokenizer,
            transformer=tiny_transformer_lumina2(),
            scheduler=FlowMatchEulerDiscreteScheduler(**SHIFTS["lumina2"]),
        )
    pipeline.save_pretrained(directory, safe_serialization=True)
    return Path(directory)


def tiny_transformer_zimage() -> ZImageTransformer2DModel:
    """Return Z-Image's topology with two blocks of 32 channels, and tokens of padding that are not zeros."""
    transformer = ZImageTransformer2DModel(
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 16, 16],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    return transformer


def build_tiny_zimage(directory: str | Path, seed: int = 0) -> Path:
    """Write a random-weight ZImagePipeline of about 0.4 M parameters to `directory` and return its path."""
    tokenizer = tiny_qwen_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = ZImagePipeline(
            vae=tiny_vae(0.3611, 16, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **shape, **heads)),
            tokenizer=tokenizer,
            transformer=tiny_transformer_zimage(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        )
    pipeline.save_pretrained(directory, safe_serialization=True)
    return Path(directory)


def _save(pipeline, directory: str | Path) -> Path:
    directory = Path(directory)
    pipeline.save_pretrained(directory, safe_serialization=True)
    # The published repositories carry the vocabulary in CLIP's own two files; other loaders read these.
    for folder in [directory / name for name in ("tokenizer", "tokenizer_2") if (directory / name).is_dir()]:
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        if "merges" not in model:  # T5's
            continue
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def _merges(words: Iterable[str], before: str = "", after: str = "</w>") -> list[tuple[str, str]]:
    """Join each word's letters from left to right, with marks, so that every word in `words` becomes one token."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        pieces = [*before, *word[:-1], word[-1] + after]
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return list(merges)


def _byte_alphabet() -> str:
    """Return the 256 printable characters that byte-level BPE writes bytes with, in byte order from "!"."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = range(0x100, 0x100 + 256 - len(printable))
    return "".join(chr(code) for code in [*printable, *shifted])
