"""CLIP's byte-pair vocabulary in its two file formats, and how to learn a small one."""

import gzip
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from reward_models.errors import ScorerError

MERGES_IN_OFFICIAL_FILE = 49152 - 256 - 2  # open_clip reads no further either
Merge = tuple[str, str]


def bundled_bpe_file() -> Path:
    """Return the official CLIP vocabulary that open_clip_torch ships (49408 tokens), without importing it."""
    found = importlib.util.find_spec("open_clip")
    file = Path(found.origin).parent / "bpe_simple_vocab_16e6.txt.gz" if found else None
    if file is None or not file.is_file():
        raise ScorerError("The CLIP vocabulary is missing: pip install open_clip_torch.")
    return file


def read_merges(bpe_file: str | Path) -> list[Merge]:
    """Return the merges of an open_clip vocabulary file (.txt.gz, one header line)."""
    try:
        with gzip.open(bpe_file, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : MERGES_IN_OFFICIAL_FILE + 1]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ScorerError(f"Cannot read the vocabulary {bpe_file} ({error}). Expected gzipped merges.") from None
    return [tuple(line.split()) for line in lines if line]


def byte_characters() -> dict[int, str]:
    """Return the printable character CLIP (as GPT-2) writes for each byte, in the order of the vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def vocabulary(merges: Sequence[Merge]) -> dict[str, int]:
    """Return token -> id: 256 bytes, 256 word-final bytes, the merges, start, end (always the largest id)."""
    characters = list(byte_characters().values())
    tokens = [*characters, *(f"{character}</w>" for character in characters), *map("".join, merges)]
    return {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def hf_tokenizer(merges: Sequence[Merge]) -> Any:
    """Return the transformers CLIPTokenizer of a vocabulary; with the official merges, that of every CLIP on the hub.

    It lowers case and collapses white space but, unlike open_clip's, repairs neither mojibake nor HTML entities.
    """
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=vocabulary(merges), merges=list(merges))


def learn_merges(captions: Iterable[str], count: int) -> list[Merge]:
    """Learn up to `count` merges from captions: the most frequent neighbours first, ties in alphabetical order."""
    characters = byte_characters()
    words = Counter(word for caption in captions for word in re.findall(r"[^\W\d_]+|\d|[^\s\w]+|_", caption.lower()))
    spelt: dict[tuple[str, ...], int] = {}
    for word, frequency in words.items():
        symbols = [characters[byte] for byte in word.encode("utf-8")]
        spelt[(*symbols[:-1], f"{symbols[-1]}</w>")] = frequency
    merges: list[Merge] = []
    while len(merges) < count:
        pairs: Counter[Merge] = Counter()
        for symbols, frequency in spelt.items():
            for pair in pairwise(symbols):
                pairs[pair] += frequency
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelt = {_merged(symbols, best): frequency for symbols, frequency in spelt.items()}
    return merges


def _merged(symbols: tuple[str, ...], pair: Merge) -> tuple[str, ...]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def write_bpe_file(file: str | Path, merges: Sequence[Merge]) -> Path:
    """Write merges as open_clip's SimpleTokenizer reads them; the same merges give the same bytes."""
    text = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)])  # a last newline would be a token
    Path(file).write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))
    return Path(file)


def write_hf_tokenizer(directory: str | Path, merges: Sequence[Merge], *, text_length: int = 77) -> Path:
    """Write vocab.json, merges.txt and tokenizer_config.json as transformers' CLIPTokenizer reads them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": text_length,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    merge_lines = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]) + "\n"
    (directory / "vocab.json").write_text(json.dumps(vocabulary(merges), ensure_ascii=False), encoding="utf-8")
    (directory / "merges.txt").write_text(merge_lines, encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return directory
