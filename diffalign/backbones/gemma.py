"""What SANA and Lumina-Image 2.0 share: Gemma2 as their text encoder, prompts behind an instruction, a mask."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import Gemma2Model, GemmaTokenizer

from diffalign.backbones.conditioning import MASK
from diffalign.backbones.flow import FlowBackbone
from diffalign.backbones.transformer import CHARACTERS, about_tokens


class GemmaBackbone(FlowBackbone):
    """Adapt pipelines of a transformer, a VAE, a scheduler and Gemma2, whose texts have unequal lengths.

    They are padded with zeros to `padded_length` tokens, and a mask says which are the prompt's.
    """

    required = frozenset({"transformer", "vae", "text_encoder", "tokenizer", "scheduler"})
    encoder_classes = (Gemma2Model,)
    tokenizer_classes = (GemmaTokenizer,)
    text_columns = token_columns = ("prompt_embeds", MASK)
    padded_length: ClassVar[int]  # tokens, the pipeline's `max_sequence_length`
    instruction: ClassVar[str]  # before every prompt

    @classmethod
    def prompt_tokens(cls, tokenizers: Sequence[Any], prompts: list[str]) -> int:
        """Return how many tokens prompts have with what is kept of the instruction; see Backbone."""
        if not tokenizers:
            around = -(-len(cls.instruction) // CHARACTERS)
            return about_tokens(prompts, around - cls._left_out(around), cls.padded_length)
        left_out = cls._left_out(len(tokenizers[0].encode(cls.instruction)))
        tokens = tokenizers[0]([cls.instruction + prompt for prompt in prompts]).input_ids
        return sum(min(cls.padded_length, len(ids) - left_out) for ids in tokens)

    @classmethod
    def read_texts(cls, tokenizers: Sequence[Any], prompts: list[str]) -> tuple[Any, list[str], int]:
        """Return Gemma2 and the instruction before prompts; see Backbone."""
        tokenizer, texts = tokenizers[0], [cls.instruction + prompt for prompt in prompts]
        return tokenizer, texts, cls.padded_length + cls._left_out(len(tokenizer.encode(cls.instruction)))

    @classmethod
    def _left_out(cls, instruction_tokens: int) -> int:
        """Return how many of the instruction's tokens the network is not given."""
        return 0

    def _read(self, texts: list[str], length: int, **options: Any) -> tuple[Any, Tensor]:
        """Return what Gemma2 makes of texts, and which of `length` tokens are theirs, bool [N,length]."""
        tokenizer, encoder = self.tokenizers[0], self.text_encoders[0]
        tokenizer.padding_side = "right"  # as the pipelines set it; Gemma's own is left
        tokens = self._tokenize(tokenizer, texts, length).to(encoder.device)
        return encoder(**tokens, **options), tokens.attention_mask.bool()

    @staticmethod
    def _columns(states: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"prompt_embeds": states.masked_fill(~mask[..., None], 0.0), MASK: mask}
