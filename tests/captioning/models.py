"""Tiny models of the classes that caption and paraphrase, with random weights that say something of every picture."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from tests.tiny.parts import WORDS, tiny_t5_tokenizer

SIDE = {"image_size": 16, "patch_size": 8}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PIXELS = {"height": 16, "width": 16}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }} {% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}answer"
)


def loud(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Return the model with weights so large that its words depend on what it reads."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.4, generator=generator)
            elif "norm" not in name.lower():
                weight.normal_(0, 0.05, generator=generator)
    return model


def save(folder: Path, model: torch.nn.Module, *parts) -> Path:
    for part in (model, *parts):
        part.save_pretrained(folder)
    return folder


def write_blip(folder: Path) -> Path:
    """Write a BLIP whose tokenizer is BERT's over a few words."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate([*marks, *WORDS, ",", "two"])})
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    ids = {"bos_token_id": 4, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**SIZES, **ids, "vocab_size": len(tokenizer), "encoder_hidden_size": 16, "max_position_embeddings": 64}
    config = BlipConfig(text_config=text, vision_config={**SIZES, **SIDE}, projection_dim=8, image_text_hidden_size=8)
    processor = BlipProcessor(BlipImageProcessor(size=PIXELS), tokenizer)
    model = loud(BlipForConditionalGeneration(config), 1)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[: len(marks)] = -100.0  # it never has nothing to say
    return save(folder, model, processor)


def words_tokenizer(*marks: str, bos: str = "<s>") -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", bos, *marks, *WORDS, "user", "answer", ":", "Prompt"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": bos}
    return PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=list(marks), **named)


def write_llava(folder: Path) -> Path:
    """Write a LLaVA with a chat template."""
    tokenizer = words_tokenizer("<image>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = LlamaConfig(**SIZES, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=3, eos_token_id=1)
    vision = CLIPVisionConfig(**SIZES, **SIDE, projection_dim=8)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image, image_seq_length=4, vision_feature_layer=-1
    )
    pictures = CLIPImageProcessor(size=PIXELS, crop_size=PIXELS)
    processor = LlavaProcessor(pictures, tokenizer, 8, "default", chat_template=TEMPLATE, num_additional_image_tokens=1)
    return save(folder, loud(LlavaForConditionalGeneration(config), 2), processor)


def write_vit_gpt2(folder: Path) -> Path:
    """Write a vision-encoder-decoder, which has no processor of its own."""
    tokenizer = words_tokenizer()
    vision = ViTConfig(**SIZES, **SIDE)
    text = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=len(tokenizer), bos_token_id=3, eos_token_id=1
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 3, 0, 1
    model = loud(VisionEncoderDecoderModel(config=config), 3)
    model.generation_config.update(decoder_start_token_id=3, pad_token_id=0, eos_token_id=1, bos_token_id=3)
    return save(folder, model, tokenizer, ViTImageProcessor(size=PIXELS))


def write_dipper(folder: Path) -> Path:
    """Write a T5 that generates."""
    tokenizer = tiny_t5_tokenizer()
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes)
    return save(folder, loud(T5ForConditionalGeneration(config), 4), tokenizer)
