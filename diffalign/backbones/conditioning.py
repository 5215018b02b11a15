"""What a denoiser is told besides the noisy latent and the timestep: named columns, as in a table of N rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.backbones.long_prompts import to_common_length

MASK = "prompt_embeds_mask"  # bool [N,L]: which tokens are the prompt's, and not padding
TOKENS = frozenset({"prompt_embeds", MASK})  # [N,L,...], of a prompt alone: images that share it may share these
EXACT = frozenset({"add_time_ids", "resolution", "aspect_ratio"})  # numbers that the network is told, in float32


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Hold the columns of N entries under diffusers' names; `prompt_embeds` [N,L,D] is always one of them.

    `conditioning[name]` has N entries; `columns[name]` is what is stored, of TOKENS once for all copies.
    """

    columns: Mapping[str, Tensor]
    copies: int = 1  # entry i of a stored column of TOKENS belongs to the entries i, i + N/copies, i + 2N/copies, ...

    def __len__(self) -> int:
        """Return N."""
        return len(self.columns["prompt_embeds"]) * self.copies

    def __getitem__(self, name: str) -> Tensor:
        """Return a column, of N entries."""
        column = self.columns[name]
        if self.copies == 1 or name not in TOKENS:
            return column
        return column.repeat(self.copies, *(1 for _ in column.shape[1:]))

    @property
    def device(self) -> torch.device:
        """Return the device of the columns."""
        return self.columns["prompt_embeds"].device

    def shared(self, copies: int) -> Self:
        """Keep the tokens of the first N/copies prompts only; the others must repeat them in the same order."""
        kept = len(self) // copies
        return type(self)({name: self[name][:kept] if name in TOKENS else self[name] for name in self.columns}, copies)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move to `device` and cast the embeddings to `dtype`; masks and what is EXACT stay what they are.

        bfloat16 holds no odd integer above 256, so a cast would change the sizes the network is told.
        """

        def moved(name: str, column: Tensor) -> Tensor:
            cast = column.is_floating_point() and name not in EXACT
            return column.to(device=device, dtype=dtype if cast else None)

        return type(self)({name: moved(name, column) for name, column in self.columns.items()}, self.copies)

    def select(self, index: Tensor | slice | list[int]) -> Self:
        """Return the entries at `index` (a slice, a list of positions, a boolean or an integer tensor), none shared."""
        return type(self)({name: self[name][index] for name in self.columns})

    @classmethod
    def cat(cls, conditionings: Sequence[Self]) -> Self:
        """Concatenate along N, none shared; with a mask, prompts of fewer tokens are padded with zeros it leaves out.

        Without one, texts of several lengths are long prompts in chunks: they are repeated (see `long_prompts`).

        Raises:
            ValueError: the columns are not the same ones.
        """
        names = list(conditionings[0].columns)
        if any(set(part.columns) != set(names) for part in conditionings):
            raise ValueError(f"Columns differ: {[sorted(part.columns) for part in conditionings]}. Use one family's.")
        parts = {name: [part[name] for part in conditionings] for name in names}
        if MASK in parts:
            longest = max(mask.shape[1] for mask in parts[MASK])
            parts |= {name: [_padded(part, longest) for part in parts[name]] for name in TOKENS}
        elif len({part.shape[1] for part in parts["prompt_embeds"]}) > 1:
            parts["prompt_embeds"] = to_common_length(parts["prompt_embeds"])
        return cls({name: torch.cat(columns) for name, columns in parts.items()})


def _padded(column: Tensor, length: int) -> Tensor:
    """Return a column [N,L,...] with zeros after its L tokens, so that there are `length`."""
    return F.pad(column, (0, 0) * (column.ndim - 2) + (0, length - column.shape[1]))
