"""A CLIP tokenizer with a small vocabulary: the byte alphabet plus merges learnt on the world's own words."""

from transformers import CLIPTokenizer

from diffalign.shapes.captions import vocabulary
from reward_models import tokenization

END = "<|endoftext|>"


def world_merges() -> list[tuple[str, str]]:
    """Return the byte-pair merges that turn every word of the grammar into one token."""
    return tokenization.learn_merges(vocabulary(), count=10_000)


def build_tokenizer(model_max_length: int, pad_token: str = END) -> CLIPTokenizer:
    """Build the HuggingFace tokenizer; SDXL pads its first encoder with the end token and its second with "!"."""
    merges = world_merges()
    vocab = tokenization.vocabulary(merges)
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=model_max_length)
