"""Prompts of any length for CLIP, in chunks of as many tokens as it reads: what A1111's encoder does, and ComfyUI's.

A prompt's tokens are cut into chunks of 75, each encoded with a beginning and an end of its own; their hidden states
stand behind one another. Pooled embeddings are those of the first chunk.

Prompts of unequal length meet in batches. CLIP's positions are in the states already, and cross-attention asks nothing
of the order or the number of its keys: a text that is repeated as a whole gives the same attention, since every weight
is divided by the number of copies. So the texts of a batch are repeated to a common length, and what an example gives
does not depend on its neighbours; padding without a mask would change it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Tokens:
    """Hold the chunks [C,L] of several prompts, one prompt's behind the other's, as a tokenizer returns prompts."""

    input_ids: Tensor
    attention_mask: Tensor

    def to(self, device: torch.device) -> "Tokens":
        """Return the same on a device."""
        return Tokens(self.input_ids.to(device), self.attention_mask.to(device))


def split(tokenizers: Sequence[Any], prompts: Sequence[str]) -> tuple[list[Tokens], list[int]]:
    """Return the chunks by tokenizer, and how many each prompt has; where tokenizers differ, empty ones are added."""
    cut = [[_cut(tokenizer, ids) for ids in _ids(tokenizer, prompts)] for tokenizer in tokenizers]
    counts = [max(map(len, chunks)) for chunks in zip(*cut, strict=True)]
    tokens = []
    for tokenizer, chunks in zip(tokenizers, cut, strict=True):
        every = [own + [[]] * (count - len(own)) for own, count in zip(chunks, counts, strict=True)]
        tokens.append(_marked(tokenizer, [chunk for own in every for chunk in own]))
    return tokens, counts


def joined(columns: Mapping[str, Tensor], counts: Sequence[int]) -> dict[str, Tensor]:
    """Return the columns of prompts from those of their chunks: states [N,L,D] that end in zeros, the first pooled."""
    first = [sum(counts[:row]) for row in range(len(counts))]
    found = {name: column[first] for name, column in columns.items() if name != "prompt_embeds"}
    texts = [part.flatten(0, 1) for part in columns["prompt_embeds"].split(list(counts))]
    return {"prompt_embeds": pad_sequence(texts, batch_first=True), **found}


def repeated(texts: Tensor, chunk: int) -> Tensor:
    """Return texts [N,L,D] that end in zeros, whole chunks of `chunk` tokens each, repeated to a common length."""
    used = texts.ne(0).any(dim=2).unflatten(1, (-1, chunk)).any(dim=2)  # [N,C]
    places = torch.arange(1, used.shape[1] + 1, device=used.device)
    counts = (used * places).amax(dim=1).clamp(min=1).tolist()  # a missing prompt is one chunk of zeros
    common = math.lcm(*counts)
    if set(counts) == {common}:
        return texts[:, : common * chunk]
    return torch.stack(
        [text[: count * chunk].repeat(common // count, 1) for text, count in zip(texts, counts, strict=True)]
    )


def to_common_length(texts: Sequence[Tensor]) -> list[Tensor]:
    """Return texts [N,L,D] of several batches repeated to a length that all have."""
    common = math.lcm(*(text.shape[1] for text in texts))
    return [text if text.shape[1] == common else text.repeat(1, common // text.shape[1], 1) for text in texts]


def _ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(prompts), add_special_tokens=False, padding=False, truncation=False, verbose=False).input_ids


def _cut(tokenizer: Any, ids: list[int]) -> list[list[int]]:
    size = tokenizer.model_max_length - 2  # beside its beginning and its end
    return [ids[start : start + size] for start in range(0, len(ids), size)] or [[]]


def _marked(tokenizer: Any, chunks: list[list[int]]) -> Tokens:
    """Return chunks between their marks, padded as the tokenizer pads."""
    length = tokenizer.model_max_length
    ids = torch.full((len(chunks), length), tokenizer.pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, chunk in enumerate(chunks):
        marked = [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id]
        ids[row, : len(marked)], mask[row, : len(marked)] = torch.tensor(marked), 1
    return Tokens(ids, mask)
