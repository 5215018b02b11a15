"""Encoded prompts on disk: each distinct one once, of its tokens those before the padding, memory-mapped."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.data import checksums
from diffalign.data.cache_store import AppendStore

LENGTHS = "prompt_lengths.npy"  # [P] int32, how many tokens of a prompt are kept
PADDED = "padded_length"  # to how many tokens the encoder pads


def append(store: AppendStore, columns: Mapping[str, np.ndarray], tokens: Collection[str]) -> None:
    """Append the columns [N,...] of N prompts; of those named in `tokens` [N,L,...] without the zeros at their ends.

    A column of tokens is kept as one of [all tokens of all prompts,...], in the order of the prompts.
    """
    if tokens:
        lengths = _lengths([columns[name] for name in tokens])
        padded = columns[next(iter(tokens))].shape[1]
        store.append(LENGTHS, lengths)
        store.state[PADDED] = max(store.state.get(PADDED, 0), padded)
        kept = np.arange(padded) < lengths[:, None]
    for name, column in columns.items():
        cut = [row[:length] for row, length in zip(column, lengths, strict=True)] if name in tokens else column
        store.append(f"{name}.npy", column[kept] if name in tokens else column)
        store.append(checksums.file_of(f"{name}.npy"), checksums.of_rows(cut))


def count(store: AppendStore, tokens: Collection[str]) -> int:
    """Return how many prompts a store holds."""
    return store.rows(LENGTHS if tokens else "prompt_embeds.npy")


def _lengths(columns: list[np.ndarray]) -> np.ndarray:
    """Return how many tokens [N] are before those that are zero in all columns [N,L,...], at least one.

    What is left out is known to the bit, whatever a mask says.
    """
    used = np.zeros(columns[0].shape[:2], dtype=bool)
    for column in columns:
        bits = column.view(f"u{column.itemsize}")  # -0.0 is not what comes back
        used |= bits.reshape(*used.shape, -1).any(axis=2)
    used[:, 0] = True
    return (used.shape[1] - used[:, ::-1].argmax(axis=1)).astype(np.int32)


class TextColumns:
    """Serve the columns of prompts of a finished cache, padded with zeros again."""

    def __init__(self, folder: Path, names: Collection[str], meta: Mapping[str, Any]):
        self._files = {name: folder / f"{name}.npy" for name in names}
        self._columns = {name: mapped(file) for name, file in self._files.items()}
        self._checksums = {name: checksums.open_for(file, meta["prompts"]) for name, file in self._files.items()}
        self._tokens = frozenset(meta.get("token_columns", ()))
        self._padded, self._shortest = meta.get(PADDED), meta.get("ignores_padding", False)
        if self._tokens:
            self._lengths = np.load(folder / LENGTHS)
            self._ends = np.cumsum(self._lengths, dtype=np.int64)

    def rows(self, prompts: np.ndarray) -> dict[str, np.ndarray]:
        """Return the columns [n,...] of n prompts.

        Tokens are as many as the encoder pads to; as the longest of these prompts has, if the network ignores padding.
        """
        found = {}
        for name, column in self._columns.items():
            tokens = name in self._tokens
            found[name] = rows = self._with_padding(column, prompts) if tokens else column[prompts]
            expected = self._checksums[name]
            if expected is not None:
                cut = (
                    row[: self._lengths[prompt]] if tokens else row for row, prompt in zip(rows, prompts, strict=True)
                )
                checksums.require(cut, expected[prompts], self._files[name])
        return found

    def _with_padding(self, column: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        lengths, ends = self._lengths[prompts], self._ends[prompts]
        padded = int(lengths.max()) if self._shortest else self._padded
        rows = np.zeros((len(prompts), padded, *column.shape[1:]), column.dtype)
        for row, length, end in zip(rows, lengths, ends, strict=True):
            row[:length] = column[end - length : end]
        return rows


def mapped(file: Path) -> np.ndarray:
    """Map a .npy file into memory: what is read of it is in memory, and no more."""
    return np.asarray(np.load(file, mmap_mode="r"))  # a plain view: np.memmap's own indexing is slower
