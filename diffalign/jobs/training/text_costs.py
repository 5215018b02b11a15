"""How many bytes the encoded prompts of a run take, before anything is encoded."""

from collections.abc import Sequence
from dataclasses import dataclass

from diffalign.config import Config
from diffalign.jobs.training import examples
from diffalign.jobs.training.meta_model import MetaModel

STORED_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
COUNTED = 5000  # prompts that are tokenised, all over the data: more are estimated from these
CHARACTERS = 100  # that a prompt which is not here is taken to have


@dataclass(frozen=True)
class TextCost:
    """Say what encoded prompts take."""

    what: str  # how many of what, in words
    each: float  # bytes of a `unit`
    unit: str  # "prompt" or "token"
    size: float  # bytes of all


def estimate(config: Config, model: MetaModel, prompts: int, texts: Sequence[str] | None) -> TextCost:
    """Return what distinct prompts and the empty one take; `texts` are the prompts, if they are here."""
    kind, number = model.kind, STORED_BYTES[examples.text_dtype(config, model.kind)]
    numbers, kept = model.prompt_size(), prompts + 1
    if not kind.token_columns:
        read = kept if config.data.long_prompts == "truncate" else 1 + _chunks(model, prompts, texts)
        what = f"{kept:,} prompts" if read == kept else f"{read:,} chunks of {kept:,} prompts"
        return TextCost(what, numbers * number, "prompt" if read == kept else "chunk", read * numbers * number)
    token = (numbers // kind.padded_length - 1) * number + 1  # one of them is its mask, a byte
    tokens, exact = _tokens(model, prompts, texts)
    what = f"{kept:,} prompts of {'' if exact else 'about '}{tokens:,} tokens"
    return TextCost(what, token, "token", tokens * token + kept * 4)  # and the length of each


def token_columns(config: Config, model: MetaModel) -> list[str]:
    """Return of which columns a cache keeps no padding."""
    return ["prompt_embeds"] if config.data.long_prompts == "chunk" else list(model.kind.token_columns)


def _chunks(model: MetaModel, prompts: int, texts: Sequence[str] | None) -> int:
    """Return in how many chunks CLIP reads the prompts, about so many where they are not all counted."""
    tokenizers = model.tokenizers()
    sample = [] if texts is None else list(texts[:: -(-len(texts) // COUNTED) or 1])
    if not tokenizers or not sample:
        return prompts
    counts, length = model.kind.token_counts(tokenizers, sample)
    return round(sum(max(1, -(-(count - 2) // (length - 2))) for count in counts) * len(texts) / len(sample))


def _tokens(model: MetaModel, prompts: int, texts: Sequence[str] | None) -> tuple[int, bool]:
    """Return how many tokens the prompts and the empty one have, and whether all were counted."""
    tokenizers = model.tokenizers()
    empty = model.kind.prompt_tokens(tokenizers, [""])
    if texts is None:
        return empty + prompts * model.kind.prompt_tokens((), ["x" * CHARACTERS]), False
    sample = list(texts[:: -(-len(texts) // COUNTED) or 1])
    tokens = model.kind.prompt_tokens(tokenizers, sample) if sample else 0
    exact = bool(tokenizers) and len(sample) == len(texts)
    return empty + (tokens if len(sample) == len(texts) else round(tokens * len(texts) / len(sample))), exact
