"""What the tiny pipelines are put together from: sizes, tokenizers over a few words, text encoders, a VAE."""

import json
from collections.abc import Iterable
from pathlib import Path

from diffusers import (
    AutoencoderKL,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5Tokenizer,
)

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
    merges = merges_of(WORDS)
    alphabet = list(letters())
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


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """Return a Qwen tokenizer over single bytes, with the part of Qwen3's chat template that a prompt meets."""
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocabulary = {token: index for index, token in enumerate((*letters(), *marks))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks[1:])})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think></think>{% endif %}"
        "{% endif %}"
    )
    return tokenizer


def tiny_pixtral_processor() -> PixtralProcessor:
    """Return Mistral's processor over single bytes, with the part of its chat template that a prompt meets."""
    marks = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    vocabulary = {token: index for index, token in enumerate(("<unk>", "<s>", "</s>", "<pad>", *marks, *letters()))}
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


def tiny_gemma_tokenizer() -> GemmaTokenizer:
    """Return a Gemma tokenizer over letters and words, those of SANA's instruction among them: it is long."""
    merges = merges_of((*WORDS, *dict.fromkeys(word for word in INSTRUCTION.split() if word.isalpha())), "\u2581", "")
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


def save(pipeline, directory: str | Path) -> Path:
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


def merges_of(words: Iterable[str], before: str = "", after: str = "</w>") -> list[tuple[str, str]]:
    """Join each word's letters from left to right, with marks, so that every word in `words` becomes one token."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        pieces = [*before, *word[:-1], word[-1] + after]
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return list(merges)


def letters() -> str:
    """Return the 256 printable characters that byte-level BPE writes bytes with, in byte order from "!"."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = range(0x100, 0x100 + 256 - len(printable))
    return "".join(chr(code) for code in [*printable, *shifted])
